"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxpretrain.config import OptimizerConfig
from maxpretrain.optim.schedules import Schedule


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """m̂ / (√v̂ + ε), with m kept in `config.moment_dtype`.

    Optax's own `mu_dtype` multiplies β₁ by m in the narrow type; here m is widened first, so that it is rounded only once
    per update, when it is stored.
    """
    inner = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    dtype = jnp.dtype(config.moment_dtype)

    def with_moment(state: optax.ScaleByAdamState, dtype: Any) -> optax.ScaleByAdamState:
        return state._replace(mu=jax.tree.map(lambda m: m.astype(dtype), state.mu))

    def init(params: Any) -> optax.ScaleByAdamState:
        return with_moment(inner.init(params), dtype)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        updates, state = inner.update(grads, with_moment(state, jnp.float32), params)
        return updates, with_moment(state, dtype)

    return optax.GradientTransformation(init, update)


def _scaled(scales: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales))


def build(
    config: OptimizerConfig, learning_rate: Schedule, decay_mask: Any, scales: Any = None
) -> optax.GradientTransformation:
    """w ← w − η·(m̂ / (√v̂ + ε) + λ·w), with λ only where `decay_mask` is True.

    m ← β₁m + (1 − β₁)g and v ← β₂v + (1 − β₂)g²; m̂ = m/(1 − β₁ⁿ⁺¹), v̂ = v/(1 − β₂ⁿ⁺¹) at update n. Decay is multiplied by
    the learning rate, as in PyTorch and Optax; the paper's is not. With `moment_dtype` bfloat16 only the stored m is
    rounded: the update at hand is made from m in float32.

    Args:
        config: b1, b2, eps, weight_decay, moment_dtype.
        learning_rate: update number (int32 []) -> float32 [].
        decay_mask: pytree of bool, of the parameters' structure.
        scales: pytree of float, of the parameters' structure, that m̂ / (√v̂ + ε) is multiplied by; None: by 1.

    Returns:
        `init(params)` and `update(grads, state, params)`, whose updates are to be added to the parameters.

    Reference:
        Loshchilov and Hutter, 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101, Algorithm 2.
    """
    inner = optax.chain(
        _adam(config),
        *([] if scales is None else [_scaled(scales)]),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    # Optax raises a Python float to an int32 count in its bias correction: an error under strict promotion, which we keep
    # everywhere else. The context only touches how Optax is traced.
    def init(params: Any) -> optax.OptState:
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    def update(grads: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(grads, state, params)

    return optax.GradientTransformation(init, update)
