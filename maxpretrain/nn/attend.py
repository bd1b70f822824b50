"""The product of attention, and which keys a query sees."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain.nn.dropout import dropout

Angles = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        causal: a query sees keys up to its own place.
        segments: int32 [B, T], tokens of different segments do not see each other, and those of segment 0, padding, see
            none; None: one segment a row.
        prefix: bool [B, T], tokens of a bidirectional prefix, which see each other all; None: no token is. With a cache
            they are the first of their row, and it is filled with them all at once.
        window: tokens seen in local layers: the last so many (causal), or so many on either side.
        angles, local_angles: cosines and sines of rotary positions, of all layers and of the local ones; or None.
        bias: float32 [B or 1, H, T, S], added to the scores of every layer, or None.
        slots: int32 [B, T], decoding with a cache: the place that each token is written to. None: no cache.
        relative: [R, D], table of disentangled positions, or None.
        memory: [B, S, D], hidden states of the encoder that a decoder looks at, or None.
        memory_segments: int32 [B, S]; with `segments`: a token sees the memory of its own segment. None: all of it.
        kernel: "xla" or "cudnn".
    """

    causal: bool = True
    segments: jax.Array | None = None
    prefix: jax.Array | None = None
    window: int | None = None
    angles: Angles | None = None
    local_angles: Angles | None = None
    bias: jax.Array | None = None
    slots: jax.Array | None = None
    relative: jax.Array | None = None
    memory: jax.Array | None = None
    memory_segments: jax.Array | None = None
    kernel: str = "xla"

    def replace(self, **changes: Any) -> Context:
        return dataclasses.replace(self, **changes)

    def places(self, length: int) -> jax.Array:
        """int32 [B or 1, T]: where queries stand among the keys, which stand at 0 … S−1."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.slots is None else self.slots


def visible(context: Context, length: int, keys: int, local: bool | jax.Array = False) -> jax.Array | None:
    """Which keys of its own sequence a query sees.

    Args:
        length, keys: T and S.
        local: bool or bool []: whether the layer looks through the window.

    Returns:
        bool [B or 1, T, S], true where the query sees the key; None: all see all.

    Reference: prefix: Raffel et al. 2020, arXiv:1910.10683, §3.2; window: Beltagy et al. 2020, arXiv:2004.05150.
    """
    query = context.places(length)[:, :, None]
    key = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    mask = None
    if context.causal:
        # With a cache this also hides empty slots, and those that padding left behind: they come later.
        mask = key <= query
        if context.prefix is not None:
            among = context.prefix[:, None, :]
            if context.slots is not None:
                among = key < jnp.sum(context.prefix, 1, dtype=jnp.int32)[:, None, None]
            mask = jnp.logical_or(mask, context.prefix[:, :, None] & among)
    if context.window is not None and local is not False:
        near = query - key < context.window
        if not context.causal or context.prefix is not None:
            reach = context.window if not context.causal else context.window - 1
            near = jnp.abs(query - key) <= reach
        near = near if local is True else jnp.logical_or(near, jnp.logical_not(local))
        mask = near if mask is None else jnp.logical_and(mask, near)
    if context.segments is not None and context.slots is None:
        rows, columns = context.segments[:, :, None], context.segments[:, None, :]
        same = jnp.logical_and(rows == columns, rows != 0)  # padding sees nothing
        mask = same if mask is None else jnp.logical_and(jnp.broadcast_to(mask, same.shape), same)
    return mask


def memory_visible(context: Context, length: int, keys: int) -> jax.Array | None:
    """bool [B, T, S], which places of the memory a query sees; None: all.

    The memory's segment 0 is padding; a row that is decoded by itself (`segments` None) sees all others.
    """
    if context.memory_segments is None:
        return None
    there = context.memory_segments[:, None, :]
    if context.segments is None:
        return jnp.broadcast_to(there != 0, (there.shape[0], length, keys))
    return context.segments[:, :, None] == there


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    kernel: str = "xla",
    causal: bool = False,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale·q·kᵀ + bias)·v over the visible keys, softmax in float32.

    Args:
        q: [B, T, H, K].
        k: [B, S, J, K], J dividing H: query heads h·H/J … share key-value head h.
        v: [B, S, J, E].
        mask: bool [B or 1, T, S], true where seen; None: all.
        causal: the mask is the causal one and nothing more, which a kernel may make by itself.
        bias: float [B or 1, H, T, S].
        scale: None: 1/√K.
        softcap: scores become c·tanh(scores/c) before the mask.
        rate, key: dropout on the attention weights.

    Returns:
        [B, T, H, E].

    Reference: Vaswani et al. 2017, arXiv:1706.03762, §3.2; shared heads: Ainslie et al. 2023, arXiv:2305.13245; soft cap:
    Gemma Team 2024, arXiv:2408.00118, §2.
    """
    b, t, h, width = q.shape
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    plain = softcap is None and (rate == 0.0 or key is None) and v.shape[-1] == width
    if kernel == "cudnn" and plain:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=None if bias is None else bias.astype(q.dtype),
            mask=None if mask is None or causal else mask[:, None],
            is_causal=causal,
            scale=scale,
            implementation="cudnn",
        )
    j = k.shape[2]
    groups = h // j
    if scale != 1.0:
        q = q * jnp.asarray(scale, q.dtype)
    q = q.reshape(b, t, j, groups, width).transpose(0, 2, 3, 1, 4).reshape(b, j, groups * t, width)
    if mask is not None:
        mask = jnp.tile(mask[:, None], (1, 1, groups, 1))
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape(bias.shape[0], j, groups * t, bias.shape[-1])
    y = _attend((rate, softcap), q, k.swapaxes(1, 2), v.swapaxes(1, 2), bias, mask, key)
    return y.reshape(b, j, groups, t, v.shape[-1]).transpose(0, 3, 1, 2, 4).reshape(b, t, h, v.shape[-1])


Numbers = tuple[float, float | None]  # rate, softcap


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(numbers: Numbers, q: Any, k: Any, v: Any, bias: Any, mask: Any, key: Any) -> jax.Array:
    """softmax(q·kᵀ + bias)·v where `mask`, with the N = T·H/J queries of all heads that share keys in a row.

    A gradient of its own, for JAX's takes more passes over [N, S], which on a CPU cost as much as the products. Four axes,
    since XLA copies more when it is given a fifth, even of size one.

    Args:
        q: [B, J, N, K], scaled.
        k: [B, J, S, K].
        v: [B, J, S, E].
        bias: float32 [B or 1, J, N, S] or None.
        mask: bool [B or 1, 1, N, S] or None.
    """
    return _attend_forward(numbers, q, k, v, bias, mask, key)[0]


def _attend_forward(numbers: Numbers, q: Any, k: Any, v: Any, bias: Any, mask: Any, key: Any) -> tuple[jax.Array, Any]:
    rate, softcap = numbers
    scores = jnp.einsum("bjnk,bjsk->bjns", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    capped = None
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores = softcap * capped
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # Weights are powers · share; both are kept apart, so that the division is of [N, E] rather than [N, S].
    powers = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    share = 1.0 / jnp.sum(powers, -1, keepdims=True)
    y = jnp.einsum("bjns,bjse->bjne", dropout(powers, rate, key).astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = (y * share).astype(q.dtype)
    rows = None if bias is None else jnp.zeros((bias.shape[0], 0), jnp.float32)  # only its shape is needed
    return y, (q, k, v, powers, share, y, key, capped, rows)


def _attend_backward(numbers: Numbers, saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    rate, _ = numbers
    q, k, v, powers, share, y, key, capped, rows = saved
    d_weights = jnp.einsum("bjne,bjse->bjns", dy, v, preferred_element_type=jnp.float32)
    wide = dy.astype(jnp.float32)
    mean = jnp.sum(wide * y.astype(jnp.float32), -1, keepdims=True)  # Σ_s weights·d_weights, without a pass over [N, S]
    d_wide = powers * ((dropout(d_weights, rate, key) - mean) * share)
    if capped is not None:
        d_wide = d_wide * (1.0 - jnp.square(capped))
    d_bias = None
    if rows is not None:
        d_bias = d_wide if rows.shape[0] == d_wide.shape[0] else jnp.sum(d_wide, 0, keepdims=True)
    d_scores = d_wide.astype(q.dtype)
    dq = jnp.einsum("bjns,bjsk->bjnk", d_scores, k)
    # The narrow operand first, as in linear.py.
    dk = jnp.einsum("bjnk,bjns->bjks", q, d_scores).swapaxes(2, 3)
    dropped = dropout(powers, rate, key).astype(v.dtype)
    dv = jnp.einsum("bjne,bjns->bjes", (wide * share).astype(v.dtype), dropped).swapaxes(2, 3)
    return dq, dk, dv, d_bias, None, None


_attend.defvjp(_attend_forward, _attend_backward)
