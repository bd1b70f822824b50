"""Unigram and bigram models against a count by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from maxpretrain.data.baselines import baselines
from maxpretrain.data.store import StoreWriter


def store(path, ids, num_bytes, vocab_size=4):
    with StoreWriter(path, vocab_size=vocab_size, tokenizer_fingerprint="t") as writer:
        writer.add(np.asarray(ids), num_bytes)
    from maxpretrain.data.store import Store

    return Store.open(path)


def test_counts_by_hand(tmp_path):
    # Pairs: 01 ×3, 10 ×2, 12 ×1, 20 ×1. Seen once: 2, twice: 1, so d = 2 / (2 + 2·1) = 0.5.
    train = store(tmp_path / "t", [0, 1, 0, 1, 2, 0, 1, 0], 8)
    validation = store(tmp_path / "v", [0, 1, 3], 6)
    found = baselines([train], [validation], 4)
    p0, p1, p3 = 4.1 / 8.4, 3.1 / 8.4, 0.1 / 8.4
    assert found["unigram_bits_per_byte"] == pytest.approx(-math.log2(p0 * p1 * p3) / 6, rel=1e-12)
    p01 = (3 - 0.5) / 3 + 0.5 * 1 / 3 * p1
    p13 = 0 + 0.5 * 2 / 3 * p3
    assert found["bigram_bits_per_byte"] == pytest.approx(-math.log2(p0 * p01 * p13) / 6, rel=1e-12)
    assert found["unigram_bits_per_byte"] == pytest.approx(1.477534, abs=1e-6)
    assert found["bigram_bits_per_byte"] == pytest.approx(1.528724, abs=1e-6)


def test_probabilities_after_any_token_add_to_one(tmp_path):
    rng = np.random.default_rng(0)
    train = store(tmp_path / "t", rng.integers(0, 7, 200), 200, 9)
    total = np.zeros(9)
    for before in range(9):  # 7 and 8 never seen
        for after in range(9):
            v = store(tmp_path / f"v{before}{after}", [before, after], 1, 9)
            b, alone = (
                baselines([train], [v], 9),
                baselines([train], [store(tmp_path / f"u{before}{after}", [before], 1, 9)], 9),
            )
            total[before] += 2 ** -(b["bigram_bits_per_byte"] - alone["bigram_bits_per_byte"])
    assert total == pytest.approx(np.ones(9), rel=1e-9)


def test_deterministic_sequence_costs_a_bigram_almost_nothing(tmp_path):
    ids = np.tile(np.arange(50), 200)
    found = baselines([store(tmp_path / "t", ids, len(ids), 50)], [store(tmp_path / "v", ids[:1000], 1000, 50)], 50)
    assert found["unigram_bits_per_byte"] == pytest.approx(math.log2(50), rel=1e-4)
    assert found["bigram_bits_per_byte"] < 0.02


def test_several_stores_and_speed(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, 2_000_000), 4095)
    train = [store(tmp_path / f"t{i}", ids, len(ids) * 4, 4096) for i in range(3)]  # 6M tokens: only 4M are counted
    validation = [store(tmp_path / "v", ids[:100_000], 400_000, 4096)]
    started = time.process_time()
    found = baselines(train, validation, 4096)
    assert time.process_time() - started < 2.0
    assert 1.0 < found["bigram_bits_per_byte"] <= found["unigram_bits_per_byte"] < 3.0


def test_one_token(tmp_path):
    one = store(tmp_path / "a", [0], 1)
    assert baselines([one], [one], 4) == {
        "unigram_bits_per_byte": pytest.approx(-math.log2(1.1 / 1.4)),
        "bigram_bits_per_byte": pytest.approx(0.347923, abs=1e-6),
    }
