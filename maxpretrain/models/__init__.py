"""Whole networks, and the plain functions by which everything else uses them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from maxpretrain.config import ModelConfig
from maxpretrain.models import families as families  # of the public `maxpretrain.models.families`
from maxpretrain.models.decoder import Decoder
from maxpretrain.nn import base
from maxpretrain.nn.attention import Cache
from maxpretrain.nn.stack import Execution, empty_cache

NETWORKS = {"decoder": Decoder}
Params = dict[str, Any]


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        hidden: [B, T, D] in the compute dtype.
        aux: name -> float32 [] auxiliary losses (expert balance, say).
    """

    hidden: jax.Array
    aux: dict[str, jax.Array]


class Model:
    """A network as pure functions of its parameters, a nested dict of arrays.

    Attributes:
        config: its shape.
        abstract: nested dict of `nn.base.Spec`, one a parameter; nothing is allocated.
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is None; give the tokenizer's size")
        self.config, self.execution = config, execution
        module = NETWORKS[config.architecture](config, execution)
        self._head = module.head
        self._template = base.Template(module)
        self.abstract: Params = self._template.abstract

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters: the same on every mesh, since each leaf is drawn from its own key."""
        return base.init(self.abstract, key)

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Hidden states of every token.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T]; None: 0 … T−1.
            segments: int32 [B, T], tokens see only their own segment; None: one a row.
            key: of dropout; None: no dropout.
        """
        hidden, _ = self._template.bind(params)(tokens, positions, segments, key)
        return Output(hidden, {})

    def head(self, params: Params) -> Params:
        """The part of `params` that `logits` reads: the loss differentiates with respect to it chunk by chunk."""
        return {self._head: params[self._head]}

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]. `params` may be the whole dict or `head(params)`."""
        return self._template.bind(params).logits(hidden)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens of `batch` sequences."""
        return empty_cache(self.config, batch, length, self.execution.dtype)

    def decode(self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states of tokens that see what the cache holds, and the cache with them in it.

        Args:
            tokens: int32 [B, T]: a prompt, or one token a row.
            positions: int32 [B, T], where each stands in its own sequence.
        """
        hidden, cache = self._template.bind(params)(tokens, positions, None, None, cache)
        return hidden, cache


def build(config: ModelConfig, execution: Execution | None = None) -> Model:
    """The network of a config; `execution` None: float32, one loop over layers, XLA attention."""
    return Model(config, execution or Execution())


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, from the declared shapes: nothing is allocated."""
    leaves = jax.tree.leaves(build(config).abstract, is_leaf=base.is_spec)
    return sum(spec.size for spec in leaves)
