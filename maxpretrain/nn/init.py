"""Initial values of parameters: functions (key, shape) -> float32 array."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.nn.base import Initializer


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key
    return jnp.ones(shape, jnp.float32)


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def truncated_normal(std: float) -> Initializer:
    """Normal cut at ±2 standard deviations, rescaled so that what is left has the standard deviation asked for."""
    lost = 0.87962566103423978  # standard deviation of a unit normal cut at ±2
    return lambda key, shape: (std / lost) * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)


def uniform(limit: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def matrix(
    config: ModelConfig, fan_in: int, fan_out: int, *, residual: bool = False, query_width: int | None = None
) -> Initializer:
    """The initializer of a weight matrix.

    Args:
        fan_in: inputs that each output sums over.
        fan_out: outputs that each input feeds.
        residual: the matrix writes into the residual stream, whose variance would grow with depth:
            scaled by 1/√(2L) where the config asks for it.
        query_width: K, for a projection to queries: T5 has 1/√K in it, and none in its attention.

    With muP the variance goes with 1/width.

    Reference: muP: Yang et al. 2022, arXiv:2203.03466, table 8; Xavier: Glorot and Bengio 2010; He: He et al. 2015, arXiv:1502.01852; LeCun: LeCun et al. 1998, Efficient
    BackProp, §4.6; depth scaling: Radford et al. 2019, §2.3; T5: Raffel et al. 2020, arXiv:1910.10683, and Shazeer and
    Stern 2018, arXiv:1804.04235, §9.
    """
    scale = 1.0 / math.sqrt(2 * config.num_layers) if residual and config.depth_scaled_init else 1.0
    if config.init in ("normal", "truncated_normal"):  # the others go by the inputs already
        scale *= math.sqrt(config.mup_ratio)
    match config.init:
        case "normal":
            return normal(scale * config.init_std)
        case "truncated_normal":
            return truncated_normal(scale * config.init_std)
        case "xavier_uniform":
            return uniform(scale * math.sqrt(6.0 / (fan_in + fan_out)))
        case "he_normal":
            return normal(scale * math.sqrt(2.0 / fan_in))
        case "lecun_normal":
            return normal(scale / math.sqrt(fan_in))
        case "t5":
            return normal(scale / math.sqrt(fan_in * (query_width or 1)))
    raise ValueError(config.init)


def table(config: ModelConfig) -> Initializer:
    """The initializer of embeddings and position tables."""
    return normal(config.init_std)


def relative_table(config: ModelConfig) -> Initializer:
    """The initializer of a table by distance."""
    return normal(1.0 / math.sqrt(config.model_dim) if config.init == "t5" else config.init_std)
