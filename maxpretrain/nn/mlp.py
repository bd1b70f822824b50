"""The position-wise part of a block."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn.base import Module
from maxpretrain.nn.init import matrix
from maxpretrain.nn.linear import Linear

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLP(Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)).

    Reference: Vaswani et al. 2017, arXiv:1706.03762, §3.3; gated: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: ModelConfig, width: int | None = None):
        """`width`: hidden width; None: the config's."""
        d, f = config.model_dim, config.mlp_width if width is None else width
        bias = config.bias if config.mlp_bias is None else config.mlp_bias
        wide = partial(Linear, {"embed": d}, {"mlp": f}, matrix(config, d, f), bias=bias)
        self.up = wide()
        self.gate = wide() if config.gated else None
        self.down = Linear(
            {"mlp": f}, {"embed": d}, matrix(config, f, d, residual=True), bias=bias, bias_axes=("width",)
        )
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        act = ACTIVATIONS[self.activation]
        hidden = self.up(x)
        hidden = act(hidden) if self.gate is None else act(self.gate(x)) * hidden
        return self.down(constrain(hidden, "batch", "length", "mlp"))
