"""Mixture of experts: an MLP for each expert, of which every token goes through a few.

Tokens are put in order of their expert ("slots"), multiplied expert by expert, and put back. On a mesh every device does that
with its own experts: dropless, it gathers the tokens of the devices along the expert axis and sends each the sum of what its
experts made of them; with a capacity, each expert's places are exchanged instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxpretrain import mesh
from maxpretrain.config import ModelConfig
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Module, param
from maxpretrain.nn.grouped import grouped
from maxpretrain.nn.init import matrix
from maxpretrain.nn.linear import PRODUCT, einsum
from maxpretrain.nn.mlp import ACTIVATIONS, MLP
from maxpretrain.nn.router import TOKENS, Noise, Router, Statistics, route, smooth_load, statistics


class MoE(Module):
    """y = Σ_i weight_i·expert_i(x) over the k experts of a token, plus a shared MLP of it where there is one.

    Dropless (`capacity` None), every chosen expert sees the token. With a capacity factor c, an expert has ⌈c·T·k/X⌉ places in
    each sequence of length T, which go to tokens in the order of their positions: whether a token finds one depends on those
    before it alone, not on later tokens nor on the rest of the batch. One that finds none gets nothing from that expert.
    Padding takes no place, goes to no expert, and is not counted.

    References: Shazeer et al. 2017, arXiv:1701.06538; capacity: Lepikhin et al. 2020, arXiv:2006.16668, §2.2, and Fedus et al.
    2021, arXiv:2101.03961, §2.2, whose groups of tokens are our sequences; shared experts: Dai et al. 2024, arXiv:2401.06066.
    """

    def __init__(self, config: ModelConfig):
        moe = config.moe
        self.router = Router(config)
        self.noise = Noise(config) if moe.noisy else None
        zeros = partial(param, (moe.num_experts,), (None,), inits.zeros, "buffer")
        self.balance_bias = zeros() if moe.balance_bias else None
        self.experts = Experts(config)
        self.shared = MLP(config, moe.shared_dim) if moe.shared_dim else None
        self.config = moe

    def __call__(
        self, x: jax.Array, real: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Statistics]:
        """[B, T, D] -> [B, T, D], and the sums of `router.statistics`.

        Args:
            real: bool [B, T], false where there is padding; None: nowhere.
            key: what the router's noise is drawn from; None: there is none.
        """
        moe = self.config
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        clean = self.router(x)
        noisy, std = (clean, None) if self.noise is None or key is None else self.noise(x, clean, key)
        routing = route(noisy, moe, None if self.balance_bias is None else self.balance_bias[...])
        choice = jnp.where(real[..., None], routing.choice, moe.num_experts)
        places = None if moe.capacity is None else num_places(moe.capacity, x.shape[1], moe.top_k, moe.num_experts)
        y = self.experts(x, choice, routing.weights, places)
        if self.shared is not None:
            y = y + self.shared(x)
        said = statistics(routing, real, places)
        if self.noise is not None:
            drawn = std is not None
            said["smooth_load"] = smooth_load(clean, noisy, std, moe.top_k, real) if drawn else said["load"]
        return y, said


def num_places(capacity: float, length: int, top_k: int, num_experts: int) -> int:
    """Of an expert in a sequence: more than `length` would never be taken."""
    share = capacity * length * top_k / num_experts
    return min(length, math.ceil(share - 1e-9))  # 1.1·100/11 comes out as 10 and a bit


class Kernel(Module):
    """A matrix for each expert."""

    def __init__(self, config: ModelConfig, inputs: dict[str, int], outputs: dict[str, int], *, residual: bool = False):
        sizes = {"expert": config.moe.num_experts} | inputs | outputs
        initializer = matrix(config, *inputs.values(), *outputs.values(), residual=residual)
        self.kernel = param(tuple(sizes.values()), tuple(sizes), initializer, "matrix")


class Experts(Module):
    """The MLPs down(act(up(x))), or gated down(act(gate(x))·up(x)), without biases whatever the config says of those."""

    def __init__(self, config: ModelConfig):
        d, f = {"embed": config.model_dim}, {"mlp": config.expert_width}
        self.up = Kernel(config, d, f)
        self.gate = Kernel(config, d, f) if config.gated else None
        self.down = Kernel(config, f, d, residual=True)
        self.activation, self.num_experts = config.activation, config.moe.num_experts

    def __call__(self, x: jax.Array, choice: jax.Array, weights: jax.Array, places: int | None) -> jax.Array:
        """Σ_i weight_i·expert_i(x).

        Args:
            x: [B, T, D].
            choice: int32 [B, T, k]; `num_experts` for none.
            weights: float32 [B, T, k].
            places: of an expert in a sequence; None: as many as it needs.
        """
        wide, narrow = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        kernels = [(self.up, wide), (self.down, narrow)] + ([] if self.gate is None else [(self.gate, wide)])
        # Places are counted over whole sequences.
        tokens = TOKENS if places is None else ("batch", None, None)
        f = self._dropless if places is None else partial(self._limited, places)
        each = mesh.per_device(f, [tokens, tokens, tokens, *(axes for _, axes in kernels)], ("mlp", *tokens))
        # Cast before they are gathered, as in `linear.einsum`.
        y = each(x, choice, weights, *(kernel.kernel[...].astype(x.dtype) for kernel, _ in kernels))
        # Where "mlp" is cut, each device has the sum over a part of it.
        return mesh.constrain(jnp.sum(y, 0), "batch", "length", None)

    def _mlp(self, product: Callable[..., jax.Array], x: jax.Array, up: Any, down: Any, gate: Any = None) -> jax.Array:
        product = lambda x, kernel, f=product: checkpoint_name(f(x, kernel), PRODUCT)  # noqa: E731
        up, down = mesh.gather(up, "embed", 1), mesh.gather(down, "embed", 2)
        act, hidden = ACTIVATIONS[self.activation], product(x, up)
        hidden = act(hidden) if gate is None else act(product(x, mesh.gather(gate, "embed", 1))) * hidden
        return product(hidden, down)

    def _dropless(self, x: jax.Array, choice: jax.Array, weights: jax.Array, *kernels: jax.Array) -> jax.Array:
        """One device's part of `__call__`, [1, B, T, D]."""
        own = kernels[0].shape[0]
        flat, choice, weights = (mesh.gather(a.reshape(-1, a.shape[-1]), "expert", 0) for a in (x, choice, weights))
        choice = choice - mesh.part("expert") * own
        slots, sizes = dropless(jnp.where(jnp.logical_and(choice >= 0, choice < own), choice, own), own)
        y = self._mlp(lambda x, kernel: grouped(x, kernel, sizes), slots.spread(flat), *kernels)
        return mesh.scatter_sum(slots.collect(y, weights), "expert", 0).reshape(1, *x.shape)

    def _limited(
        self, places: int, x: jax.Array, choice: jax.Array, weights: jax.Array, *kernels: jax.Array
    ) -> jax.Array:
        """One device's part of `__call__`, [1, B, T, D]; [X, B·C] slots."""
        (rows, length, width), num_experts = x.shape, self.num_experts
        slots = limited(choice, num_experts, places)
        spread = slots.spread(x.reshape(-1, width)).reshape(num_experts, rows * places, width)
        y = self._mlp(partial(einsum, "xnd,xdf->xnf"), mesh.exchange(spread, "expert", 0, 1), *kernels)
        y = mesh.exchange(y, "expert", 1, 0).reshape(-1, width)
        return slots.collect(y, weights.reshape(rows * length, -1)).reshape(1, *x.shape)


class Slots(NamedTuple):
    """A slot for each choice of a token, by which rows go to experts and back.

    Both ways are gathers, and so are their gradients: JAX's own would scatter with addition, which is slow, and on a GPU adds
    in no fixed order.

    Attributes:
        of_choice: int32 [N, k]; the number of slots for a choice that has none.
        choice: int32 [slots], counted over [N, k]; N·k for an empty slot.
    """

    of_choice: jax.Array
    choice: jax.Array

    def spread(self, x: jax.Array) -> jax.Array:
        """Tokens [N, D] -> [slots, D], zero where a slot is empty."""
        return _spread(x, self.of_choice, self.choice)

    def collect(self, y: jax.Array, weights: jax.Array) -> jax.Array:
        """[slots, D] -> tokens [N, D]: the sum over a token's choices with float32 weights [N, k]."""
        return _collect(y, weights, self.of_choice, self.choice)


def dropless(choice: jax.Array, num_experts: int) -> tuple[Slots, jax.Array]:
    """Slots in order of experts, and int32 [X], how many each has.

    Args:
        choice: int32 [N, k], no two of a token the same expert; X for none.
    """
    tokens, k = choice.shape
    order = _sorted(choice.reshape(1, -1), num_experts)[0][0]
    sizes = jnp.zeros((num_experts,), jnp.int32).at[choice.reshape(-1)].add(1, mode="drop")
    number = jnp.arange(tokens * k, dtype=jnp.int32)
    total = tokens * min(k, num_experts)
    taken = number < jnp.sum(sizes)
    of_choice = number.at[order].set(jnp.where(taken, number, total), unique_indices=True)
    by_slot = jnp.where(taken, order, tokens * k)[:total]
    return Slots(of_choice.reshape(tokens, k), by_slot), sizes


def limited(choice: jax.Array, num_experts: int, places: int) -> Slots:
    """Slots [X, B, places]: a sequence's first choices of an expert, in order of positions, have one.

    Args:
        choice: int32 [B, T, k], no two of a token the same expert; X for none.
    """
    rows, length, k = choice.shape
    choices, total = length * k, num_experts * rows * places
    order, experts = _sorted(choice.reshape(rows, choices), num_experts)
    number = jax.lax.broadcasted_iota(jnp.int32, order.shape, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, order.shape, 0)
    first = jnp.concatenate([jnp.ones((rows, 1), bool), experts[:, 1:] != experts[:, :-1]], 1)
    place = number - jax.lax.cummax(jnp.where(first, number, 0), axis=1)
    kept = jnp.logical_and(experts < num_experts, place < places)
    slot = jnp.where(kept, (experts * rows + row) * places + place, total).reshape(-1)
    which = (row * choices + order).reshape(-1)
    of_choice = jnp.zeros_like(which).at[which].set(slot, unique_indices=True)
    by_slot = jnp.full((total,), rows * choices, jnp.int32).at[slot].set(which, mode="drop")
    return Slots(of_choice.reshape(rows * length, k), by_slot)


def _sorted(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Stable order of int32 [B, N] by expert in each row, and the experts in that order."""
    count = experts.shape[1]
    number = jax.lax.broadcasted_iota(jnp.int32, experts.shape, 1)
    if (num_experts + 1) * count < 2**31:
        # One number to sort by takes a fifteenth of the time of two on a CPU.
        key = jax.lax.sort(experts * count + number, dimension=1)
        return key % count, key // count
    experts, order = jax.lax.sort((experts, number), dimension=1, num_keys=1, is_stable=True)
    return order, experts


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], and zeros for an index behind the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _spread(x: jax.Array, of_choice: jax.Array, choice: jax.Array) -> jax.Array:
    return _rows(x, choice // of_choice.shape[1])


def _spread_backward(of_choice: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
    # One choice after the other: [N, k, D] never exists.
    dx = sum(_rows(dy, index).astype(jnp.float32) for index in of_choice.T)
    return dx.astype(dy.dtype), None, None


_spread.defvjp(lambda x, of_choice, choice: (_spread(x, of_choice, choice), of_choice), _spread_backward)


@jax.custom_vjp
def _collect(y: jax.Array, weights: jax.Array, of_choice: jax.Array, choice: jax.Array) -> jax.Array:
    pairs = zip(of_choice.T, weights.T, strict=True)
    return sum(_rows(y, index).astype(jnp.float32) * weight[:, None] for index, weight in pairs).astype(y.dtype)


def _collect_backward(saved: Any, dx: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    y, weights, of_choice, choice = saved
    d_slots = _rows(dx, choice // of_choice.shape[1]).astype(jnp.float32)
    dy = (d_slots * _rows(weights.reshape(-1), choice)[:, None]).astype(y.dtype)
    wide = dx.astype(jnp.float32)
    d_weights = [jnp.sum(_rows(y, index).astype(jnp.float32) * wide, -1) for index in of_choice.T]
    return dy, jnp.stack(d_weights, -1), None, None


_collect.defvjp(lambda *inputs: (_collect(*inputs), inputs), _collect_backward)
