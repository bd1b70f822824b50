"""Normalization over the last axis. Statistics in float32 whatever the compute dtype."""

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
    """x/√(mean of squares + ε) · scale, or · (1 + scale), where weight decay pulls towards no scaling.

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467; 1 + scale: Gemma Team 2024, arXiv:2403.08295.
    """

    def __init__(self, dim: int, eps: float, *, offset: bool = False):
        self.scale = param((dim,), ("width",), inits.zeros if offset else inits.ones, "norm")
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] in any float dtype -> the same."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        scale = self.scale[...]
        return (y * _along(1.0 + scale if self.offset else scale, y)).astype(x.dtype)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def make_norm(config: ModelConfig, dim: int | None = None) -> LayerNorm | RMSNorm:
    """The norm of a config; `dim` None: over the model width."""
    dim = config.model_dim if dim is None else dim
    if config.norm != "layernorm":
        return RMSNorm(dim, config.norm_eps, offset=config.norm == "rmsnorm_offset")
    return LayerNorm(dim, config.norm_eps, bias=config.bias if config.norm_bias is None else config.norm_bias)
