"""Tables of vectors, and what a network makes of its input before the first block."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Initializer, Module, param
from maxpretrain.nn.dropout import dropout
from maxpretrain.nn.linear import Linear, einsum
from maxpretrain.nn.norm import make_norm
from maxpretrain.nn.position import sinusoids


class Embedding(Module):
    """A table [V, D] read by row, and by all rows at once where it serves as the unembedding."""

    def __init__(self, vocab_size: int, dim: int, initializer: Initializer):
        self.table = param((vocab_size, dim), ("vocab", "embed"), initializer, "embedding")

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D] in `dtype`."""
        # Gathered over fsdp before the lookup: cut along D, the partitioner would replicate all B·T rows instead.
        table = constrain(self.table[...], "vocab", None)
        rows = table.at[tokens].get(mode="fill", fill_value=float("nan"))
        return constrain(rows.astype(dtype), "batch", "length", None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return einsum("...d,vd->...v", hidden, self.table[...], out=jnp.float32)


class PositionEmbedding(Module):
    """A learned table read by position; position 0 has row `offset`."""

    def __init__(self, rows: int, dim: int, initializer: Initializer, offset: int = 0):
        self.table = param((rows, dim), ("position", "embed"), initializer, "position")
        self.offset = offset

    def __call__(self, positions: jax.Array | None, length: int, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D]; None: positions 0 … T−1, as [1, T, D] by a slice."""
        table = constrain(self.table[...], "position", None)
        if positions is None:
            return table[None, self.offset : self.offset + length].astype(dtype)
        return table.at[positions + self.offset].get(mode="fill", fill_value=float("nan")).astype(dtype)


class TokenTypes(Module):
    """A learned vector for each kind of segment, as BERT has for the two sentences of a pair."""

    def __init__(self, kinds: int, dim: int, initializer: Initializer):
        self.table = param((kinds, dim), (None, "embed"), initializer, "position")

    def __call__(self, kinds: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D]; None: all of kind 0, as [1, 1, D]."""
        table = constrain(self.table[...], None, None)
        if kinds is None:
            return table[None, :1].astype(dtype)
        return table.at[kinds].get(mode="fill", fill_value=float("nan")).astype(dtype)


class Input(Module):
    """Token vectors (scaled) + positions + token types, then norm, dropout, and a projection to the model's width.

    References: Devlin et al. 2018, arXiv:1810.04805, §3; the projection: Lan et al. 2020, arXiv:1909.11942, §3.1; the norm:
    Le Scao et al. 2022, arXiv:2211.05100, §3.2; the scale: Vaswani et al. 2017, arXiv:1706.03762, §3.4.
    """

    def __init__(self, config: ModelConfig):
        width, table = config.embed_width, inits.table(config)
        offset, dim = config.position_offset, config.model_dim
        self.positions = (
            PositionEmbedding(config.max_length + offset, width, table, offset) if config.has_position_table else None
        )
        self.token_types = TokenTypes(config.token_types, width, table) if config.token_types else None
        self.norm = make_norm(config, width) if config.embed_norm else None
        project = Linear({"embedded": width}, {"embed": dim}, inits.matrix(config, width, dim), bias=config.bias)
        self.project = None if config.embed_dim is None else project
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        token_types: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """Token vectors [B, T, E] -> [B, T, D].

        Args:
            positions: int32 [B, T]; None: 0 … T−1.
            token_types: int32 [B, T]; None: all of kind 0.
        """
        config = self.config
        sinusoidal = config.position == "sinusoidal"
        # Scaled up, the tokens are not drowned by positions of unit size.
        if sinusoidal if config.embed_scale is None else config.embed_scale:
            x = x * jnp.asarray(math.sqrt(config.model_dim), x.dtype)
        if self.token_types is not None:
            x = x + jnp.broadcast_to(self.token_types(token_types, x.dtype), x.shape)
        if self.positions is not None:
            x = x + jnp.broadcast_to(self.positions(positions, x.shape[1], x.dtype), x.shape)
        elif sinusoidal:
            at = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions
            x = x + jnp.broadcast_to(sinusoids(at, config.embed_width).astype(x.dtype), x.shape)
        x = x if self.norm is None else self.norm(x)
        x = dropout(x, config.dropout, key)
        return constrain(x if self.project is None else self.project(x), "batch", "length", None)
