"""The order of the data: bijections, exact shares, and values that must never change."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from maxpretrain.data.order import BLOCK, MIX, ORDER, Mixture, hash_words, permute
from maxpretrain.errors import UserError


def order(size: int, *words: int) -> list[int]:
    return permute(np.arange(size), size, hash_words(*words)).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_permutation_is_a_bijection(size, key):
    assert sorted(order(size, key)) == list(range(size))


@pytest.mark.parametrize("size", [7, 64, 1000, 4097])
def test_each_epoch_seed_and_source_has_its_own_order(size):
    words = [(ORDER, seed, source, epoch) for seed in (0, 1) for source in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order(size, *w)) for w in words}) == 12


def test_one_index_alone_gets_what_it_gets_among_all():
    whole = order(1000, 3)
    assert [int(permute(np.array([i]), 1000, hash_words(3))[0]) for i in (0, 17, 999)] == [
        whole[0],
        whole[17],
        whole[999],
    ]


def test_a_key_per_index():
    keys = hash_words(5, np.array([0, 1, 2]))
    assert permute(np.array([4, 4, 4]), 100, keys).tolist() == [order(100, 5, e)[4] for e in (0, 1, 2)]


def test_sizes_far_beyond_memory():
    size = 10**15 + 37
    out = permute(np.arange(0, size, size // 1000), size, hash_words(1))
    assert out.min() >= 0
    assert out.max() < size
    assert len(set(out.tolist())) == len(out)


def test_every_permutation_of_five_is_as_likely():
    counts = Counter(tuple(order(5, 1, k)) for k in range(2400))
    chi2 = sum((c - 20) ** 2 / 20 for c in counts.values()) + 20 * (120 - len(counts))
    assert chi2 < 180.8  # the 0.9998 quantile at 119 degrees of freedom


def test_no_warning_about_wrapping_integers():
    with np.errstate(over="raise"):
        assert hash_words(2**64 - 1, 0).dtype == np.uint64
        assert sorted(order(10, 2**64 - 1)) == list(range(10))


def test_golden_values():
    """These pin the order of every run ever started: a change here breaks exact resume across versions."""
    assert hash_words(0).tolist() == [0xE220A8397B1DCDAF]  # the published first output of splitmix64 from seed 0
    assert hash_words(1, 2, 3).tolist() == [15020427595393229491]
    assert order(10, 0) == [4, 0, 7, 6, 9, 8, 5, 3, 1, 2]
    assert order(7, ORDER, 1337, 0, 2) == [4, 0, 1, 3, 6, 2, 5]
    assert permute(np.array([0, 1, 2]), 10**9, hash_words(ORDER, 0, 0, 0)).tolist() == [620419527, 649319623, 310924009]
    source, index = Mixture((0.5, 0.25, 0.25), seed=0).block(1)
    assert source[:12].tolist() == [0, 1, 1, 0, 2, 1, 1, 1, 0, 0, 0, 0]
    assert index[:12].tolist() == [512, 256, 257, 513, 256, 258, 259, 260, 514, 515, 516, 517]
    assert BLOCK == 1024
    assert MIX == 3


def test_mixture_counts_are_exact_in_every_block():
    mixture = Mixture((2.0, 1.0, 1.0), seed=5)
    for number in (0, 1, 7, 1000):
        source, index = mixture.block(number)
        assert np.bincount(source).tolist() == [512, 256, 256]
        assert index[source == 0].tolist() == list(range(512 * number, 512 * (number + 1)))
        assert index[source == 2].tolist() == list(range(256 * number, 256 * (number + 1)))


def test_mixture_counts_do_not_drift():
    mixture = Mixture((0.7, 0.2, 0.1), seed=0)
    assert [np.bincount(mixture.block(n)[0]).tolist() for n in (0, 1, 2)] == [
        [717, 205, 102],
        [717, 204, 103],
        [716, 206, 102],
    ]
    assert mixture.counts(1024 * 10**9) == [716_800_000_000, 204_800_000_000, 102_400_000_000]


def test_a_tiny_share_still_gets_its_rows():
    mixture = Mixture((1.0, 1e-6), seed=0)
    assert mixture.counts(1024)[1] == 0
    assert mixture.counts(1024 * 1_000_000)[1] == 1024


def test_mixture_counts_rise_and_stay_within_two_rows_of_the_share():
    weights = [1.0] * 11 + [0.3, 1e-3, 17.0]
    mixture, total = Mixture(weights, seed=0), math.fsum(weights)
    before = [0] * 14
    for number in range(1, 300):
        counts = mixture.counts(number * BLOCK)
        assert sum(counts) == number * BLOCK
        assert all(a <= b for a, b in zip(before, counts, strict=True))
        assert max(abs(c - number * BLOCK * w / total) for c, w in zip(counts, weights, strict=True)) < 2
        before = counts


def test_order_inside_a_block_comes_from_the_seed():
    blocks = [Mixture((1, 1), seed).block(0)[0].tolist() for seed in (0, 1)] + [Mixture((1, 1), 0).block(1)[0].tolist()]
    assert blocks[0] != blocks[1] != blocks[2] != blocks[0]
    # Mixed throughout: no long run of one source, about half of each among the first 100 rows.
    assert 35 <= sum(blocks[0][:100]) <= 65


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.inf,)])
def test_weights_must_be_positive(weights):
    with pytest.raises(UserError, match="above 0"):
        Mixture(weights, 0)
