"""What may be drawn, against distributions computed by hand, and what is drawn."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from maxpretrain.errors import UserError
from maxpretrain.sampling import NOT_FINITE, draw, filtered, settings

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)
LOGITS = np.log(PROBABILITIES)[None]


def distribution(top_k=None, top_p=None, temperature=1.0):
    _, sampling = settings(5, temperature, top_k, top_p, 0)
    kept = filtered(LOGITS / sampling.temperature, sampling.top_k, sampling.top_p)
    return np.asarray(jax.nn.softmax(kept, axis=-1))[0]


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "expected"),
    [
        (None, None, 1.0, [0.1, 0.4, 0.05, 0.25, 0.2]),
        (2, None, 1.0, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (9, None, 1.0, [0.1, 0.4, 0.05, 0.25, 0.2]),
        (None, 0.3, 1.0, [0, 1, 0, 0, 0]),  # the likeliest stays, whatever its probability
        (None, 0.6, 1.0, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.4 is not enough, 0.65 is
        (None, 0.66, 1.0, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        # Of the three likeliest the first two have 0.65 / 0.85 = 0.765 of what top-k leaves: enough for 0.76, not for 0.77.
        (3, 0.76, 1.0, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (3, 0.77, 1.0, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        # Temperature comes first: at ½ probabilities go as their squares, 0.16 : 0.0625 : 0.04 : 0.01 : 0.0025 of 0.275.
        (None, 0.8, 0.5, [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
        (1, None, 3.0, [0, 1, 0, 0, 0]),
    ],
)
def test_distributions(top_k, top_p, temperature, expected):
    np.testing.assert_allclose(distribution(top_k, top_p, temperature), expected, atol=1e-6)


def test_top_p_of_one_keeps_the_tail_that_rounding_would_lose():
    logits = np.array([[20.0, 0.0, -10.0]], np.float32)
    assert np.isfinite(filtered(logits, np.int32(3), np.float32(1.0))).all()


def test_rows_are_filtered_apart():
    kept = filtered(np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).astype(np.float32), np.int32(1), np.float32(1))
    assert np.isfinite(kept).tolist() == [[True, False, False], [False, False, True]]


def drawn(count=20_000, top_k=None, top_p=None, temperature=1.0, seed=0, first=0):
    mode, sampling = settings(5, temperature, top_k, top_p, seed)
    logits = np.broadcast_to(LOGITS, (count, 5))
    return np.asarray(jax.jit(draw, static_argnums=3)(logits, np.full(count, first, np.int32), sampling, mode))


def test_frequencies_of_20000_draws():
    counts = np.bincount(drawn(), minlength=5) / 20_000
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.012)  # 3.5 standard deviations
    counts = np.bincount(drawn(top_k=2), minlength=5) / 20_000
    np.testing.assert_allclose(counts, [0, 0.615385, 0, 0.384615, 0], atol=0.012)


def test_what_a_row_draws_depends_on_seed_row_and_number_alone():
    texts = drawn()
    assert texts[:7].tolist() == drawn(7).tolist()
    for other in (drawn(seed=1), drawn(first=1)):  # independent ones agree with probability Σ p² = 0.275
        assert np.mean(texts == other) == pytest.approx(0.275, abs=0.012)
    assert np.array_equal(texts[texts != 2], drawn(top_k=4)[texts != 2])  # a filter changes only what it forbids


def test_temperature_zero_takes_the_likeliest():
    assert settings(5, 0.0, 3, 0.5, 0)[0] == "greedy"
    for temperature in (0.0, 1e-4, 1e-30):
        assert drawn(7, temperature=temperature).tolist() == [1] * 7


@pytest.mark.parametrize("mode", ["greedy", "sample", "filter"])
def test_logits_that_are_no_numbers_are_reported(mode):
    logits = np.array([[0, 1, 2], [0, np.nan, 1], [0, np.inf, 1]], np.float32)
    found = draw(logits, np.zeros(3, np.int32), settings(3, 1.0, None, None, 0)[1], mode)
    assert np.asarray(found)[1:].tolist() == [NOT_FINITE, NOT_FINITE]
    assert int(found[0]) in (0, 1, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or None for all tokens"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(UserError, match=message):
        settings(5, **({"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0} | wrong))
