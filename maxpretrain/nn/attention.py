"""Attention as a layer: projections, positions, cache."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn.attend import Angles, Context, attend, memory_visible, visible
from maxpretrain.nn.base import Module
from maxpretrain.nn.init import matrix, relative_table
from maxpretrain.nn.linear import Linear
from maxpretrain.nn.norm import make_norm
from maxpretrain.nn.position import rotate
from maxpretrain.nn.relative import T5Bias, disentangled_index, disentangled_scale, disentangled_scores

Cache = dict[str, jax.Array]
Local = bool | jax.Array


class Attention(Module):
    """Attention with H query heads and J key-value heads of width K: to the sequence itself, or to a memory (`cross`)."""

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool = False):
        d, h, j, k = config.model_dim, config.num_heads, config.kv_heads, config.head_width
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        project = partial(Linear, {"embed": d}, bias=bias)
        self.query = project({"heads": h, "head_dim": k}, matrix(config, d, h * k, query_width=k))
        # One head for all queries (multi-query) is not cut: every device that has queries needs it.
        self.kv_axis = None if j == 1 else "kv_heads"
        self.key = project({self.kv_axis: j, "head_dim": k}, matrix(config, d, j * k))
        self.value = project({self.kv_axis: j, "head_dim": k}, matrix(config, d, j * k))
        self.out = Linear(
            {"heads": h, "head_dim": k},
            {"embed": d},
            matrix(config, h * k, d, residual=True),
            bias=config.bias if config.out_bias is None else config.out_bias,
            bias_axes=("width",),
        )
        norms = config.qk_norm != "none"
        over = (h * k, j * k) if config.qk_norm == "projection" else (k, k)
        self.query_norm = make_norm(config, over[0]) if norms else None
        self.key_norm = make_norm(config, over[1]) if norms else None
        relative = config.relative
        self.bias = (
            T5Bias(h, relative, relative_table(config), bidirectional=not causal)
            if config.position == "t5" and relative.per_layer and not cross
            else None
        )
        self.disentangled = config.position == "disentangled" and not cross

        own = relative.terms if self.disentangled and not relative.share_projections else ()
        place = partial(project, {"heads": h, "head_dim": k}, matrix(config, d, h * k))
        self.relative_query = place() if "p2c" in own else None
        self.relative_key = place() if "c2p" in own else None
        self.config, self.cross = config, cross

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        key: jax.Array | None,
        cache: Cache | None = None,
        local: Local = False,
        source: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this call's keys and values in it.

        Args:
            source: [B, T, D], what keys and values are made from, token by token; None: `x`.
            cache: {"key", "value"}, each [B, S, J, K]; needs `context.slots`. Of cross attention: what `remember` made.
            local: bool or bool []: whether this layer looks through the window.
        """
        q = self._normed(self.query(x), self.query_norm)
        if self.cross:
            made = cache if cache is not None else self.remember(context.memory)
            k, v = made["key"].astype(q.dtype), made["value"].astype(q.dtype)
            mask, plain, bias = memory_visible(context, x.shape[1], k.shape[1]), False, None
        else:
            source = x if source is None else source
            k, v = self._normed(self.key(source), self.key_norm), self.value(source)
            q, k = self._turned(q, k, context, local)
            if cache is not None:
                cache = store(cache, context, {"key": k, "value": v})
                k, v = cache["key"].astype(q.dtype), cache["value"].astype(q.dtype)
            mask, plain = seen(context, x.shape[1], k.shape[1], local)
            bias = self._bias(q, k, context)
        q = constrain(q, "batch", "length", "heads", None)
        k, v = (constrain(a, "batch", "length", self.kv_axis, None) for a in (k, v))
        config = self.config
        attended = attend(
            q,
            k,
            v,
            mask,
            kernel=context.kernel if context.slots is None else "xla",
            causal=plain,
            bias=bias,
            scale=self._scale(),
            softcap=config.attention_softcap,
            rate=config.dropout,
            key=key,
        )
        return self.out(constrain(attended, "batch", "length", "heads", None)), cache

    def remember(self, memory: jax.Array) -> Cache:
        """Keys and values of the encoder's hidden states [B, S, D], for `cache` of cross attention."""
        return {"key": self._normed(self.key(memory), self.key_norm), "value": self.value(memory)}

    def _normed(self, x: jax.Array, norm: Module | None) -> jax.Array:
        if norm is None:
            return x
        if self.config.qk_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def _turned(self, q: jax.Array, k: jax.Array, context: Context, local: Local) -> tuple[jax.Array, jax.Array]:
        angles = chosen_angles(context, local)
        if angles is None:
            return q, k
        layout = self.config.rope.layout
        return rotate(q, angles, layout), rotate(k, angles, layout)

    def _scale(self) -> float | None:
        config = self.config
        if config.attention_scale is not None:
            return config.attention_scale
        if self.disentangled:
            return disentangled_scale(config.head_width, config.relative.terms)
        return None if config.mup_base is None else mup_scale(config, config.head_width)

    def _bias(self, q: jax.Array, k: jax.Array, context: Context) -> jax.Array | None:
        if self.bias is not None:
            return t5_scores(self.bias, context, q.shape[1], k.shape[1])
        if not self.disentangled:
            return context.bias
        relative, table = self.config.relative, context.relative
        assert table is not None
        r_key = (self.relative_key or self.key)(table) if "c2p" in relative.terms else None
        r_query = (self.relative_query or self.query)(table) if "p2c" in relative.terms else None
        assert context.slots is None, "validate_model lets no decoder have disentangled positions"
        index = disentangled_index(q.shape[1], k.shape[1], relative)
        return disentangled_scores(q, k, r_query, r_key, index, self._scale())


def t5_scores(bias: T5Bias, context: Context, length: int, keys: int) -> jax.Array:
    """float32 [B or 1, H, T, S]; while decoding by the slots of the tokens."""
    if context.slots is None:
        return bias.by_rows(length, keys)
    return bias(context.slots, jnp.arange(keys, dtype=jnp.int32)[None])


def mup_scale(config: ModelConfig, width: int) -> float:
    """√K'/K, with K' the head width of the tuned model: 1/√K there, and falling as 1/K from it.

    Reference: Yang et al. 2022, arXiv:2203.03466, §4.
    """
    base = width if config.mup_base_head is None else config.mup_base_head
    return math.sqrt(base) / width


def chosen_angles(context: Context, local: Local) -> Angles | None:
    """The rotary angles of a layer, global or local."""
    if context.angles is None or context.local_angles is None or local is False:
        return context.angles
    if local is True:
        return context.local_angles
    return tuple(jnp.where(local, a, b) for a, b in zip(context.local_angles, context.angles, strict=True))


def seen(context: Context, length: int, keys: int, local: Local) -> tuple[jax.Array | None, bool]:
    """The mask of a layer's self-attention, and whether it is the causal one and nothing more."""
    windowed = context.window is not None and local is not False
    plain = context.causal and context.segments is None and context.prefix is None and context.slots is None
    return visible(context, length, keys, local), plain and not windowed


def store(cache: Cache, context: Context, new: Cache) -> Cache:
    """The cache with what this call made, each [B, T, ...], in the slots of its tokens."""
    assert context.slots is not None
    rows = jnp.arange(context.slots.shape[0])[:, None]
    # A slot beyond the cache is dropped rather than clamped onto the last one.
    return {
        name: held.at[rows, context.slots].set(new[name].astype(held.dtype), mode="drop")
        for name, held in cache.items()
    }
