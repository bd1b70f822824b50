"""What every network has: from token vectors to hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.nn import init as inits
from maxpretrain.nn import position
from maxpretrain.nn.attend import Context
from maxpretrain.nn.attention import Cache, t5_scores
from maxpretrain.nn.base import Module
from maxpretrain.nn.dropout import split
from maxpretrain.nn.embed import Input, PositionEmbedding
from maxpretrain.nn.norm import make_norm
from maxpretrain.nn.relative import Disentangled, T5Bias
from maxpretrain.nn.stack import Execution, Stack, Statistics


class Trunk(Module):
    """Input, L blocks, final norm: causal or not, with an encoder's memory to look at or without."""

    def __init__(self, config: ModelConfig, execution: Execution, *, causal: bool, cross: bool = False):
        self.input = Input(config)
        self.stack = Stack(config, execution, causal=causal, cross=cross)
        self.norm = make_norm(config) if config.final_norm else None
        relative, table = config.relative, inits.relative_table(config)
        shared = config.position == "t5" and not relative.per_layer
        self.bias = T5Bias(config.num_heads, relative, table, bidirectional=not causal) if shared else None
        self.disentangled = (
            Disentangled(config.model_dim, relative, config.norm_eps, table)
            if config.position == "disentangled"
            else None
        )
        self.mask_decoder = (
            PositionEmbedding(config.max_length, config.model_dim, inits.table(config)) if config.mask_decoder else None
        )
        self.config, self.execution, self.causal = config, execution, causal

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
        token_types: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_segments: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        penultimate: bool = False,
    ) -> tuple[jax.Array, Cache | None, Statistics]:
        """Token vectors [B, T, E] -> hidden states [B, T, D]; see `Model.apply`, `nn.attend.Context` and `Stack`."""
        input_key, stack_key = split(key, 2)
        x = self.input(x, positions, token_types, input_key)
        context = self.context(
            x, positions, segments, prefix=prefix, memory=memory, memory_segments=memory_segments, cache=cache
        )
        places = None if self.mask_decoder is None else self.mask_decoder(positions, x.shape[1], x.dtype)
        x, cache, statistics = self.stack(
            x, context, key=stack_key, cache=cache, places=places, penultimate=penultimate
        )
        return (x if self.norm is None else self.norm(x)), cache, statistics

    def context(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        *,
        prefix: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Context:
        """What all layers share in a forward pass of `x` [B, T, D]."""
        length = x.shape[1]
        at = jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions
        keys = length if cache is None else cache["key"].shape[2]
        context = Context(
            causal=self.causal,
            segments=segments,
            prefix=prefix,
            window=self.config.window,
            slots=None if cache is None else at,
            relative=None if self.disentangled is None else self.disentangled(x.dtype),
            memory=memory,
            memory_segments=memory_segments,
            kernel=self.execution.attention,
        )
        bias = self._bias(context, length, keys)
        angles, local_angles = self._angles(at, keys)
        return context.replace(bias=bias, angles=angles, local_angles=local_angles)

    def _bias(self, context: Context, length: int, keys: int) -> jax.Array | None:
        """float32 [B or 1, H, T, S], the same in all layers."""
        if self.bias is not None:
            return t5_scores(self.bias, context, length, keys)
        if self.config.position != "alibi":
            return None
        slopes = jnp.asarray(position.alibi_slopes(self.config.num_heads), jnp.float32)[None, :, None, None]
        distance = jnp.arange(keys, dtype=jnp.int32)[None, None, :] - context.places(length)[:, :, None]
        distance = -jnp.abs(distance)  # a causal query has no key ahead, but in a prefix
        return slopes * distance.astype(jnp.float32)[:, None]

    def _angles(self, at: jax.Array, length: int) -> tuple[tuple[jax.Array, jax.Array] | None, ...]:
        """Rotary angles of all layers, and of those with a window where they differ."""
        config = self.config
        if config.position != "rope":
            return None, None
        width = config.latent.rope_dim if config.latent.kv_rank else config.head_width
        angles = [
            position.rotary_angles(at, *position.rotary_frequencies(config.rope, width, length=length, local=local))
            for local in (False, True)
            if not local or config.rope.local_theta is not None
        ]
        return angles[0], angles[1] if len(angles) > 1 else None
