"""Blocks, and a stack of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn import base
from maxpretrain.nn.attention import Attention, Cache, Context
from maxpretrain.nn.dropout import dropout, split
from maxpretrain.nn.linear import PRODUCT
from maxpretrain.nn.mlp import MLP
from maxpretrain.nn.norm import make_norm

# What the backward pass finds saved, by the name of the policy; anything else it computes again.
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network runs, apart from what it computes; resolved from `ComputeConfig` by `hardware.py`.

    Attributes:
        dtype: of activations and matrix products.
        remat: "none", "dots" or "full".
        scan: layers in one compiled loop.
        attention: "xla" or "cudnn".
        loss_chunk: tokens per device whose logits exist at one time.
    """

    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    attention: str = "xla"
    loss_chunk: int = 1 << 30


class Block(base.Module):
    """Attention and MLP, each a residual branch: x + f(norm(x)) (pre) or norm(x + f(x)) (post).

    Reference: post: Vaswani et al. 2017, arXiv:1706.03762; pre: Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, config: ModelConfig):
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.pre = config.norm_placement == "pre"
        self.rate = config.dropout

    def __call__(
        self, x: jax.Array, context: Context, *, key: jax.Array | None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the layer's cache."""
        attention_key, first_key, second_key = split(key, 3)
        branch, cache = self.attention(
            self.attention_norm(x) if self.pre else x, context, key=attention_key, cache=cache
        )
        x = constrain(x + dropout(branch, self.rate, first_key), "batch", "length", None)
        x = x if self.pre else self.attention_norm(x)
        branch = self.mlp(self.mlp_norm(x) if self.pre else x)
        x = constrain(x + dropout(branch, self.rate, second_key), "batch", "length", None)
        return (x if self.pre else self.mlp_norm(x)), cache


class Stack(base.Module):
    """L blocks with stacked parameters."""

    def __init__(self, config: ModelConfig, execution: Execution):
        with base.stacked(config.num_layers):
            self.block = Block(config)
        self.num_layers = config.num_layers
        self.execution = execution

    def __call__(
        self, x: jax.Array, context: Context, *, key: jax.Array | None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D]; `cache` holds each layer's along a leading axis."""
        keys = None if key is None else jax.random.split(key, self.num_layers)

        def body(
            block: Block, x: jax.Array, inputs: tuple[jax.Array | None, Cache | None]
        ) -> tuple[jax.Array, Cache | None]:
            return block(x, context, key=inputs[0], cache=inputs[1])

        remat = self.execution.remat
        return base.scan(
            self.block,
            body,
            x,
            (keys, cache),
            loop=self.execution.scan,
            remat=remat != "none" and cache is None,
            checkpoint_policy=REMAT_POLICIES.get(remat),
        )


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: str) -> Cache:
    """Keys and values of no tokens yet: [L, B, length, J, K] each."""
    shape = (config.num_layers, batch, length, config.kv_heads, config.head_width)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
