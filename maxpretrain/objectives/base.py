"""The contract that every objective keeps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import Run

Fields = dict[str, tuple[tuple[int, ...], str]]


class Loss(NamedTuple):
    """A loss before its one division: gradients are of `sum`, and `sum / weight` over the global batch is the mean.

    Attributes:
        sum: float32 [], nats (or the objective's unit) summed over predictions.
        weight: float32 [], number of predictions.
        metrics: name -> (sum, weight) pair of float32 [], reported as sum / weight.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a model is trained to do: how raw tokens become an example (host, numpy), and what the loss is (device, jnp).

    The fields of a subclass are its config. Class attributes:
        overlap: raw tokens that one window shares with the next.
        architectures: networks it can train.
    """

    overlap: ClassVar[int] = 0
    architectures: ClassVar[tuple[str, ...]] = ()

    def validate(self, run: Run) -> None:
        """Raises UserError where the run cannot train this objective."""

    def measured(self) -> Objective:
        """The objective without what only regularizes training: what evaluation reports."""
        return self

    def raw_length(self, length: int) -> int:
        """Raw tokens that one example of `length` consumes."""
        raise NotImplementedError

    def fields(self, length: int) -> Fields:
        """The example it makes: name -> (shape, dtype)."""
        raise NotImplementedError

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """One example from `raw_length` tokens; host side, pure.

        Args:
            tokens: integer [raw_length], or shorter at the end of the text.
            rng: seeded by (seed, epoch, window).
            segments: int32 [len(tokens)], 1, 2, … by document; None: one document.
        """
        raise NotImplementedError

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        """The loss of a batch; device side, pure. `key` is None in evaluation."""
        raise NotImplementedError
