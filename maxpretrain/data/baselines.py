"""What counting alone achieves: unigram and bigram models of the training tokens, measured on the validation tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maxpretrain.data.store import Store

_TRAIN_TOKENS = 4_000_000  # enough for counts of a small vocabulary, and for a second's work
_VALIDATION_TOKENS = 1_000_000
_SMOOTHING = 0.1  # added to each unigram count


def baselines(train: Sequence[Store], validation: Sequence[Store], vocab_size: int) -> dict[str, float]:
    """Bits per UTF-8 byte of the validation text under two models estimated on (at most 4M tokens of) the training text.

    Unigram: (c(w) + 0.1) / (N + 0.1·V). Bigram: absolute discounting, interpolated with that unigram,
    p(w|h) = max(c(h,w) − d, 0)/c(h) + d·n(h)/c(h)·p(w), n(h) = distinct followers of h, d = n₁/(n₁ + 2n₂) by the number
    of pairs seen once and twice.

    Returns:
        unigram_bits_per_byte, bigram_bits_per_byte.

    Reference: Ney, Essen & Kneser, 1994, "On structuring probabilistic dependences in stochastic language modelling".
    """
    known, _ = _tokens(train, _TRAIN_TOKENS)
    measured, num_bytes = _tokens(validation, _VALIDATION_TOKENS)
    unigram = np.bincount(known, minlength=vocab_size) + _SMOOTHING
    unigram /= unigram.sum()
    single = unigram[measured]
    pair = _bigram(known, measured, single, vocab_size)
    scale = -1 / (math.log(2) * max(1.0, num_bytes))
    return {
        "unigram_bits_per_byte": float(np.log(single).sum() * scale),
        # The first token has none before it.
        "bigram_bits_per_byte": float((np.log(single[:1]).sum() + np.log(pair).sum()) * scale),
    }


def _bigram(known: np.ndarray, measured: np.ndarray, single: np.ndarray, vocab_size: int) -> np.ndarray:
    """float64 [len(measured) - 1]: probability of each measured token after the one before it."""
    pairs, counts = np.unique(known[:-1].astype(np.int64) * vocab_size + known[1:], return_counts=True)
    if not len(pairs):
        return single[1:]
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = min(max(once / max(1, once + 2 * twice), 0.05), 0.95)
    heads = pairs // vocab_size
    total = np.bincount(heads, weights=counts, minlength=vocab_size)
    followers = np.bincount(heads, minlength=vocab_size)
    before = measured[:-1].astype(np.int64)
    wanted = before * vocab_size + measured[1:]
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at] - discount, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = (seen + discount * followers[before] * single[1:]) / total[before]
    return np.where(total[before] > 0, mixed, single[1:])


def _tokens(stores: Sequence[Store], limit: int) -> tuple[np.ndarray, float]:
    """int32 tokens from the beginning of each store, in proportion to its size, and the bytes of text they stand for."""
    total = sum(s.num_tokens for s in stores)
    parts, num_bytes = [np.zeros(0, np.int32)], 0.0
    for store in stores:
        length = store.num_tokens if total <= limit else store.num_tokens * limit // total
        parts.append(store.read(0, length))
        num_bytes += store.num_bytes * length / max(1, store.num_tokens)
    return np.concatenate(parts), num_bytes
