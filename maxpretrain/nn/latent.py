"""Multi-head latent attention: keys and values from one narrow vector a token."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn.attend import Context, attend
from maxpretrain.nn.attention import Cache, Local, chosen_angles, seen, store
from maxpretrain.nn.base import Module
from maxpretrain.nn.init import matrix
from maxpretrain.nn.linear import Linear
from maxpretrain.nn.norm import RMSNorm
from maxpretrain.nn.position import rotate, yarn_scale

_EPS = 1e-6  # of the norms of the latents, whatever norm_eps is: as in the released model


class LatentAttention(Module):
    """Queries and keys are [no position; rotary] parts; the rotary key is one for all heads.

    c = norm(x·A), keys and values = c·B, queries likewise from a latent of their own. The scale has yarn's factor squared.

    Reference: DeepSeek-AI 2024, arXiv:2405.04434, §2.1.
    """

    def __init__(self, config: ModelConfig):
        d, h, latent = config.model_dim, config.num_heads, config.latent
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        query, rank = latent.nope_dim + latent.rope_dim, latent.kv_rank
        down = lambda width: Linear({"embed": d}, {"latent": width}, matrix(config, d, width), bias=bias)  # noqa: E731
        narrow = latent.q_rank
        self.query_down = None if narrow is None else down(narrow)
        self.query_norm = None if narrow is None else RMSNorm(narrow, _EPS)
        source, inputs = ({"embed": d}, d) if narrow is None else ({"latent": narrow}, narrow)
        self.query = Linear(source, {"heads": h, "head_dim": query}, matrix(config, inputs, h * query), bias=False)
        self.down = down(rank + latent.rope_dim)
        self.norm = RMSNorm(rank, _EPS)
        up = latent.nope_dim + latent.value_dim
        self.up = Linear({"latent": rank}, {"heads": h, "head_dim": up}, matrix(config, rank, h * up), bias=False)
        self.out = Linear(
            {"heads": h, "head_dim": latent.value_dim},
            {"embed": d},
            matrix(config, h * latent.value_dim, d, residual=True),
            bias=config.bias if config.out_bias is None else config.out_bias,
            bias_axes=("width",),
        )
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        key: jax.Array | None,
        cache: Cache | None = None,
        local: Local = False,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this call's keys and values in it; as `Attention`."""
        config, latent = self.config, self.config.latent
        angles = chosen_angles(context, local)
        assert angles is not None
        q = self.query(x if self.query_down is None else self.query_norm(self.query_down(x)))
        q_plain, q_turning = jnp.split(q, [latent.nope_dim], -1)
        narrow, k_turning = jnp.split(self.down(x), [latent.kv_rank], -1)
        k_plain, v = jnp.split(self.up(self.norm(narrow)), [latent.nope_dim], -1)
        layout = config.rope.layout
        q = jnp.concatenate([q_plain, rotate(q_turning, angles, layout)], -1)
        k_turning = rotate(k_turning[:, :, None], angles, layout)
        shared = jnp.broadcast_to(k_turning, (*k_plain.shape[:-1], latent.rope_dim))
        k = jnp.concatenate([k_plain, shared], -1)
        if cache is not None:
            cache = store(cache, context, {"key": k, "value": v})
            k, v = cache["key"].astype(q.dtype), cache["value"].astype(q.dtype)
        mask, plain = seen(context, x.shape[1], k.shape[1], local)
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in (q, k, v))
        scale = config.attention_scale
        if scale is None:
            scale = yarn_scale(config.rope) / math.sqrt(latent.nope_dim + latent.rope_dim)
        attended = attend(
            q,
            k,
            v,
            mask,
            kernel=context.kernel if context.slots is None else "xla",
            causal=plain,
            scale=scale,
            softcap=config.attention_softcap,
            rate=config.dropout,
            key=key,
        )
        return self.out(constrain(attended, "batch", "length", "heads", None)), cache


def cache_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Heads, and the widths of a key and of a value, that a cache holds."""
    latent = config.latent
    if latent.kv_rank:
        return config.num_heads, latent.nope_dim + latent.rope_dim, latent.value_dim
    return config.kv_heads, config.head_width, config.head_width
