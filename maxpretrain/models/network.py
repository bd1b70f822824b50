"""The three networks: decoder, encoder, encoder-decoder. What differs between families is in the config."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.models.heads import Heads, LanguageHead
from maxpretrain.models.trunk import Trunk
from maxpretrain.nn import init as inits
from maxpretrain.nn.attention import Cache
from maxpretrain.nn.base import Module
from maxpretrain.nn.embed import Embedding
from maxpretrain.nn.linear import Linear
from maxpretrain.nn.stack import Execution, Statistics


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        hidden: [B, T, D] in the compute dtype; of an encoder-decoder the decoder's.
        aux: statistics of the experts of each layer that has some, by name, [L, ...] each.
        memory: [B, S, D], the encoder's hidden states of an encoder-decoder; None of other networks.
        penultimate: [B, T, D], what went into the last layer, where that was asked for; None of encoder-decoders.
    """

    hidden: jax.Array
    aux: Statistics
    memory: jax.Array | None = None
    penultimate: jax.Array | None = None


class Network(Module):
    """Token embedding, trunk, heads; the unembedding is a call of its own."""

    def __init__(self, config: ModelConfig, execution: Execution):
        assert config.vocab_size is not None
        self.embed = Embedding(config.vocab_size, config.embed_width, inits.table(config))
        scores = "lm" in config.heads
        self.lm = LanguageHead(config) if scores else None
        inputs, outputs = {"embed": config.embed_width}, {"vocab": config.vocab_size}
        # T5's embedding is of unit size, and its unembedding not.
        initializer = inits.relative_table(config)
        own = scores and not config.tie_embeddings
        self.unembed = Linear(inputs, outputs, initializer, bias=False) if own else None
        self.heads = Heads(config)
        self.config, self.execution = config, execution

    def look_up(self, tokens: jax.Array) -> jax.Array:
        return self.embed(tokens, jnp.dtype(self.execution.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        assert self.lm is not None
        return self.lm(hidden, self.embed, self.unembed)

    @property
    def head(self) -> tuple[str, ...]:
        """The parts that `logits` reads."""
        return ("embed" if self.unembed is None else "unembed", "lm")


class Single(Network):
    """A decoder or an encoder: one trunk.

    References: Radford et al. 2019 (GPT-2); Devlin et al. 2018, arXiv:1810.04805 (BERT).
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        super().__init__(config, execution)
        # By the name that an encoder-decoder has for it.
        setattr(self, config.architecture, Trunk(config, execution, causal=config.architecture == "decoder"))

    def __call__(self, tokens: jax.Array, cache: Cache | None = None, **how: Any) -> tuple[Output, Cache | None]:
        """int32 [B, T] -> hidden states; see `Model.apply`."""
        hidden, cache, statistics = self.trunk(self.look_up(tokens), cache=cache, **how)
        penultimate = statistics.pop("penultimate", None)
        return Output(hidden, statistics, penultimate=penultimate), cache

    @property
    def trunk(self) -> Trunk:
        return getattr(self, self.config.architecture)


class EncoderDecoder(Network):
    """An encoder, and a decoder that looks at what it made.

    References: Vaswani et al. 2017, arXiv:1706.03762; Raffel et al. 2020, arXiv:1910.10683 (T5); Lewis et al. 2019,
    arXiv:1910.13461 (BART).
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        super().__init__(config, execution)
        self.encoder = Trunk(config, execution, causal=False)
        self.decoder = Trunk(config, execution, causal=True, cross=True)

    def encode(self, tokens: jax.Array, **how: Any) -> tuple[jax.Array, Statistics]:
        memory, _, statistics = self.encoder(self.look_up(tokens), **how)
        return memory, statistics

    def __call__(
        self,
        tokens: jax.Array,
        *,
        decoder_tokens: jax.Array,
        decoder_positions: jax.Array | None = None,
        decoder_segments: jax.Array | None = None,
        key: jax.Array | None = None,
        segments: jax.Array | None = None,
        **how: Any,
    ) -> tuple[Output, None]:
        """int32 [B, S] and [B, T] -> hidden states of the decoder; see `Model.apply`."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        memory, of_encoder = self.encode(tokens, segments=segments, key=keys[0], **how)
        hidden, _, of_decoder = self.decoder(
            self.look_up(decoder_tokens),
            positions=decoder_positions,
            segments=decoder_segments,
            memory=memory,
            memory_segments=segments,
            key=keys[1],
        )
        statistics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), of_encoder, of_decoder)
        return Output(hidden, statistics, memory), None

    def remember(self, memory: jax.Array) -> Cache:
        """Keys and values of the memory for each layer of the decoder."""
        return self.decoder.stack.remember(memory)

    def continue_(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache, memory_segments: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        """The decoder's hidden states of tokens that see what the cache holds, and the cache with them in it."""
        hidden, cache, _ = self.decoder(
            self.look_up(tokens), positions=positions, memory_segments=memory_segments, cache=cache
        )
        return hidden, cache


NETWORKS: dict[str, type[Network]] = {"decoder": Single, "encoder": Single, "encoder-decoder": EncoderDecoder}
