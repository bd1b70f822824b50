"""Blocks, and a stack of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.config import ModelConfig
from maxpretrain.mesh import constrain
from maxpretrain.nn import base
from maxpretrain.nn.attend import Context
from maxpretrain.nn.attention import Attention, Cache, Local
from maxpretrain.nn.dropout import dropout, split
from maxpretrain.nn.latent import LatentAttention, cache_widths
from maxpretrain.nn.linear import PRODUCT
from maxpretrain.nn.mlp import MLP
from maxpretrain.nn.moe import MoE
from maxpretrain.nn.norm import make_norm

# What the backward pass finds saved, by the name of the policy; anything else it computes again.
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
Statistics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network runs, apart from what it computes; resolved from `ComputeConfig` by `hardware.py`.

    Attributes:
        dtype: of activations and matrix products.
        remat: "none", "dots" or "full".
        scan: layers in one compiled loop.
        attention: "xla" or "cudnn".
        loss_chunk: tokens per device whose logits exist at one time.
        probe: return the residual stream after each layer as the statistic "probe", [L, B, T, D].
    """

    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    attention: str = "xla"
    loss_chunk: int = 1 << 30
    probe: bool = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """Which parameters a layer has.

    Attributes:
        causal, cross: of a decoder; and whether it looks at an encoder's memory.
        experts: a mixture of experts in place of the MLP.
        opening: the first layer, without a norm before its attention.
    """

    causal: bool = True
    cross: bool = False
    experts: bool = False
    opening: bool = False

    @property
    def name(self) -> str:
        """Of the parameters of all layers of this kind."""
        return "opening" if self.opening else "experts" if self.experts else "block"


class Block(base.Module):
    """Attention, attention to a memory where there is one, and MLP: one after the other, or side by side (`parallel`).

    A sublayer f with its norm n adds to the residual stream: pre x + f(n(x)), post n(x + f(x)), output x + n(f(x)), sandwich
    x + n'(f(n(x))).

    References: post: Vaswani et al. 2017, arXiv:1706.03762; pre: Xiong et al. 2020, arXiv:2002.04745; sandwich: Ding et al.
    2021, arXiv:2105.13290; output: Liu et al. 2022, arXiv:2111.09883; parallel: Chowdhery et al. 2022, arXiv:2204.02311, §2.
    """

    def __init__(self, config: ModelConfig, kind: Kind):
        norm = lambda wanted=True: make_norm(config) if wanted else None  # noqa: E731
        sandwich = config.norm_placement == "sandwich"
        self.attention_norm, self.attention_after = norm(not kind.opening), norm(sandwich)
        self.attention = LatentAttention(config) if config.latent.kv_rank else Attention(config, causal=kind.causal)
        self.cross_norm, self.cross_after = norm(kind.cross), norm(kind.cross and sandwich)
        self.cross = Attention(config, causal=False, cross=True) if kind.cross else None
        self.mlp_norm, self.mlp_after = norm(config.parallel != "one_norm"), norm(sandwich)
        self.mlp = MoE(config) if kind.experts else MLP(config)
        self.parallel, self.placement, self.rate = config.parallel, config.norm_placement, config.dropout
        self.noisy = kind.experts and config.moe.noisy

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        key: jax.Array | None,
        cache: Cache | None = None,
        local: Local = False,
        source: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Statistics]:
        """[B, T, D] -> [B, T, D], the layer's cache, and its experts' statistics.

        Args:
            source: [B, T, D], the residual stream that keys and values are made from; None: `x`.
        """
        keys = split(key, (3 if self.cross is None else 5) + self.noisy)
        noise = keys[-1] if self.noisy else None
        own, memory = divided(cache)
        entered = self._entered(x, self.attention_norm)
        how = {} if source is None else {"source": self._entered(source, self.attention_norm)}
        y, own = self.attention(entered, context, key=keys[0], cache=own, local=local, **how)
        branch = self._branch(y, self.attention_norm, self.attention_after, keys[1])
        if self.parallel != "none":
            entered = entered if self.mlp_norm is None else self._entered(x, self.mlp_norm)
            y, statistics = self._mlp(entered, context, noise)
            branch = branch + self._branch(y, self.mlp_norm or self.attention_norm, self.mlp_after, keys[2])
            return self._sum(x, branch, self.attention_norm), own, statistics
        x = self._sum(x, branch, self.attention_norm)
        if self.cross is not None:
            y, memory = self.cross(self._entered(x, self.cross_norm), context, key=keys[3], cache=memory)
            x = self._sum(x, self._branch(y, self.cross_norm, self.cross_after, keys[4]), self.cross_norm)
        y, statistics = self._mlp(self._entered(x, self.mlp_norm), context, noise)
        x = self._sum(x, self._branch(y, self.mlp_norm, self.mlp_after, keys[2]), self.mlp_norm)
        return x, joined(own, memory), statistics

    def _entered(self, x: jax.Array, norm: Any) -> jax.Array:
        return norm(x) if norm is not None and self.placement in ("pre", "sandwich") else x

    def _branch(self, y: jax.Array, norm: Any, after: Any, key: jax.Array | None) -> jax.Array:
        after = norm if self.placement == "output" else after
        return dropout(y if after is None else after(y), self.rate, key)

    def _sum(self, x: jax.Array, branch: jax.Array, norm: Any) -> jax.Array:
        x = constrain(x + branch, "batch", "length", None)
        return norm(x) if self.placement == "post" else x

    def _mlp(self, x: jax.Array, context: Context, key: jax.Array | None) -> tuple[jax.Array, Statistics]:
        if not isinstance(self.mlp, MoE):
            return self.mlp(x), {}
        return self.mlp(x, None if context.segments is None else context.segments != 0, key)


def divided(cache: Cache | None) -> tuple[Cache | None, Cache | None]:
    """A layer's cache as that of its own tokens and that of the memory."""
    if cache is None:
        return None, None
    own = {name: cache[name] for name in ("key", "value")}
    memory = {name: cache[f"memory_{name}"] for name in own if f"memory_{name}" in cache}
    return own, memory or None


def joined(own: Cache | None, memory: Cache | None) -> Cache | None:
    if own is None or memory is None:
        return own
    return own | {f"memory_{name}": value for name, value in memory.items()}


class Stack(base.Module):
    """L blocks; the parameters of all layers of a kind are stacked, [L of the kind, ...].

    With `layer_groups` G, only G layers have parameters and each serves L/G layers in a row (Lan et al. 2020, arXiv:1909.11942).
    """

    def __init__(self, config: ModelConfig, execution: Execution, *, causal: bool = True, cross: bool = False):
        self.config, self.execution = config, execution
        num_layers = config.decoder_layers if cross else config.num_layers
        kinds = layer_kinds(config, num_layers, causal=causal, cross=cross)
        for kind in dict.fromkeys(kinds):
            count = config.layer_groups or kinds.count(kind)
            with base.stacked(count):
                setattr(self, kind.name, Block(config, kind))
        self.kinds = tuple(kinds)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        key: jax.Array | None,
        cache: Cache | None = None,
        places: jax.Array | None = None,
        penultimate: bool = False,
    ) -> tuple[jax.Array, Cache | None, Statistics]:
        """[B, T, D] -> [B, T, D]; `cache` and the statistics hold each layer's along a leading axis.

        Args:
            penultimate: return what goes into the last layer too, as the statistic "penultimate", [B, T, D].
            places: [B or 1, T, D], absolute positions. The last layer then runs twice: what it is given, plus these, is what
                its queries are made from at first, its own result the second time; keys and values are made from what it is
                given both times. None: no mask decoder.

        Reference: He et al. 2021, arXiv:2006.03654, §3.2, as in the authors' code (microsoft/DeBERTa): two passes.
        """
        config, remat = self.config, self.execution.remat
        passes = len(self.kinds) + (places is not None)
        keys = None if key is None else jax.random.split(key, passes)
        local: Any = np.array([config.is_local(min(i, len(self.kinds) - 1)) for i in range(passes)])
        uniform = bool(local[0]) if bool(np.all(local == local[0])) else None
        source = None  # set when the last layer decodes masks

        def body(block: Block, carry: Any, inputs: Any) -> tuple[Any, Any]:
            layer_key, layer_cache, layer_local = inputs
            layer_local = uniform if uniform is not None else layer_local
            before = carry[0]
            x, new, statistics = block(
                before, context, key=layer_key, cache=layer_cache, local=layer_local, source=source
            )
            carry = x, before if penultimate else None
            return carry, (new, statistics | {"probe": x} if self.execution.probe else statistics)

        parts, before = [], x if penultimate else None
        for start, stop, layers in self._runs(places is not None):
            if places is not None and start == len(self.kinds) - 1:
                source, x = x, x + jnp.broadcast_to(places, x.shape)
            each = jax.tree.map(lambda a: a[start:stop], (keys, cache))  # noqa: B023
            inputs = (*each, None if uniform is not None else jnp.asarray(local[start:stop]))
            (x, before), made = base.scan(
                getattr(self, self.kinds[start].name),
                body,
                (x, before),
                inputs,
                layers=layers,
                loop=self.execution.scan,
                remat=remat != "none" and cache is None,
                checkpoint_policy=REMAT_POLICIES.get(remat),
            )
            parts.append(made)
        caches = None if cache is None else _concatenated([part[0] for part in parts])
        statistics = _concatenated([part[1] for part in parts if part[1]])
        return x, caches, statistics | {"penultimate": before} if penultimate else statistics

    def _runs(self, twice: bool = False) -> list[tuple[int, int, list[int] | None]]:
        """Runs of layers of one kind: first and last + 1, and which of the kind's parameters serve them; None: all, in order.

        Args:
            twice: the last layer is a run by itself, of two passes.
        """
        runs, used = [], dict.fromkeys(self.kinds, 0)
        groups, last = self.config.layer_groups, len(self.kinds) - 1
        for (kind, _), run in itertools.groupby(
            range(len(self.kinds)), key=lambda i: (self.kinds[i], twice and i == last)
        ):
            numbers = list(run)
            if groups:
                layers = [i * groups // len(self.kinds) for i in numbers]
            else:
                layers = list(range(used[kind], used[kind] + len(numbers)))
                used[kind] += len(numbers)
            if twice and numbers == [last]:
                numbers, layers = [last, last + 1], 2 * layers
            every = layers == list(range(groups or self.kinds.count(kind)))
            runs.append((numbers[0], numbers[-1] + 1, None if every else layers))
        return runs

    def layers_of(self, name: str) -> list[int]:
        """The numbers of the layers whose parameters are called `name`, in the order in which they are stacked."""
        if self.config.layer_groups:
            return list(range(self.config.layer_groups))
        return [i for i, kind in enumerate(self.kinds) if kind.name == name]

    def remember(self, memory: jax.Array) -> Cache:
        """Keys and values of cross attention in each layer, [L, B, S, J, K] each, under the names that a cache has for them."""

        def body(block: Block, carry: None, _: None) -> tuple[None, Cache]:
            return carry, block.cross.remember(memory)

        made = []
        for start, _, layers in self._runs():
            block = getattr(self, self.kinds[start].name)
            made.append(base.scan(block, body, None, None, layers=layers, loop=self.execution.scan)[1])
        return {f"memory_{name}": value for name, value in _concatenated(made).items()}


def layer_kinds(config: ModelConfig, num_layers: int, *, causal: bool, cross: bool) -> list[Kind]:
    """The kind of each layer."""
    moe = config.moe
    return [
        Kind(
            causal=causal,
            cross=cross,
            experts=moe.num_experts > 0 and i not in moe.dense_layers,
            opening=i == 0 and not config.first_norm,
        )
        for i in range(num_layers)
    ]


def _concatenated(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if parts else {}


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: str) -> Cache:
    """Keys and values of no tokens yet: [L, B, length, heads, width] each."""
    heads, key, value = cache_widths(config)
    decoder = config.architecture == "encoder-decoder"
    rows = (config.decoder_layers if decoder else config.num_layers, batch, length, heads)
    return {"key": jnp.zeros((*rows, key), dtype), "value": jnp.zeros((*rows, value), dtype)}
