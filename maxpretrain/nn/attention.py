"""Attention: which keys a query sees, and the product itself by the kernel asked for."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn.base import Module
from maxpretrain.nn.dropout import dropout
from maxpretrain.nn.init import matrix
from maxpretrain.nn.linear import Linear
from maxpretrain.nn.position import rotate

Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        segments: int32 [B, T], tokens of different segments do not see each other; None: one segment a row.
        angles: cosines and sines of rotary positions, or None.
        slots: int32 [B, T], decoding with a cache: the position that each token is written to. None: no cache.
        kernel: "xla" or "cudnn".
    """

    segments: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    slots: jax.Array | None = None
    kernel: str = "xla"


def visible(context: Context, length: int, keys: int) -> jax.Array:
    """Causal mask, within segments: bool [B or 1, T, S], true where the query may see the key."""
    if context.slots is not None:
        # A slot of the cache holds the position of its number; later ones are empty or left from padding.
        return jnp.arange(keys)[None, None, :] <= context.slots[:, :, None]
    mask = (jnp.arange(keys)[None, :] <= jnp.arange(length)[:, None])[None]
    if context.segments is not None:
        same = context.segments[:, :, None] == context.segments[:, None, :]
        mask = jnp.logical_and(jnp.broadcast_to(mask, same.shape), same)
    return mask


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, context: Context, *, rate: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """softmax(q·kᵀ/√K)·v over the visible keys, softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, J, K], J dividing H: query heads h·H/J … share key-value head h.
        rate, key: dropout on the attention weights.

    Returns:
        [B, T, H, K].

    Reference: Vaswani et al. 2017, arXiv:1706.03762, §3.2; shared heads: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if context.kernel == "cudnn" and context.slots is None and (rate == 0.0 or key is None):
        mask = None if context.segments is None else visible(context, q.shape[1], k.shape[1])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    b, t, h, width = q.shape
    j = k.shape[2]
    groups = h // j
    q = q * jnp.asarray(1.0 / math.sqrt(width), q.dtype)
    q = q.reshape(b, t, j, groups, width).transpose(0, 2, 3, 1, 4).reshape(b, j, groups * t, width)
    mask = jnp.tile(visible(context, t, k.shape[1])[:, None], (1, 1, groups, 1))
    y = _attend(rate, q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, key)
    return y.reshape(b, j, groups, t, width).transpose(0, 3, 1, 2, 4).reshape(b, t, h, width)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rate: float, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
    """softmax(q·kᵀ)·v where `mask`, with the N = T·H/J queries of all heads that share keys in a row.

    A gradient of its own, for JAX's takes more passes over [N, S], which on a CPU cost as much as the products. Four axes,
    since XLA copies more when it is given a fifth, even of size one.

    Args:
        q: [B, J, N, K], scaled.
        k, v: [B, J, S, K].
        mask: bool [B or 1, 1, N, S].
    """
    return _attend_forward(rate, q, k, v, mask, key)[0]


def _attend_forward(rate: float, q: Any, k: Any, v: Any, mask: Any, key: Any) -> tuple[jax.Array, Any]:
    scores = jnp.einsum("bjnk,bjsk->bjns", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # Weights are powers · share; both are kept apart, so that the division is of [N, K] rather than [N, S].
    powers = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    share = 1.0 / jnp.sum(powers, -1, keepdims=True)
    y = jnp.einsum("bjns,bjsk->bjnk", dropout(powers, rate, key).astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = (y * share).astype(q.dtype)
    return y, (q, k, v, powers, share, y, key)


def _attend_backward(rate: float, saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, powers, share, y, key = saved
    d_weights = jnp.einsum("bjnk,bjsk->bjns", dy, v, preferred_element_type=jnp.float32)
    wide = dy.astype(jnp.float32)
    mean = jnp.sum(wide * y.astype(jnp.float32), -1, keepdims=True)  # Σ_s weights·d_weights, without a pass over [N, S]
    d_scores = (powers * ((dropout(d_weights, rate, key) - mean) * share)).astype(q.dtype)
    dq = jnp.einsum("bjns,bjsk->bjnk", d_scores, k)
    # The narrow operand first, as in linear.py.
    dk = jnp.einsum("bjnk,bjns->bjks", q, d_scores).swapaxes(2, 3)
    dropped = dropout(powers, rate, key).astype(v.dtype)
    dv = jnp.einsum("bjnk,bjns->bjks", (wide * share).astype(v.dtype), dropped).swapaxes(2, 3)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


class Attention(Module):
    """Causal self-attention with H query heads and J key-value heads of width K."""

    def __init__(self, config: ModelConfig):
        d, h, j, k = config.model_dim, config.num_heads, config.kv_heads, config.head_width
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        project = partial(Linear, {"embed": d}, bias=bias)
        self.query = project({"heads": h, "head_dim": k}, matrix(config, d, h * k))
        self.key = project({"kv_heads": j, "head_dim": k}, matrix(config, d, j * k))
        self.value = project({"kv_heads": j, "head_dim": k}, matrix(config, d, j * k))
        self.out = Linear(
            {"heads": h, "head_dim": k},
            {"embed": d},
            matrix(config, h * k, d, residual=True),
            bias=config.bias,
            bias_axes=("width",),
        )
        self.rate = config.dropout

    def __call__(
        self, x: jax.Array, context: Context, *, key: jax.Array | None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this call's keys and values in it.

        Args:
            cache: {"key", "value"}, each [B, S, J, K]; needs `context.slots`.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        if context.angles is not None:
            q, k = rotate(q, context.angles), rotate(k, context.angles)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            # A slot beyond the cache is dropped rather than clamped onto the last one.
            cache = {
                "key": cache["key"].at[rows, context.slots].set(k.astype(cache["key"].dtype), mode="drop"),
                "value": cache["value"].at[rows, context.slots].set(v.astype(cache["value"].dtype), mode="drop"),
            }
            k, v = cache["key"].astype(q.dtype), cache["value"].astype(q.dtype)
        q = constrain(q, "batch", "length", "heads", None)
        k, v = (constrain(a, "batch", "length", "kv_heads", None) for a in (k, v))
        attended = attend(q, k, v, context, rate=self.rate, key=key)
        return self.out(constrain(attended, "batch", "length", "heads", None)), cache
