"""Positions as a function of the distance between query and key: T5's bias and DeBERTa's disentangled attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.mesh import constrain
from maxpretrain.modelconfig import RelativeConfig
from maxpretrain.nn.base import Initializer, Module, param
from maxpretrain.nn.norm import LayerNorm

# Queries that are scored against the same rows of positions. Fewer waste less of the product (T + S − 1 columns for S keys),
# more make larger products; 128 is what the matrix units of TPUs take, and was fastest of 64, 128, 256 on a CPU.
_BLOCK = 128


def t5_bucket(relative: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """T5's buckets of distances: the first half one a distance, the rest evenly spaced in its logarithm.

    Args:
        relative: int32, key − query, any shape.
        bidirectional: half of the buckets for keys after the query; else these all share bucket 0.

    Returns:
        int32 of that shape, in [0, buckets).

    Reference: Raffel et al. 2020, arXiv:1910.10683, §2.1, and Mesh TensorFlow's code.
    """
    side = buckets // 2 if bidirectional else buckets
    # Compared with whole numbers rather than by a logarithm on the device, whose last bit would decide at the borders.
    borders = jnp.asarray(_t5_borders(side, max_distance), jnp.int32)
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    bucket = jnp.searchsorted(borders, distance, side="right", method="compare_all").astype(jnp.int32)
    return bucket + side * (relative > 0).astype(jnp.int32) if bidirectional else bucket


def _t5_borders(side: int, max_distance: int) -> np.ndarray:
    """Smallest distance in each of the buckets 1 … side − 1."""
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"relative.buckets gives {exact} buckets of one distance; it must give at least 1, and relative.max_distance "
            f"{max_distance} must be beyond them"
        )
    steps = np.arange(1, side - exact) / (side - exact)
    # Where a border is a whole number, a distance on it belongs above; the power may come out a hair too large.
    logarithmic = np.ceil(exact * (max_distance / exact) ** steps - 1e-9)
    return np.concatenate([np.arange(1, exact + 1), logarithmic]).astype(np.int32)


class T5Bias(Module):
    """A learned number for each bucket and head, added to attention scores."""

    def __init__(self, num_heads: int, relative: RelativeConfig, initializer: Initializer, *, bidirectional: bool):
        self.table = param((relative.buckets, num_heads), (None, "heads"), initializer, "position")
        self.relative = relative
        self.bidirectional = bidirectional

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """int32 [B or 1, T] and [B or 1, S] -> float32 [B or 1, H, T, S], looked up one by one: for decoding."""
        buckets = self._bucket(key_positions[:, None, :] - query_positions[:, :, None])
        return jnp.take(self.table[...].T, buckets, axis=1).swapaxes(0, 1)

    def by_rows(self, queries: int, keys: int) -> jax.Array:
        """As a call with positions 0 … T−1 and 0 … S−1: float32 [1, H, T, S].

        Looks up one number for each distance rather than each pair: TPUs gather slowly, and scatter the gradient slower.
        """
        values = self.table[...][self._bucket(jnp.arange(1 - queries, keys, dtype=jnp.int32))].T
        return _skew(jnp.broadcast_to(values[:, None, :], (values.shape[0], queries, values.shape[1])))[None]

    def _bucket(self, relative: jax.Array) -> jax.Array:
        rule = self.relative
        return t5_bucket(
            relative, bidirectional=self.bidirectional, buckets=rule.buckets, max_distance=rule.max_distance
        )


def _skew(x: jax.Array) -> jax.Array:
    """Moves row n of the last two axes N − 1 − n to the left: [..., N, N + M − 1] -> [..., N, M].

    If the columns stand for distances m − n from 1 − N up, the result has row n and column m at their distance. By flattening:
    rows one longer than they are read as advance by one each.

    Reference: the shift of Dai et al. 2019, arXiv:1901.02860, appendix B.
    """
    *outer, n, width = x.shape
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*outer, n * (width + 1))
    return flat[..., n - 1 : n - 1 + n * width].reshape(*outer, n, width)[..., : width - n + 1]


def deberta_bucket(relative: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """DeBERTa's buckets of distances: one a distance up to buckets/2, then evenly spaced in the logarithm up to max_distance.

    Args:
        relative: query − key, any shape.
        buckets: 0 or less: the distance itself.

    Returns:
        int32 of that shape, of the sign of `relative`; max_distance − 1 has bucket buckets − 1, and beyond it they go on.

    Reference: version 2 in the authors' code (microsoft/DeBERTa); He et al. 2021, arXiv:2006.03654, has no buckets.
    """
    if buckets <= 0:
        return relative.astype(np.int32)
    exact = buckets // 2
    if exact < 1 or max_distance - 1 <= exact:
        raise ValueError(
            f"relative.buckets {buckets} must be at least 2, and relative.max_distance {max_distance} above half of it + 1"
        )
    # In float32 like the published code: its roundings decide to which side of a border a distance falls.
    logarithm = lambda x: np.float32(np.log(np.asarray(x, np.float32).astype(np.float64)))  # noqa: E731
    ratio = np.maximum(np.abs(relative), exact).astype(np.float32) / np.float32(exact)
    steps = logarithm(ratio) / logarithm((max_distance - 1) / exact) * np.float32(exact - 1)
    beyond = np.sign(relative) * (np.ceil(steps).astype(np.int64) + exact)
    return np.where(np.abs(relative) <= exact, relative, beyond).astype(np.int32)


def span(relative: RelativeConfig) -> int:
    """Half the rows of the relative table."""
    return relative.buckets if relative.buckets > 0 else relative.max_distance


def disentangled_index(queries: int, keys: int, relative: RelativeConfig) -> np.ndarray:
    """Row of the relative table for each distance δ = clamp(bucket(i − j) + span, 0, 2·span − 1).

    Returns:
        int32 [T + S − 1]: of query − key = 1 − S … T − 1. Pair (i, j) has entry i − j + S − 1.
    """
    bucket = deberta_bucket(np.arange(1 - keys, queries), relative.buckets, relative.max_distance)
    return np.clip(bucket + span(relative), 0, 2 * span(relative) - 1)


class Disentangled(Module):
    """The table of relative positions [2·span, D] that all layers of a DeBERTa project to queries and keys."""

    def __init__(self, dim: int, relative: RelativeConfig, eps: float, initializer: Initializer, *, bias: bool = True):
        """
        Args:
            eps, bias: of the LayerNorm, where `relative.norm` asks for it.
        """
        self.table = param((2 * span(relative), dim), ("position", "embed"), initializer, "position")
        self.norm = LayerNorm(dim, eps, bias=bias) if relative.norm else None

    def __call__(self, dtype: jnp.dtype) -> jax.Array:
        """The normalized table [2·span, D] in `dtype`."""
        table = constrain(self.table[...], "position", None)
        return (table if self.norm is None else self.norm(table)).astype(dtype)


def disentangled_scale(width: int, terms: tuple[str, ...]) -> float:
    """1/√(K·(1 + number of terms)), which multiplies content scores and terms alike."""
    return 1.0 / math.sqrt(width * (1 + len(terms)))


def disentangled_scores(
    q: jax.Array, k: jax.Array, r_q: jax.Array | None, r_k: jax.Array | None, index: np.ndarray, scale: float
) -> jax.Array:
    """What disentangled attention adds to the content scores scale·q_i·k_j: scale·(q_i·r_k[δ(i,j)] + k_j·r_q[δ(i,j)]).

    The scale is applied here: `q` and `k` are to be given as projected, before a scale of their own.

    Args:
        q: [B, T, H, K] content queries.
        k: [B, S, H, K] content keys.
        r_q: [2·span, H, K] the table by the query projection (the content's own with its bias, or the positions'); None: no
            term position to content ("p2c").
        r_k: the same by the key projection; None: no term content to position ("c2p").
        index: from `disentangled_index`. Distances are of rows: within a packed document they are those of the document.
        scale: from `disentangled_scale`.

    Returns:
        float32 [B, H, T, S].

    Reference: He et al. 2021, arXiv:2006.03654, §3.1. The paper writes δ(j,i) in the second term; the published code uses
        δ(i,j) in both, and so do we.
    """
    scores = None
    if r_k is not None:
        scores = _by_distance(q, r_k * jnp.asarray(scale, r_k.dtype), index[::-1])
    if r_q is not None:
        p2c = _by_distance(k, r_q * jnp.asarray(scale, r_q.dtype), index).swapaxes(2, 3)
        scores = p2c if scores is None else scores + p2c
    if scores is None:
        raise ValueError("disentangled attention without a term; give r_k, r_q or both")
    return scores


def _by_distance(x: jax.Array, table: jax.Array, index: np.ndarray) -> jax.Array:
    """x_n·table[index[m − n + N − 1]]: [B, N, H, K] and [R, H, K] -> float32 [B, H, N, M], for an index of N + M − 1 entries.

    The product is taken with a row for each distance and then skewed. Taking it with the table and gathering [N, M] numbers
    out of it is the obvious way, but TPUs gather numbers slowly, and the gradient is a scatter, slow on a CPU too (measured
    there at N = M = 512: forward 67 ms against 51, backward 98 against 153).
    """
    b, n, h, width = x.shape
    block = _BLOCK if n % _BLOCK == 0 else n
    # The last rows begin at the index's front.
    entries = np.arange(len(index) - n + block)[None, :] + np.arange(n - block, -1, -block)[:, None]
    rows = table[index[entries]]
    blocks = x.reshape(b, n // block, block, h, width)
    products = jnp.einsum("bcnhk,cmhk->bhcnm", blocks, rows, preferred_element_type=jnp.float32)
    return _skew(products).reshape(b, h, n, -1)
