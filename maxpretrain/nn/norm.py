"""Normalization over the model width. Statistics in float32 whatever the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Module, param


class LayerNorm(Module):
    """(x − mean)/√(variance + ε) · scale + bias.

    Reference: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """

    def __init__(self, dim: int, eps: float, *, bias: bool):
        self.scale = param((dim,), ("width",), inits.ones, "norm")
        self.bias = param((dim,), ("width",), inits.zeros, "norm") if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] in any float dtype -> the same."""
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, -1, keepdims=True)
        centered = y - mean
        variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.eps) * _along(self.scale[...], y)
        if self.bias is not None:
            y = y + _along(self.bias[...], y)
        return y.astype(x.dtype)


class RMSNorm(Module):
    """x/√(mean of squares + ε) · scale.

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, dim: int, eps: float):
        self.scale = param((dim,), ("width",), inits.ones, "norm")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] in any float dtype -> the same."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * _along(self.scale[...], y)).astype(x.dtype)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.model_dim, config.norm_eps)
    return LayerNorm(config.model_dim, config.norm_eps, bias=config.bias)
