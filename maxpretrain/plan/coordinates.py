"""Coordinate check: do activations keep their size as the network gets wider? Under muP they do, at any step.

Reference: Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, appendix D.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain import optim
from maxpretrain.config import ModelConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.nn.stack import Execution

LAYERS, VOCABULARY, LENGTH, ROWS = 2, 256, 32, 8  # of the networks that are tried: width is what counts
STEPS = 5
FLAT = 0.2  # greatest exponent of the width that counts as none


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
    """What was measured.

    Attributes:
        widths: model_dim of each network.
        steps: updates made.
        base: width at which muP and the standard parametrization are the same.
        sizes: "mup" and "standard" -> name of an activation -> [steps + 1, widths], how far it has moved from where it was before
            the first update, the mean of |x_t − x_0| over the coordinates; row 0 is the mean of |x_0|.
    """

    widths: tuple[int, ...]
    steps: int
    base: int
    sizes: dict[str, dict[str, list[list[float]]]]

    def exponent(self, parametrization: str, name: str) -> float:
        """p of size ∝ width^p, by least squares over the widths, after the last step."""
        sizes = np.log2(np.maximum(np.asarray(self.sizes[parametrization][name][-1]), 1e-30))
        return float(np.polyfit(np.log2(self.widths), sizes, 1)[0])

    def is_flat(self, parametrization: str) -> bool:
        """Whether no activation grows with the width."""
        return all(self.exponent(parametrization, name) <= FLAT for name in self.sizes[parametrization])

    def to_dict(self) -> dict[str, Any]:
        exponents = {p: {name: self.exponent(p, name) for name in sizes} for p, sizes in self.sizes.items()}
        return dataclasses.asdict(self) | {
            "exponents": exponents,
            "flat": {parametrization: self.is_flat(parametrization) for parametrization in self.sizes},
        }


def default_widths(model: ModelConfig) -> tuple[int, ...]:
    """Four doublings of the narrowest network with this head width and this many query heads a key-value head, at least 64."""
    unit = model.head_width * (model.num_heads // model.kv_heads)
    first = unit * max(1, 2 ** math.ceil(math.log2(max(1.0, 64 / unit))))
    return tuple(first * 2**i for i in range(4))


def coordinate_check(run: Run, widths: Sequence[int] = (), steps: int = STEPS) -> CoordinateCheck:
    """Trains the run's network in several widths on one batch, with muP and without, and measures how far activations move.

    Heads keep their width; their number, the MLP and what else is a share of the width grow with it. Two layers, a vocabulary
    of 256 and one batch of random tokens do: what is asked is a matter of width alone.

    Args:
        run: its model and optimizer count; the learning rate is the peak, from the first step on.
        widths: values of model_dim, ascending; empty: `default_widths`.
        steps: updates.

    Raises:
        UserError: fewer than two widths, or one that the head width does not divide.
    """
    model = run.model
    if model.architecture == "encoder-decoder" or "lm" not in model.heads:
        raise UserError("the coordinate check takes a decoder or an encoder with a language model head")
    widths = tuple(sorted(set(widths))) or default_widths(model)
    if len(widths) < 2:
        raise UserError(f"--widths names {len(widths)} width; give at least two, such as 64,128,256")
    base = model.mup_base or widths[0]
    sizes: dict[str, dict[str, list[list[float]]]] = {}
    for parametrization, mup_base in (("mup", base), ("standard", None)):
        columns = [_moved(run, resized(model, width, mup_base), steps) for width in widths]
        sizes[parametrization] = {name: np.stack([c[name] for c in columns], 1).tolist() for name in columns[0]}
    return CoordinateCheck(widths, steps, base, sizes)


def resized(model: ModelConfig, width: int, mup_base: int | None) -> ModelConfig:
    """The model at another width, made small in all else.

    Raises:
        UserError: the width is not that of a whole number of heads.
    """
    group = model.num_heads // model.kv_heads
    if width % (model.head_width * group):
        raise UserError(
            f"--widths {width} is not divisible by {group} heads of width {model.head_width}; use multiples of "
            f"{model.head_width * group}"
        )
    heads = width // model.head_width
    scaled = lambda value: None if value is None else max(1, round(value * width / model.model_dim))  # noqa: E731
    moe = dataclasses.replace(model.moe, expert_dim=scaled(model.moe.expert_dim), dense_layers=())
    return dataclasses.replace(
        model,
        vocab_size=VOCABULARY,
        num_layers=LAYERS,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=heads // group,
        head_dim=model.head_width,
        mlp_dim=scaled(model.mlp_dim),
        embed_dim=None,
        max_length=LENGTH,
        layer_groups=None,
        layer_pattern=(),
        dropout=0.0,
        moe=dataclasses.replace(moe, shared_dim=scaled(moe.shared_dim) if moe.shared_dim else 0),
        mup_base=mup_base,
    )


def _moved(run: Run, config: ModelConfig, steps: int) -> dict[str, np.ndarray]:
    """Name of an activation -> [steps + 1]: its size, then how far it has moved after each step."""
    model = build(config, Execution(probe=True))
    rng = np.random.default_rng(run.seed)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32)
    constant = dataclasses.replace(run.optimizer.schedule, shape="constant", warmup=0)
    tx = optim.build_optimizer(
        dataclasses.replace(run.optimizer, schedule=constant),
        steps=steps,
        tokens_per_step=tokens.size,
        decay_mask=optim.decay_mask(model.abstract),
        scales=optim.update_scales(model.abstract, config.mup_ratio),
    )

    def activations(params: Any) -> dict[str, jax.Array]:
        output = model.apply(params, tokens)
        layers = {f"layer {i + 1}": output.aux["probe"][i] for i in range(LAYERS)}
        return layers | {"logits": model.logits(params, output.hidden)}

    def loss(params: Any) -> jax.Array:
        logits = jax.nn.log_softmax(model.logits(params, model.apply(params, tokens).hidden))
        targets = jnp.roll(tokens, -1, 1) if config.architecture == "decoder" else tokens
        return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], -1))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads, _ = optim.clip(jax.grad(loss)(params), run.optimizer)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    @jax.jit
    def sizes(params: Any, first: Any) -> dict[str, jax.Array]:
        return {name: jnp.mean(jnp.abs(x - first[name])) for name, x in activations(params).items()}

    params = jax.jit(model.init)(jax.random.key(run.seed))
    state = jax.jit(tx.init)(params)
    first = jax.jit(activations)(params)
    rows = [jax.device_get(sizes(params, jax.tree.map(jnp.zeros_like, first)))]
    for _ in range(steps):
        params, state = step(params, state)
        rows.append(jax.device_get(sizes(params, first)))
    return {name: np.asarray([row[name] for row in rows], np.float64) for name in rows[0]}


def render(check: CoordinateCheck) -> str:
    """A table for each parametrization: how far each activation has moved at each width, and the exponent of the width."""
    lines = [
        f"Coordinate check: mean |x − x₀| after {check.steps} updates, by width ({LAYERS} layers, vocabulary {VOCABULARY}, one batch)"
    ]
    for parametrization, sizes in check.sizes.items():
        title = f"muP, base width {check.base}" if parametrization == "mup" else "standard parametrization"
        flat = "flat" if check.is_flat(parametrization) else "not flat: grows with the width"
        lines += [
            "",
            f"{title}: {flat}",
            "  " + "width".ljust(9) + "".join(f"{w:>10}" for w in check.widths) + "  ∝ width^",
        ]
        for name, rows in sizes.items():
            cells = "".join(f"{value:>10.4g}" for value in rows[-1])
            lines.append(f"  {name.ljust(9)}{cells}  {check.exponent(parametrization, name):+.2f}")
    return "\n".join(lines)


def plot(check: CoordinateCheck, path: Path) -> None:
    """Size against width, one panel a parametrization, one line an activation, as the file's ending says (png, svg, pdf)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for panel, (parametrization, sizes) in zip(panels, check.sizes.items(), strict=True):
        for name, rows in sizes.items():
            panel.loglog(check.widths, rows[-1], marker="o", label=name, base=2)
        panel.set_title("muP" if parametrization == "mup" else "standard parametrization")
        panel.set_xlabel("model_dim")
        panel.set_xticks(check.widths, [str(w) for w in check.widths])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"mean |x − x₀| after {check.steps} updates")
    panels[0].legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
