"""What reads the hidden states. Each is a small module that declares its parameters and is applied on request."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Module, param
from maxpretrain.nn.embed import Embedding
from maxpretrain.nn.linear import Linear, einsum
from maxpretrain.nn.mlp import ACTIVATIONS
from maxpretrain.nn.norm import make_norm

SPAN_POSITIONS = 200  # rows of the table of places within a span: Joshi et al. 2019, §3.2


def _dense(config: ModelConfig, inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    return Linear({"embed": inputs}, {None: outputs}, inits.matrix(config, inputs, outputs), bias=bias)


class Transform(Module):
    """norm(act(x·W + b)): hidden states on their way to the vocabulary, from width D to that of the embedding.

    Reference: Devlin et al. 2018, arXiv:1810.04805 (released code).
    """

    def __init__(self, config: ModelConfig):
        self.dense = _dense(config, config.model_dim, config.embed_width, bias=config.bias)
        self.norm = make_norm(config, config.embed_width)
        self.activation = config.lm_activation or config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., E]."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


class LanguageHead(Module):
    """Scores of every token of the vocabulary, but for the table where the embedding serves as one."""

    def __init__(self, config: ModelConfig):
        assert config.vocab_size is not None
        self.transform = Transform(config) if config.lm_transform else None
        self.bias = param((config.vocab_size,), ("vocab",), inits.zeros, "bias") if config.lm_bias else None
        # muP: an output layer of constant variance, scaled down with the width (Yang et al. 2022, arXiv:2203.03466, table 8).
        self.scale, self.softcap = config.logit_scale * config.mup_ratio, config.logit_softcap

    def __call__(self, hidden: jax.Array, embed: Embedding | None, unembed: Linear | None) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        x = hidden if self.transform is None else self.transform(hidden)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if unembed is None:
            assert embed is not None
            logits = embed.logits(x)
        else:
            logits = einsum("...d,dv->...v", x, unembed.kernel[...], out=jnp.float32)
        if self.bias is not None:
            logits = logits + jnp.broadcast_to(self.bias[...], logits.shape)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


class Pooler(Module):
    """act(x·W + b) of one state for the whole sequence, with tanh in BERT.

    Reference: Devlin et al. 2018, arXiv:1810.04805 (released code).
    """

    def __init__(self, config: ModelConfig):
        self.dense = _dense(config, config.model_dim, config.model_dim)
        self.activation = config.pooler_activation

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, D] -> [B, D]."""
        return ACTIVATIONS[self.activation](self.dense(hidden))


class Replaced(Module):
    """For each token the score that it was replaced: dense, activation, one number.

    Reference: Clark et al. 2020, arXiv:2003.10555, §2.
    """

    def __init__(self, config: ModelConfig):
        self.dense = _dense(config, config.model_dim, config.model_dim)
        self.out = _dense(config, config.model_dim, 1)
        self.activation = config.activation

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T]."""
        return self.out(ACTIVATIONS[self.activation](self.dense(hidden)))[..., 0].astype(jnp.float32)


class SpanBoundary(Module):
    """Tokens of a span from the states of its two outer neighbours and a place: two layers of linear, gelu, norm.

    Reference: Joshi et al. 2019, arXiv:1907.10529, §3.2.
    """

    def __init__(self, config: ModelConfig):
        assert config.vocab_size is not None
        d = config.model_dim
        self.places = param((SPAN_POSITIONS, d), ("position", "embed"), inits.table(config), "position")
        self.first, self.first_norm = _dense(config, 3 * d, d), make_norm(config)
        self.second, self.second_norm = _dense(config, d, d), make_norm(config)
        self.bias = param((config.vocab_size,), ("vocab",), inits.zeros, "bias")

    def __call__(self, left: jax.Array, right: jax.Array, places: jax.Array, embed: Embedding) -> jax.Array:
        """States [..., D] of the neighbours and int32 [...] places within the span -> float32 [..., V]."""
        where = self.places[...].at[places].get(mode="clip").astype(left.dtype)
        x = jnp.concatenate([left, right, where], -1)
        x = self.first_norm(jax.nn.gelu(self.first(x), approximate=False))
        x = self.second_norm(jax.nn.gelu(self.second(x), approximate=False))
        logits = embed.logits(x)
        return logits + jnp.broadcast_to(self.bias[...], logits.shape)


class Heads(Module):
    """The heads of a config but the language model's."""

    def __init__(self, config: ModelConfig):
        d, wanted = config.model_dim, config.heads
        make = lambda name, module: module() if name in wanted else None  # noqa: E731
        self.pooler = make("pooler", lambda: Pooler(config))
        self.pair = make("pair", lambda: _dense(config, d, 2))
        self.replaced = make("replaced", lambda: Replaced(config))
        self.span_boundary = make("span_boundary", lambda: SpanBoundary(config))
        # As the published classes have it, whatever the biases of the layers are.
        biased = config.architecture != "decoder"
        self.sequence = make("sequence", lambda: _dense(config, d, config.num_labels, bias=biased))
        self.token = make("token", lambda: _dense(config, d, config.num_labels))
        classifies = "sequence" in wanted or "token" in wanted
        self.transform = Transform(config) if config.head_transform and classifies else None
        self.value = make("value", lambda: _dense(config, d, 1))
        self.causal, self.mean = config.architecture != "encoder", config.pooling == "mean"

    def __call__(self, hidden: jax.Array, real: jax.Array | None) -> dict[str, jax.Array]:
        """What each head says, but for those that need more than the hidden states.

        Args:
            hidden: [B, T, D].
            real: bool [B, T], which tokens are no padding; None: all.

        Returns:
            "pooled" [B, D], of the first token (encoder), the last real one (others), or the mean of all; "pair_logits" [B, 2];
            "replaced_logits" [B, T]; "sequence_logits" [B, labels], of the pooled state where there is a pooler, else of the
            same as it; "token_logits" [B, T, labels]; "values" [B, T].
        """
        made: dict[str, jax.Array] = {}
        pools = self.pooler is not None or self.pair is not None or self.sequence is not None
        whole = self._whole(hidden, real) if pools else hidden
        if self.pooler is not None:
            made["pooled"] = whole = self.pooler(whole)
        if self.pair is not None:
            made["pair_logits"] = self.pair(whole).astype(jnp.float32)
        if self.replaced is not None:
            made["replaced_logits"] = self.replaced(hidden)
        ready = (lambda x: x) if self.transform is None else self.transform
        if self.sequence is not None:
            made["sequence_logits"] = self.sequence(ready(whole)).astype(jnp.float32)
        if self.token is not None:
            made["token_logits"] = self.token(ready(hidden)).astype(jnp.float32)
        if self.value is not None:
            made["values"] = self.value(hidden)[..., 0].astype(jnp.float32)
        return made

    def _whole(self, hidden: jax.Array, real: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, D]: what stands for the whole sequence."""
        if self.mean:
            real = jnp.ones(hidden.shape[:2], bool) if real is None else real
            kept = jnp.where(real[..., None], hidden, jnp.zeros((), hidden.dtype)).astype(jnp.float32)
            count = jnp.maximum(jnp.sum(real, 1, keepdims=True), 1).astype(jnp.float32)
            return (jnp.sum(kept, 1) / count).astype(hidden.dtype)
        if not self.causal:
            return hidden[:, 0]
        length = hidden.shape[1]
        last = jnp.full((hidden.shape[0],), length - 1)
        if real is not None:
            last = jnp.max(jnp.where(real, jnp.arange(length)[None], 0), -1)
        return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
