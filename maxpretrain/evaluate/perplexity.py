"""Loss, perplexity, bits per byte and accuracy over fixed batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from maxpretrain import mesh
from maxpretrain.errors import UserError
from maxpretrain.mesh import Layout
from maxpretrain.models import Model
from maxpretrain.objectives import Objective

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.data.pipeline import EvaluationBatches

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]

_AHEAD = 2  # batches that are queued on the devices at most


def make_eval_step(model: Model, objective: Objective) -> Callable[[Any, Batch], Sums]:
    """The function (params, batch) -> name -> (sum, weight), without dropout."""

    def eval_step(params: Any, batch: Batch) -> Sums:
        loss = objective.loss(model, params, objective.normalized(batch), None)
        return {"loss": (loss.sum, loss.weight)} | loss.metrics

    return eval_step


class Evaluator:
    """Measures parameters on the same batches each time.

    Every process of a job makes one and calls it at the same time.

    Args:
        model: any network that the objective trains.
        objective: as trained; what only regularizes is left out.
        layout: where parameters and batches lie.
        batches: the validation text, made for this process's rows (`layout.local_rows`).
        batch_size: rows of a global batch.
    """

    def __init__(self, model: Model, objective: Objective, layout: Layout, batches: EvaluationBatches, batch_size: int):
        self._model, self._objective, self._layout = model, objective.measured(), layout
        self._batches, self._batch_size = batches, batch_size
        self._step: Callable[[Any, Batch], Sums] | None = None

    def compile(self, params_abstract: Any) -> None:
        """Compiles the step ahead of its first use.

        Args:
            params_abstract: tree of jax.ShapeDtypeStruct with shardings.
        """
        rows = self._layout.batch_sharding()
        batch = {
            name: jax.ShapeDtypeStruct((self._batch_size, *shape), jnp.dtype(dtype), sharding=rows)
            for name, (shape, dtype) in self._objective.fields(self._batches.length).items()
        }
        step = make_eval_step(self._model, self._objective)
        with mesh.use(self._layout):
            jitted = jax.jit(step, out_shardings=self._layout.replicated)
            self._step = jitted.lower(params_abstract, batch).compile()

    def __call__(self, params: Any, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """The means over all batches.

        Args:
            params: placed as the layout says.
            stop: asked between batches; True gives the evaluation up. Over several processes it is not asked: they would
                part ways.

        Returns:
            "eval/loss" in nats per prediction; where the objective says that it means something, "eval/perplexity" and
            "eval/bits_per_byte" of the text covered, both of the metric "cross_entropy" where the loss has more terms; and the
            objective's own metrics as "eval/<name>"; None where it was given up.

        Raises:
            UserError: the batches hold nothing to predict.
        """
        if self._step is None:
            self.compile(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params))
        assert self._step is not None
        sums = []
        for batch in iter(self._batches):
            if jax.process_count() == 1 and stop():
                return None
            sums.append(self._step(params, self._layout.global_batch(batch, self._batch_size)))
            if len(sums) > _AHEAD:
                jax.block_until_ready(sums[-_AHEAD])  # so that `stop` is asked at the pace of the devices
        # One transfer; the sum over batches in Python's float64, where a long text loses no digits.
        return self._means(jax.device_get(sums))

    def _means(self, sums: list[dict[str, tuple[Any, Any]]]) -> dict[str, float]:
        names = sums[0] if sums else {}
        totals = {name: [math.fsum(float(s[name][part]) for s in sums) for part in (0, 1)] for name in names}
        if not totals or totals["loss"][1] == 0:
            raise UserError("the validation text holds nothing to predict; give documents of at least two tokens")
        means = {f"eval/{name}": total / weight if weight else math.nan for name, (total, weight) in totals.items()}
        means["eval/loss"] = self._objective.combined({name.removeprefix("eval/"): v for name, v in means.items()})
        # What the text has nothing of, such as examples of a denoiser, has no mean.
        means = {name: value for name, value in means.items() if name == "eval/loss" or not math.isnan(value)}
        nats = means.get("eval/cross_entropy", means["eval/loss"])
        if self._objective.perplexity:
            means["eval/perplexity"] = math.exp(nats) if nats < 700 else math.inf
        if self._objective.whole_text:
            means["eval/bits_per_byte"] = bits_per_byte(nats, self._batches.num_tokens, self._batches.num_bytes)
        return means


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """loss · tokens / (ln 2 · bytes): what a token costs, spread over the bytes it stands for.

    Args:
        loss: nats per token.
        num_tokens: of a text.
        num_bytes: UTF-8 bytes of that text.
    """
    return loss * num_tokens / (math.log(2) * num_bytes) if num_bytes else math.nan
