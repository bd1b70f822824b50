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
    perplexity: ClassVar[bool] = True
    whole_text: ClassVar[bool] = True

    def validate(self, run: Run) -> None:
        super().validate(run)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; it must be at least 0")

    def raw_length(self, length: int) -> int:
        return length + 1

    def fields(self, length: int) -> Fields:
        fields: Fields = {
            "tokens": ((length,), "int32"),
            "labels": ((length,), "int32"),
            "weights": ((length,), "float32"),
        }
        if self.mask_documents:
            fields |= {"segments": ((length,), "int32"), "positions": ((length,), "int32")}
        return fields

    def example(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator | None = None,
        segments: np.ndarray | None = None,
        **more: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Input and label are one token apart; the last raw token is a label only. Nothing is drawn from `rng`.

        Args:
            tokens: integer [n], n ≥ 1.
            rng: unused.
            segments: int32 [n], 1, 2, … by document, 0 for padding at the end; None: one document.

        Returns:
            The arrays of `fields(n - 1)`. Weight and label are 0 where the next token is padding and, with
            `mask_documents`, where it belongs to another document. Everything is 0 under padding.
        """
        batch = self.examples(tokens[None], None if segments is None else segments[None])
        return {name: array[0] for name, array in batch.items()}

    def examples(self, tokens: np.ndarray, segments: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`example` of many windows at once: [N, n] in, [N, n - 1] out."""
        import numpy as np  # not the lazy one, which is looked up at every use: this runs for every batch

        tokens = tokens.astype(np.int32, copy=False)
        segments = np.ones_like(tokens) if segments is None else segments
        here, following = segments[:, :-1], segments[:, 1:]
        real = following > 0
        predicted = real & (here == following) if self.mask_documents else real
        batch = {
            "tokens": np.where(real, tokens[:, :-1], np.int32(0)),
            "labels": np.where(predicted, tokens[:, 1:], np.int32(0)),
            "weights": predicted.astype(np.float32),
        }
        if self.mask_documents:
            index = np.arange(here.shape[1], dtype=np.int32)
            starts = np.zeros(here.shape, np.int32)  # index of the first token of each position's document
            np.multiply(here[:, 1:] != here[:, :-1], index[1:], out=starts[:, 1:], casting="unsafe")
            starts = np.maximum.accumulate(starts, axis=1)
            batch["segments"] = np.where(real, here, 0).astype(np.int32, copy=False)
            batch["positions"] = np.where(real, index - starts, np.int32(0))
        return batch

    def measured(self) -> CLM:
        return self.replace(label_smoothing=0.0, z_loss=0.0)

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        from maxpretrain.objectives.cross_entropy import label_loss

        output = model.apply(params, batch["tokens"], batch.get("positions"), batch.get("segments"), key)
        return label_loss(model, params, output, batch, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
