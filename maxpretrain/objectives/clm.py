"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields, Loss, Objective

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import Run
else:
    np = lazy("numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLM(Objective):
    """L = −Σ log p(x[t+1] | x[≤t]) over every position that has a next token in its own document."""

    mask_documents: bool = True  # packed documents do not see each other, and no label crosses from one to the next
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    z_loss: float = 0.0  # weight of log²Z, which keeps the normalizer near 1; 1e-4 is usual

    overlap: ClassVar[int] = 1
    architectures: ClassVar[tuple[str, ...]] = ("decoder",)

    def validate(self, run: Run) -> None:
        if run.model.architecture not in self.architectures:
            raise UserError(f"objective CLM needs a decoder; model.architecture is {run.model.architecture}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; it must be at least 0")

    def raw_length(self, length: int) -> int:
        return length + 1

    def fields(self, length: int) -> Fields:
        fields: Fields = {"tokens": ((length,), "int32"), "labels": ((length,), "int32"), "weights": ((length,), "float32")}
        if self.mask_documents:
            fields |= {"segments": ((length,), "int32"), "positions": ((length,), "int32")}
        return fields

    def example(self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        raise NotImplementedError
