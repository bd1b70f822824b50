"""Multi-token prediction: each position predicts the next token and some after it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields, Loss, Work, require_rising
from maxpretrain.objectives.clm import CLM

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import ModelConfig, Run
    from maxpretrain.models import Model
    from maxpretrain.nn.stack import Execution
else:
    np = lazy("numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiToken(CLM):
    """L = L_1 + Σ_k w·L_{k+1}, with L_k = −mean log p(x[t+k] | x[≤t]) and k = 1 … depth.

    parallel (Meta): one more layer a further token, all on the same trunk, and w = 1; the last layer is the head of the
    next token, so that depth 0 is CLM. sequential (DeepSeek-V3): modules that also read the tokens in between, so that
    the k-th predicts x[t+k+1] from x[≤t+k], and w = weight/depth. See `models.multi_token`.

    Each L is a mean over the positions that have such a label in their own document: the last k of a document have
    none. As the loss is reported per label of the next token, the others' sums are scaled by their share of the whole
    batch (`normalized`). Perplexity and bits per byte are those of the next token alone.

    References: Gloeckle et al. 2024, arXiv:2404.19737, §2; DeepSeek-AI 2024, arXiv:2412.19437, §2.2, eq. 21 to 25.
    """

    form: Literal["parallel", "sequential"] = "parallel"  # heads side by side (Meta) or one after another (DeepSeek-V3)
    depth: int = 3  # tokens that are predicted after the next one; Meta's n is depth + 1
    weight: float = 0.3  # of the mean of the further losses, in the sequential form; evaluation's too
    # ((step, weight), …), rising: linear in between, constant before the first and after the last.
    schedule: tuple[tuple[int, float], ...] = ()  # training's weight by step; empty: `weight` all along

    def validate(self, run: Run) -> None:
        super().validate(run)
        if self.depth < 0:
            raise UserError(f"objective.depth is {self.depth}; it must be at least 0")
        if self.depth >= run.batch.length:
            raise UserError(
                f"objective.depth is {self.depth}, and batch.length {run.batch.length} tokens; predict fewer, or "
                "lengthen it"
            )
        if self.weight <= 0:
            raise UserError(f"objective.weight is {self.weight}; it must be above 0")
        if self.schedule and self.form == "parallel":
            raise UserError(
                "objective.schedule is of the weight in the sequential form; the parallel form has none, so leave it out"
            )
        require_rising([step for step, _ in self.schedule], "objective.schedule")
        if any(not weight > 0 or math.isinf(weight) for _, weight in self.schedule):
            raise UserError(f"objective.schedule is {self.schedule}; its weights must be above 0")

    @property
    def overlap(self) -> int:  # type: ignore[override]
        return 1 + self.depth

    def raw_length(self, length: int) -> int:
        return length + 1 + self.depth

    def fields(self, length: int) -> Fields:
        further: Fields = {
            "further_labels": ((self.depth, length), "int32"),
            "further_weights": ((self.depth, length), "float32"),
        }
        return super().fields(length) | (further if self.depth else {})

    def examples(self, tokens: np.ndarray, segments: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`example` of many windows at once: [N, n] in, [N, n − 1 − depth] out, and [N, depth, n − 1 − depth].

        Further labels are those of the tokens 2 … depth + 1 places on; weight and label are 0 where that token is
        padding and, with `mask_documents`, where it belongs to another document.
        """
        import numpy as np  # not the lazy one: see `CLM.examples`

        tokens = tokens.astype(np.int32, copy=False)
        segments = np.ones_like(tokens) if segments is None else segments
        length = max(tokens.shape[1] - 1 - self.depth, 0)
        batch = super().examples(tokens[:, : length + 1], segments[:, : length + 1])
        if not self.depth:
            return batch
        later = lambda x: np.stack([x[:, k : k + length] for k in range(2, self.depth + 2)], 1)  # noqa: E731
        labels, theirs = later(tokens), later(segments)
        predicted = theirs > 0
        if self.mask_documents:
            predicted &= theirs == segments[:, None, :length]
        batch["further_labels"] = np.where(predicted, labels, np.int32(0))
        batch["further_weights"] = predicted.astype(np.float32)
        return batch

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        """The network, and for each further token a layer with all logits, and in the sequential form a projection [2·D, D]."""
        from maxpretrain.models.multi_token import layer_config

        (main,) = super().work(model, length)
        extra = 2 * model.model_dim**2 if self.form == "sequential" else 0
        return [main, *[main._replace(model=layer_config(model), extra=extra)] * self.depth]

    def build(self, config: ModelConfig, execution: Execution | None = None) -> Model:
        if not self.depth:
            return super().build(config, execution)
        from maxpretrain.models.multi_token import MultiTokenModel
        from maxpretrain.nn.stack import Execution

        return MultiTokenModel(config, execution or Execution(), form=self.form, depth=self.depth)

    def _factor(self, step: jax.Array | None = None) -> Any:
        """Of each further loss."""
        import jax.numpy as jnp

        if self.form == "parallel":
            return 1.0
        if step is None or not self.schedule:
            return self.weight / self.depth
        steps, weights = (jnp.asarray(values, jnp.float32) for values in zip(*self.schedule, strict=True))
        return jnp.interp(step.astype(jnp.float32), steps, weights) / self.depth

    def normalized(self, batch: dict[str, jax.Array], step: jax.Array | None = None) -> dict[str, jax.Array]:
        """The batch with "further_scales" float32 [B, depth]: what makes a sum over further labels count as their mean,
        w times, once the whole is divided by the number of labels of the next token.
        """
        import jax.numpy as jnp

        if not self.depth:
            return batch
        weights = batch["further_weights"]
        counts = jnp.sum(weights, (0, 2))
        scales = jnp.where(counts > 0, self._factor(step) * jnp.sum(batch["weights"]) / jnp.maximum(counts, 1.0), 0.0)
        return batch | {"further_scales": jnp.broadcast_to(scales[None], weights.shape[:2])}

    def combined(self, means: dict[str, float]) -> float:
        further = [means[f"loss_depth_{k}"] for k in range(2, self.depth + 2)]
        return means["cross_entropy"] + sum(self._factor() * mean for mean in further if not math.isnan(mean))

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        """The loss; metrics "accuracy" and "cross_entropy" of the next token, and "loss_depth_2", … of further ones."""
        import jax.numpy as jnp

        from maxpretrain.objectives.cross_entropy import token_cross_entropy

        batch = batch if "further_scales" in batch else self.normalized(batch)
        labels, weights = batch["labels"][:, None], batch["weights"][:, None]  # [B, N, T] of N heads
        places = batch.get("positions"), batch.get("segments")
        if self.depth:
            labels = jnp.concatenate([labels, batch["further_labels"]], 1)
            weights = jnp.concatenate([weights, batch["further_weights"]], 1)
            # The token k places on is the label of depth k.
            output, further = model.predict(params, batch["tokens"], labels[:, :-1], *places, key)
            hidden = jnp.concatenate([output.hidden[:, None], jnp.moveaxis(further, 0, 1)], 1)
            scales = jnp.concatenate([jnp.ones_like(batch["further_scales"][:, :1]), batch["further_scales"]], 1)
        else:
            output = model.apply(params, batch["tokens"], *places, key)
            hidden, scales = output.hidden[:, None], jnp.ones_like(weights[:, :, 0])
        # The heads as rows of one batch, a few positions at a time: no more logits exist at once than of one head, and
        # the unembedding has one gradient that all add to.
        rows = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        total, sums = token_cross_entropy(
            model,
            params,
            rows(hidden),
            rows(labels),
            rows(weights * scales[:, :, None]),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        unscaled = lambda x: jnp.sum(x.reshape(scales.shape) / jnp.where(scales > 0, scales, 1.0), 0)  # noqa: E731
        counts, nll = jnp.sum(weights, (0, 2)), unscaled(sums["nll"])
        metrics = {"accuracy": (unscaled(sums["correct"])[0], counts[0]), "cross_entropy": (nll[0], counts[0])}
        for k in range(1, self.depth + 1):
            metrics[f"loss_depth_{k + 1}"] = (nll[k], counts[k])
        return Loss(total, counts[0], metrics, output.aux)
