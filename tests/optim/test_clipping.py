"""Clipping by value, then by global norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import OptimizerConfig
from maxpretrain.optim import clip, global_norm

GRADS = {"a": jnp.asarray([3.0, 0.0], jnp.float32), "b": {"c": jnp.asarray([[-4.0]], jnp.float32)}}


def run(grads, **config):
    return jax.jit(lambda g: clip(g, OptimizerConfig(**config)))(grads)


def test_global_norm():
    assert global_norm(GRADS) == 5.0
    assert global_norm({}) == 0.0
    assert global_norm(GRADS).dtype == jnp.float32


def test_norm_scales_all_alike_and_reports_the_norm_before():
    clipped, norm = run(GRADS, clip_norm=1.0)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"]["c"], [[-0.8]], rtol=1e-6)


def test_within_the_limit_nothing_changes():
    for config in ({"clip_norm": 5.0}, {"clip_norm": None}, {"clip_norm": 7.0, "clip_value": 4.0}):
        clipped, norm = run(GRADS, **config)
        assert norm == 5.0
        np.testing.assert_array_equal(clipped["a"], [3.0, 0.0])
        np.testing.assert_array_equal(clipped["b"]["c"], [[-4.0]])


def test_value_clips_each_element():
    clipped, norm = run(GRADS, clip_norm=None, clip_value=2.0)
    assert norm == 5.0
    np.testing.assert_array_equal(clipped["a"], [2.0, 0.0])
    np.testing.assert_array_equal(clipped["b"]["c"], [[-2.0]])


def test_value_comes_before_norm():
    # values first: (3, −4) → (3, −3), whose norm √18 scales to 1; norm first would give (0.6, −0.8).
    clipped, norm = run(GRADS, clip_norm=1.0, clip_value=3.0)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], [0.70710678, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"]["c"], [[-0.70710678]], rtol=1e-6)


def test_zero_gradient_stays_zero():
    clipped, norm = run({"a": jnp.zeros((3,), jnp.float32)}, clip_norm=1.0)
    assert norm == 0.0
    np.testing.assert_array_equal(clipped["a"], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_non_finite_norm_is_reported(bad):
    _, norm = run({"a": jnp.asarray([bad, 1.0], jnp.float32)}, clip_norm=1.0, clip_value=None)
    assert not np.isfinite(norm)


def test_bfloat16_is_summed_in_float32_and_keeps_its_dtype():
    clipped, norm = run({"a": jnp.ones((10_000,), jnp.bfloat16)}, clip_norm=1.0)
    assert norm == 100.0
    assert clipped["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(clipped["a"].astype(jnp.float32), np.full(10_000, 0.01), rtol=4e-3)
