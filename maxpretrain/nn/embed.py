"""Tables of vectors: tokens and learned positions."""

from __future__ import annotations

import jax

from maxpretrain.mesh import constrain
from maxpretrain.nn.base import Initializer, Module, param
from maxpretrain.nn.linear import einsum


class Embedding(Module):
    """A table [V, D] read by row, and by all rows at once where it serves as the unembedding."""

    def __init__(self, vocab_size: int, dim: int, initializer: Initializer):
        self.table = param((vocab_size, dim), ("vocab", "embed"), initializer, "embedding")

    def __call__(self, tokens: jax.Array, dtype: jax.numpy.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D] in `dtype`."""
        # Gathered over fsdp before the lookup: cut along D, the partitioner would replicate all B·T rows instead.
        table = constrain(self.table[...], "vocab", None)
        rows = table.at[tokens].get(mode="fill", fill_value=float("nan"))
        return constrain(rows.astype(dtype), "batch", "length", None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return einsum("...d,vd->...v", hidden, self.table[...], out=jax.numpy.float32)


class PositionEmbedding(Module):
    """A learned table [max_length, D] read by position."""

    def __init__(self, max_length: int, dim: int, initializer: Initializer):
        self.table = param((max_length, dim), ("position", "embed"), initializer, "position")

    def __call__(self, positions: jax.Array | None, length: int, dtype: jax.numpy.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D]; None: positions 0 … T−1, as [1, T, D] by a slice."""
        table = constrain(self.table[...], "position", None)
        if positions is None:
            return table[None, :length].astype(dtype)
        return table.at[positions].get(mode="fill", fill_value=float("nan")).astype(dtype)
