"""AdamW against two steps worked out by hand in float64, and the decay mask by role."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxpretrain.config import OptimizerConfig, ScheduleConfig
from maxpretrain.errors import UserError
from maxpretrain.optim import build_optimizer, decay_mask

# Linear over three steps after a warmup of one: the first update has the peak, the second half of it.
CONFIG = OptimizerConfig(
    peak_lr=0.01,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    schedule=ScheduleConfig(shape="linear", warmup=1, final=0.0),
)
MASK = {"w": True, "b": False}
PARAMS = {"w": jnp.asarray([0.5, -1.0], jnp.float32), "b": jnp.asarray([0.25], jnp.float32)}
FIRST = {"w": jnp.asarray([0.1, -0.2], jnp.float32), "b": jnp.asarray([0.3], jnp.float32)}
SECOND = {"w": jnp.asarray([-0.4, 0.05], jnp.float32), "b": jnp.asarray([0.0], jnp.float32)}


def stepper(config, mask=MASK):
    tx = build_optimizer(config, steps=3, tokens_per_step=1, decay_mask=mask)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def adam_state(state):
    return next(s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))


def test_two_steps_by_hand():
    tx, step = stepper(CONFIG)
    params, state = step(PARAMS, tx.init(PARAMS), FIRST)
    # m̂ = g, v̂ = g²: 0.5 − 0.01·(1 + 0.1·0.5), −1 − 0.01·(−1 − 0.1), and without decay 0.25 − 0.01·1
    np.testing.assert_allclose(params["w"], [0.489500001, -0.9890000005], rtol=1e-6)
    np.testing.assert_allclose(params["b"], [0.240000000333], rtol=1e-6)
    params, state = step(params, state, SECOND)
    # w[0]: m = 0.9·0.01 + 0.1·(−0.4) = −0.031, m̂ = −0.031/0.19; v = 0.99·0.0001 + 0.01·0.16 = 0.001699, v̂ = 0.001699/0.0199
    np.testing.assert_allclose(params["w"], [0.492047202894, -0.986153457722], rtol=1e-6)
    np.testing.assert_allclose(params["b"], [0.236642099756], rtol=1e-6)
    moments = adam_state(state)
    np.testing.assert_allclose(moments.mu["w"], [-0.031, -0.013], rtol=1e-5)
    np.testing.assert_allclose(moments.nu["w"], [0.001699, 0.000421], rtol=1e-5)
    np.testing.assert_allclose(moments.mu["b"], [0.027], rtol=1e-5)
    assert moments.count == 2


def test_decay_is_not_scaled_by_the_gradient():
    # decoupled: with a zero gradient a weight shrinks by η·λ·w = 0.01·0.1·w, and an undecayed one stays
    tx, step = stepper(CONFIG)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    params, _ = step(PARAMS, tx.init(PARAMS), zero)
    np.testing.assert_allclose(params["w"], [0.4995, -0.999], rtol=1e-6)
    np.testing.assert_array_equal(params["b"], [0.25])


def test_bfloat16_first_moment():
    config = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    tx, step = stepper(config)
    state = tx.init(PARAMS)
    assert adam_state(state).mu["w"].dtype == jnp.bfloat16
    assert adam_state(state).nu["w"].dtype == jnp.float32
    params, state = step(PARAMS, state, FIRST)
    np.testing.assert_allclose(params["w"], [0.489500001, -0.9890000005], rtol=1e-6)  # made before m is rounded
    np.testing.assert_array_equal(adam_state(state).mu["w"].astype(jnp.float32), [0.010009765625, -0.02001953125])
    params, state = step(params, state, SECOND)
    assert params["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], [0.492046411, -0.986150277], rtol=1e-6)  # m = 0.9·0.010009765625 + …
    assert adam_state(state).mu["w"].dtype == jnp.bfloat16


def test_moments_have_the_parameters_shapes():
    tx, _ = stepper(CONFIG)
    moments = adam_state(jax.eval_shape(tx.init, PARAMS))
    for tree in (moments.mu, moments.nu):
        assert jax.tree.map(lambda x: x.shape, tree) == {"w": (2,), "b": (1,)}


@dataclasses.dataclass(frozen=True)
class Role:
    role: str


def test_decay_falls_on_matrices_and_embeddings_only():
    abstract = {role: Role(role) for role in ("matrix", "embedding", "position", "bias", "norm")}
    expected = {"matrix": True, "embedding": True, "position": False, "bias": False, "norm": False}
    assert decay_mask({"layers": abstract}) == {"layers": expected}


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(UserError, match=r'"adamv", which is no optimizer; did you mean "adamw"\?'):
        build_optimizer(dataclasses.replace(CONFIG, name="adamv"), steps=3, tokens_per_step=1, decay_mask=MASK)
