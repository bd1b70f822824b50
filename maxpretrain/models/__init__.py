"""Whole networks, and the plain functions by which everything else uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.models import families as families  # of the public `maxpretrain.models.families`
from maxpretrain.models.network import NETWORKS, Output
from maxpretrain.nn import base
from maxpretrain.nn.attention import Cache
from maxpretrain.nn.stack import Execution, empty_cache

__all__ = ["Model", "Output", "build", "families", "parameter_count"]

Params = dict[str, Any]


class Model:
    """A network as pure functions of its parameters, a nested dict of arrays.

    Attributes:
        config: its shape.
        abstract: nested dict of `nn.base.Spec`, one a parameter; nothing is allocated.
        stacks: "encoder" or "decoder" or both -> its layers, which say which parameters are whose.
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is None; give the tokenizer's size")
        self.config, self.execution = config, execution
        module = NETWORKS[config.architecture](config, execution)
        self._head = module.head
        self.stacks = {name: getattr(module, name).stack for name in ("encoder", "decoder") if hasattr(module, name)}
        self._template = base.Template(module)
        self.abstract: Params = self._template.abstract

    @property
    def num_parameters(self) -> int:
        """Tied ones count once, buffers not at all."""
        leaves = jax.tree.leaves(self.abstract, is_leaf=base.is_spec)
        return sum(spec.size for spec in leaves if spec.role != "buffer")

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters: the same on every mesh, since each leaf is drawn from its own key."""
        return base.init(self.abstract, key)

    def plain(self, params: Params) -> Params:
        """The parameters of a network of this config without what an objective changed in how they are kept: what an export
        writes, and what `build(config)` takes. Here they are themselves.
        """
        return params

    def networks(self, params: Params) -> dict[str, tuple[ModelConfig, Params]]:
        """The networks that there are, with their plain parameters: the run's own as "", others by their names."""
        return {"": (self.config, self.plain(params))}

    @property
    def speaking(self) -> tuple[ModelConfig, Callable[[Params], Params]]:
        """The network that a language model head is of, where there is one, and its plain parameters as a function of these."""
        return self.config, self.plain

    def keeps_like(self, other: Model) -> bool:
        """Whether parameters of the other are parameters of this, and mean the same."""
        shapes = lambda model: jax.tree.map(lambda spec: spec.shape, model.abstract, is_leaf=base.is_spec)  # noqa: E731
        return type(self) is type(other) and shapes(self) == shapes(other)

    def adopted(self, plain: Params, fresh: Params) -> Params:
        """`fresh` parameters of this model, with those of a plain network in the place of what both have."""
        return {name: plain.get(name, part) for name, part in fresh.items()}

    def _bind(self, params: Params) -> Any:
        return self._template.bind(self.plain(params))

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        **more: jax.Array | None,
    ) -> Output:
        """Hidden states of every token.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T]; None: 0 … T−1.
            segments: int32 [B, T], tokens see only their own segment; 0 is padding; None: one a row.
            key: of dropout; None: no dropout.
            more: int32 or bool, of networks that have use for it: `token_types` [B, T]; `prefix` bool [B, T], tokens of a
                decoder that see each other in both directions; of an encoder-decoder (whose `tokens` are the encoder's)
                `decoder_tokens` [B, U], `decoder_positions`, `decoder_segments`.
        """
        return self._bind(params)(tokens, positions=positions, segments=segments, key=key, **more)[0]

    def head(self, params: Params) -> Params:
        """The part of `params` that `logits` reads: the loss differentiates with respect to it chunk by chunk."""
        plain = self.plain(params)
        return {name: plain[name] for name in self._head if name in plain}

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]. `params` may be the whole dict or `head(params)`."""
        return self._bind(params).logits(hidden)

    def head_outputs(self, params: Params, hidden: jax.Array, real: jax.Array | None = None) -> dict[str, jax.Array]:
        """What the other heads say of hidden states [B, T, D]; see `models.heads.Heads`."""
        return self._bind(params).heads(hidden, real)

    def span_logits(self, params: Params, left: jax.Array, right: jax.Array, places: jax.Array) -> jax.Array:
        """The span boundary head's float32 [..., V]; see `models.heads.SpanBoundary`."""
        module = self._bind(params)
        return module.heads.span_boundary(left, right, places, module.embed)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens of `batch` sequences."""
        return empty_cache(self.config, batch, length, self.execution.dtype)

    def encode(self, params: Params, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, S, D] of an encoder-decoder's encoder."""
        return self._bind(params).encode(tokens, segments=segments)[0]

    def remember(self, params: Params, memory: jax.Array) -> Cache:
        """What a cache holds of the encoder's hidden states [B, S, D], to be merged into an empty one."""
        return jax.tree.map(lambda x: x.astype(jnp.dtype(self.execution.dtype)), self._bind(params).remember(memory))

    def decode(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        memory_segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states of tokens that see what the cache holds, and the cache with them in it.

        Args:
            tokens: int32 [B, T]: a prompt, or one token a row.
            positions: int32 [B, T], where each stands in its own sequence.
            memory_segments: int32 [B, S], 0 where the memory of an encoder-decoder is padding; None: nowhere.
            prefix: bool [B, T], tokens of a decoder's prompt that see each other in both directions, the first of their
                row; all of them have to be given at once. None: there are none.
        """
        module = self._bind(params)
        if self.config.architecture == "encoder-decoder":
            return module.continue_(tokens, positions, cache, memory_segments)
        output, cache = module(tokens, cache=cache, positions=positions, prefix=prefix)
        return output.hidden, cache


def build(config: ModelConfig, execution: Execution | None = None) -> Model:
    """The network of a config; `execution` None: float32, one loop over layers, XLA attention."""
    return Model(config, execution or Execution())


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, from the declared shapes: nothing is allocated. Tied ones count once, buffers not at all."""
    return build(config).num_parameters
