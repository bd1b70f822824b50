"""Every schedule at named steps, at its boundaries, in each of its pieces, and under jit.

`at(config, t)` is the factor at time t, that is of update number t − 1: the t of the published formulas.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import ScheduleConfig
from maxpretrain.errors import UserError
from maxpretrain.optim import schedule


def at(config, t, *, peak=1.0, steps=100, tokens_per_step=10):
    """The rate at times t, computed three ways that must agree: Python int, numpy array, jit."""
    rate = schedule(config, peak_lr=peak, steps=steps, tokens_per_step=tokens_per_step)
    times = np.atleast_1d(np.asarray(t, np.int64))
    drawn = rate(times - 1)
    assert drawn.dtype == np.float32
    assert drawn.shape == times.shape
    one = [rate(int(n) - 1) for n in times]
    assert all(isinstance(x, np.float32) for x in one)
    np.testing.assert_array_equal(one, drawn)
    compiled = jax.jit(rate)(jnp.asarray(times - 1, jnp.int32))
    assert compiled.dtype == jnp.float32
    np.testing.assert_allclose(compiled, drawn, rtol=2e-6, atol=1e-7 * peak)
    scalar = jax.jit(rate)(jnp.asarray(int(times[0]) - 1, jnp.int32))
    assert scalar.shape == ()
    return drawn


def check(config, expected, **run):
    """`expected`: time -> literal value."""
    np.testing.assert_allclose(at(config, list(expected), **run), list(expected.values()), rtol=1e-6, atol=1e-9)


def test_warmup_rises_from_its_floor_to_exactly_the_peak():
    config = ScheduleConfig(shape="constant", warmup=10, warmup_from=0.0)
    check(config, {1: 0.1, 5: 0.5, 9: 0.9, 10: 1.0, 11: 1.0, 100: 1.0})
    assert at(config, 10)[0] == 1.0
    check(ScheduleConfig(shape="constant", warmup=10, warmup_from=0.2), {1: 0.28, 5: 0.6, 10: 1.0, 11: 1.0})


def test_first_update_is_not_wasted():
    assert schedule(ScheduleConfig(warmup=100), peak_lr=1e-3, steps=1000, tokens_per_step=1)(0) == np.float32(1e-5)


def test_no_warmup_and_nothing_but_warmup():
    check(ScheduleConfig(shape="linear", warmup=0, final=0.0), {1: 0.99, 50: 0.5, 100: 0.0})
    check(ScheduleConfig(shape="cosine", warmup=100), {1: 0.01, 99: 0.99, 100: 1.0, 101: 0.1})
    check(ScheduleConfig(shape="wsd", warmup=100), {1: 0.01, 100: 1.0})


def test_constant():
    check(ScheduleConfig(shape="constant", warmup=0, final=0.1), {1: 1.0, 100: 1.0, 1000: 1.0})


def test_linear():
    config = ScheduleConfig(shape="linear", warmup=20, final=0.1)
    check(config, {20: 1.0, 21: 0.98875, 40: 0.775, 60: 0.55, 99: 0.11125, 100: 0.1, 101: 0.1, 500: 0.1})


def test_cosine_is_the_specified_formula():
    # η_min + ½(η_peak − η_min)(1 + cos(π(t − W)/(T − W))), with peak 1e-3, minimum 1e-4, W = 100, T = 2000
    config = ScheduleConfig(shape="cosine", warmup=100, final=0.1)
    expected = {
        1: 1e-5,
        50: 5e-4,
        100: 1e-3,
        101: 9.9999938e-4,
        575: 8.6819805e-4,
        1050: 5.5e-4,
        1525: 2.3180195e-4,
        2000: 1e-4,
        2001: 1e-4,
    }
    check(config, expected, peak=1e-3, steps=2000)
    rate = schedule(config, peak_lr=1e-3, steps=2000, tokens_per_step=1)
    assert rate(99) == np.float32(1e-3)
    assert rate(1999) == np.float32(1e-4)


def test_polynomial():
    check(
        ScheduleConfig(shape="polynomial", warmup=0, final=0.2, power=2.0),
        {25: 0.65, 50: 0.4, 75: 0.25, 100: 0.2, 101: 0.2},
    )
    check(ScheduleConfig(shape="polynomial", warmup=0, final=0.0, power=0.5), {19: 0.9, 75: 0.5, 99: 0.1, 100: 0.0})


def test_inverse_sqrt_is_noam():
    # Vaswani et al.: D^-0.5 · min(t^-0.5, t · 4000^-1.5) with D = 512; its peak is (512 · 4000)^-0.5
    config = ScheduleConfig(shape="inverse_sqrt", warmup=4000, final=0.1)
    expected = {
        1: 1.7469282e-7,
        2000: 3.4938563e-4,
        4000: 6.9877124e-4,
        4001: 6.9868391e-4,
        16000: 3.4938562e-4,
        100000: 1.3975425e-4,
    }
    check(config, expected, peak=(512 * 4000) ** -0.5, steps=100_000)
    check(ScheduleConfig(shape="inverse_sqrt", warmup=0), {1: 1.0, 4: 0.5, 25: 0.2, 100: 0.1})


def test_exponential_multiplies_by_rate_over_the_run():
    check(ScheduleConfig(shape="exponential", warmup=0, rate=0.01), {25: 0.31622777, 50: 0.1, 100: 0.01, 101: 0.01})
    check(ScheduleConfig(shape="exponential", warmup=20, rate=0.01), {20: 1.0, 60: 0.1, 100: 0.01})


def test_step_reaches_every_piece():
    config = ScheduleConfig(shape="step", warmup=10, boundaries=(30, 60, 90), rate=0.5)
    check(config, {10: 1.0, 11: 1.0, 30: 1.0, 31: 0.5, 60: 0.5, 61: 0.25, 90: 0.25, 91: 0.125, 100: 0.125})
    check(ScheduleConfig(shape="step", warmup=10, boundaries=(10,), rate=0.1), {9: 0.9, 10: 1.0, 11: 0.1})


def test_wsd_reaches_every_piece():
    config = ScheduleConfig(shape="wsd", warmup=10, decay=40, final=0.0)
    check(config, {1: 0.1, 10: 1.0, 11: 1.0, 60: 1.0, 61: 0.975, 70: 0.75, 80: 0.5, 99: 0.025, 100: 0.0, 101: 0.0})
    config = ScheduleConfig(shape="wsd", warmup=10, decay=40, decay_shape="sqrt", final=0.0)
    check(config, {60: 1.0, 61: 0.84188612, 70: 0.5, 80: 0.29289322, 99: 0.012579117, 100: 0.0})
    config = ScheduleConfig(shape="wsd", warmup=10, decay=40, decay_shape="sqrt", final=0.2)
    check(config, {60: 1.0, 70: 0.6, 100: 0.2})


def test_wsd_decays_over_a_fifth_of_the_run_by_default():
    check(ScheduleConfig(shape="wsd", warmup=0, final=0.0), {80: 1.0, 81: 0.95, 90: 0.5, 100: 0.0})
    check(ScheduleConfig(shape="wsd", warmup=90, final=0.0), {89: 89 / 90, 90: 1.0, 91: 0.9, 100: 0.0})


def test_cosine_cycles_restart_and_end_at_the_bottom():
    config = ScheduleConfig(shape="cosine_cycles", warmup=20, cycle=20, final=0.1)
    top = 0.99446048  # one step of twenty after a restart
    check(
        config,
        {
            10: 0.5,
            20: 1.0,
            21: top,
            30: 0.55,
            39: 0.10554025,
            40: 0.1,
            41: top,
            50: 0.55,
            60: 0.1,
            61: top,
            80: 0.1,
            81: top,
            100: 0.1,
        },
    )
    # by default four cycles share what the warmup leaves
    np.testing.assert_array_equal(
        at(ScheduleConfig(shape="cosine_cycles", warmup=20, final=0.1), np.arange(1, 101)),
        at(config, np.arange(1, 101)),
    )


def test_tokens_are_the_same_schedule_as_steps():
    by_steps = {
        "cosine": ScheduleConfig(shape="cosine", warmup=10),
        "wsd": ScheduleConfig(shape="wsd", warmup=10, decay=30),
        "step": ScheduleConfig(shape="step", warmup=10, boundaries=(20, 50)),
        "cosine_cycles": ScheduleConfig(shape="cosine_cycles", warmup=10, cycle=30),
        "inverse_sqrt": ScheduleConfig(shape="inverse_sqrt", warmup=10),
    }
    by_tokens = {
        "cosine": ScheduleConfig(shape="cosine", warmup=5000, unit="tokens"),
        "wsd": ScheduleConfig(shape="wsd", warmup=5000, decay=15_000, unit="tokens"),
        "step": ScheduleConfig(shape="step", warmup=5000, boundaries=(10_000, 25_000), unit="tokens"),
        "cosine_cycles": ScheduleConfig(shape="cosine_cycles", warmup=5000, cycle=15_000, unit="tokens"),
        "inverse_sqrt": ScheduleConfig(shape="inverse_sqrt", warmup=5000, unit="tokens"),
    }
    times = np.arange(1, 111)
    for name, config in by_steps.items():
        np.testing.assert_array_equal(at(config, times), at(by_tokens[name], times, tokens_per_step=500), err_msg=name)


def test_tokens_round_to_the_nearest_step_but_never_to_none():
    config = ScheduleConfig(shape="constant", warmup=1499, unit="tokens")
    check(config, {1: 1.0}, tokens_per_step=1000)  # 1.499 steps: one
    check(ScheduleConfig(shape="constant", warmup=1500, unit="tokens"), {1: 0.5, 2: 1.0}, tokens_per_step=1000)
    check(
        ScheduleConfig(shape="step", warmup=0, boundaries=(3,), unit="tokens"), {1: 1.0, 2: 0.1}, tokens_per_step=1000
    )


def test_ten_trillion_tokens_and_a_million_steps_under_jit():
    # 10^7 tokens a step, 10^13 in all: their product with the step does not fit in int32, nor exactly in float32.
    run = {"steps": 1_000_000, "tokens_per_step": 10_000_000}
    config = ScheduleConfig(shape="cosine", warmup=20_000_000_000, unit="tokens", final=0.1)
    check(config, {1: 0.0005, 1000: 0.5, 2000: 1.0, 501_000: 0.55, 999_999: 0.1, 1_000_000: 0.1}, **run)
    config = ScheduleConfig(shape="step", warmup=0, boundaries=(9_999_980_000_000, 9_999_990_000_000), unit="tokens")
    check(config, {999_998: 1.0, 999_999: 0.1, 1_000_000: 0.01}, **run)
    config = ScheduleConfig(shape="cosine_cycles", warmup=0, cycle=1_000_000_000_000, unit="tokens", final=0.0)
    check(config, {100_000: 0.0, 900_000: 0.0, 900_001: 1.0, 950_000: 0.5, 1_000_000: 0.0}, **run)
    config = ScheduleConfig(shape="wsd", warmup=0, decay=40_000_000, unit="tokens", final=0.0)
    check(config, {999_996: 1.0, 999_997: 0.75, 999_998: 0.5, 999_999: 0.25, 1_000_000: 0.0}, **run)


@pytest.mark.parametrize(
    "shape", ["linear", "cosine", "polynomial", "exponential", "wsd", "inverse_sqrt", "constant", "cosine_cycles"]
)
def test_finite_and_between_zero_and_the_peak(shape):
    rates = at(ScheduleConfig(shape=shape, warmup=7, final=0.0), np.arange(1, 121), peak=3.0, steps=101)
    assert np.all(np.isfinite(rates))
    assert np.all(rates >= 0)
    assert rates.max() == 3.0
    assert rates.argmax() == 6


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ScheduleConfig(warmup=101), "warmup of 101 steps is 101 of the run's 100 steps"),
        (ScheduleConfig(warmup=1010, unit="tokens"), "warmup of 1010 tokens is 101 of the run's 100 steps"),
        (
            ScheduleConfig(shape="step", warmup=10, boundaries=(5, 20)),
            "boundaries has 5, inside the warmup of 10 steps",
        ),
        (ScheduleConfig(shape="polynomial", power=0.0), "power is 0.0; it must be above 0"),
        (ScheduleConfig(shape="exponential", rate=0.0), "rate is 0.0; it must be above 0"),
        (ScheduleConfig(shape="triangle"), '"triangle"'),
    ],
)
def test_errors_name_the_numbers(config, said):
    with pytest.raises(UserError, match=r"^optimizer\.schedule") as error:
        schedule(config, peak_lr=1.0, steps=100, tokens_per_step=10)
    assert said in str(error.value)
