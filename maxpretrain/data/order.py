"""The order of the data as pure functions: nothing is stored, nothing is reached by counting up.

Three ingredients, all of them integer arithmetic on uint64, so that every machine and every version of numpy agrees:

* `hash_words`: words (seed, source, epoch, …) to 64 random-looking bits;
* `permute`: a keyed bijection of [0, size) that is computed for one index alone (a Feistel network);
* `Mixture`: which source a global row comes from, and which example of that source it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from maxpretrain.errors import UserError

BLOCK = 1024  # global rows that are mixed, and planned, together; part of the order: changing it changes every mixture
ROUNDS = 12  # of the Feistel network; part of the order (with 8, some permutations of 5 or 6 things come too often)

# First word of a hash: uses of one seed never share their bits.
ORDER, PHASE, MIX, EXAMPLE, PARTNER = 1, 2, 3, 4, 5

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _1 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(1)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Stafford's variant 13): a bijection of 64 bits in which each bit depends on every bit."""
    x = (x ^ (x >> _30)) * _MULTIPLY_1
    x = (x ^ (x >> _27)) * _MULTIPLY_2
    return x ^ (x >> _31)


def _uint64(x: int | np.ndarray) -> np.ndarray:
    # At least 1-D: numpy warns of overflow in scalars, where wrapping around is what is meant here.
    return np.atleast_1d(np.asarray(x)).astype(np.uint64)


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """64 bits from a sequence of words.

    Args:
        words: integers or integer arrays [N], each at least 0; at least one of them.

    Returns:
        uint64 [N], or [1] where no word is an array.
    """
    bits = np.zeros(1, np.uint64)
    for word in words:
        bits = _mix((bits ^ _uint64(word)) + _GOLDEN)
    return bits


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The image of `index` under a permutation of [0, size) chosen by `key`.

    A Feistel network over pairs (left, right) in [0, a) × [0, b), a·b being the least near-square product that holds
    `size`, with modular addition; images outside [0, size) go through it again until they are inside ("cycle
    walking"), which keeps it a bijection. At most √size pairs are outside, so this is rare.

    Args:
        index: integer [N], in [0, size).
        size: at least 1, below 2**62.
        key: uint64 [N] or [1].

    Returns:
        int64 [N].

    Reference:
        J. Black and P. Rogaway, 2002, "Ciphers with Arbitrary Finite Domains", section "generalized Feistel". Not
        cryptographic here: the rounds use the mixer of splitmix64.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    key = np.broadcast_to(key, index.shape)
    out = _feistel(_uint64(index), a, b, key)
    outside = np.flatnonzero(out >= size)
    while len(outside):
        out[outside] = _feistel(out[outside], a, b, key[outside])
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _feistel(index: np.ndarray, a: int, b: int, key: np.ndarray) -> np.ndarray:
    a, b = np.uint64(a), np.uint64(b)
    left, right = index // b, index % b
    for _ in range(ROUNDS // 2):
        # The mixed bits are shifted so that the sum cannot wrap around, which would not be an addition modulo a.
        key = _mix(key + _GOLDEN)
        left = (left + (_mix(right ^ key) >> _1)) % a
        key = _mix(key + _GOLDEN)
        right = (right + (_mix(left ^ key) >> _1)) % b
    return left * b + right


class Mixture:
    """Which source each global row comes from: a pure function of (weights, seed, row).

    Rows go in blocks of `BLOCK`. By the end of every block each source has had its exact share of all rows so far,
    to within two rows, however many rows and however small a share. Inside a block the sources are in an order drawn
    from the seed. Each source's own examples are taken in turn: 0, 1, 2, ….

    Args:
        weights: one positive number a source, in any unit.
        seed: of the order inside the blocks.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
            raise UserError(
                f"mixture weights {tuple(weights)} must all be above 0 and finite; leave a source out instead"
            )
        self.seed = seed
        # As integers of one unit: a share is then computed without rounding errors, at any number of rows.
        exact = [Fraction(w) for w in weights]
        unit = math.lcm(*(w.denominator for w in exact))
        self._weights = [int(w * unit) for w in exact]
        self._heaviest_first = sorted(range(len(exact)), key=lambda i: (-exact[i], i))

    def counts(self, rows: int) -> list[int]:
        """Rows of each source among the first `rows`, a multiple of BLOCK."""
        counts = [0] * len(self._weights)
        left, weight = rows, sum(self._weights)
        for i in self._heaviest_first:
            own = self._weights[i]
            # Each takes its share, to the nearest row, of what those before it left: so every count only rises with
            # `rows`, and they add up. Heaviest first keeps what the roundings pile up below two rows.
            counts[i] = (2 * left * own + weight) // (2 * weight)
            left, weight = left - counts[i], weight - own
        return counts

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows number·BLOCK to (number + 1)·BLOCK − 1.

        Returns:
            source: int64 [BLOCK].
            index: int64 [BLOCK], which of that source's examples, counted over all epochs.
        """
        before, after = self.counts(number * BLOCK), self.counts((number + 1) * BLOCK)
        here = [b - a for a, b in zip(before, after, strict=True)]
        if len(here) == 1:
            return np.zeros(BLOCK, np.int64), np.arange(before[0], after[0])
        place = permute(np.arange(BLOCK), BLOCK, hash_words(MIX, self.seed, number))
        source = np.repeat(np.arange(len(here)), here)[place]
        index = np.empty(BLOCK, np.int64)
        for i, first in enumerate(before):
            index[source == i] = np.arange(first, first + here[i])
        return source, index
