"""The causal decoder: GPT-2, GPT-3, Llama, Qwen and what lies between, by config."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn.attention import Cache, Context
from maxpretrain.nn.base import Module
from maxpretrain.nn.dropout import dropout, split
from maxpretrain.nn.embed import Embedding, PositionEmbedding
from maxpretrain.nn.init import normal
from maxpretrain.nn.linear import Linear, einsum
from maxpretrain.nn.norm import make_norm
from maxpretrain.nn.position import rotary_angles, sinusoids
from maxpretrain.nn.stack import Execution, Stack


class Decoder(Module):
    """Embedding, L causal blocks, final norm; the unembedding is a call of its own.

    Reference: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama).
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        assert config.vocab_size is not None
        table = normal(config.init_std)
        self.embed = Embedding(config.vocab_size, config.model_dim, table)
        self.positions = (
            PositionEmbedding(config.max_length, config.model_dim, table) if config.position == "learned" else None
        )
        self.stack = Stack(config, execution)
        self.norm = make_norm(config) if config.norm_placement == "pre" else None
        self.unembed = (
            None
            if config.tie_embeddings
            else Linear({"embed": config.model_dim}, {"vocab": config.vocab_size}, table, bias=False)
        )
        self.config, self.execution = config, execution

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        key: jax.Array | None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """int32 [B, T] -> hidden states [B, T, D]; see `Model.apply`."""
        config, dtype = self.config, jnp.dtype(self.execution.dtype)
        length = tokens.shape[1]
        embed_key, stack_key = split(key, 2)
        x = self.embed(tokens, dtype)
        at = jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions
        if self.positions is not None:
            learned = self.positions(positions, length, dtype)
            x = x + jnp.broadcast_to(learned, x.shape)
        elif config.position == "sinusoidal":
            # Scaled up, the tokens are not drowned by positions of unit size.
            x = x * jnp.asarray(math.sqrt(config.model_dim), dtype)
            x = x + jnp.broadcast_to(sinusoids(at, config.model_dim).astype(dtype), x.shape)
        x = constrain(dropout(x, config.dropout, embed_key), "batch", "length", None)
        context = Context(
            segments=segments,
            angles=rotary_angles(at, config.head_width, config.rope_theta) if config.position == "rope" else None,
            slots=None if cache is None else at,
            kernel=self.execution.attention,
        )
        x, cache = self.stack(x, context, key=stack_key, cache=cache)
        return (x if self.norm is None else self.norm(x)), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        if self.unembed is None:
            return self.embed.logits(hidden)
        return einsum("...d,dv->...v", hidden, self.unembed.kernel[...], out=jnp.float32)

    @property
    def head(self) -> str:
        """The part that `logits` reads."""
        return "embed" if self.unembed is None else "unembed"
