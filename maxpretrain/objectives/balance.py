"""What keeps experts evenly loaded: a loss beside the objective's, and a bias that follows the load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxpretrain.config import BalanceConfig, MoEConfig
from maxpretrain.nn import router
from maxpretrain.objectives.base import Loss

# Stacks with experts, in the order in which a network reports on its layers.
STACKS = ("encoder", "decoder", "multi_token")


# Losses that are a sum over tokens or sequences divided by the number of these: they need no more of the whole batch.
MEANS = ("sequence", "z")
COUNTS = ("tokens", "sequences")


class Whole(NamedTuple):
    """What the experts of a whole batch did, where the loss at hand is of one microbatch.

    Attributes:
        experts: those of `Loss.experts` that `of_whole` names, summed over the microbatches.
        weight: float32 [], of the batch.
    """

    experts: dict[str, jax.Array]
    weight: jax.Array


def of_whole(config: BalanceConfig, moe: MoEConfig) -> str:
    """What the losses of microbatches need of the whole batch: "nothing", "counts" of tokens, or "all" statistics."""
    if not moe.num_experts or config.over == "microbatch":
        return "nothing"
    if config.loss not in ("none", *MEANS) and config.weight:
        return "all"
    return "counts" if config.z_weight or (config.loss != "none" and config.weight) else "nothing"


def balanced(loss: Loss, config: BalanceConfig, moe: MoEConfig, whole: Whole | None = None) -> Loss:
    """L_task + α·L_balance + c·L_z, means over the layers with experts, and what the monitor shows of the experts.

    Statistics S are over all tokens of the batch, on all devices, without padding. A mean is the sum of what each microbatch
    divides by the number of all. Another loss E(Σ S_m) is no sum, but its gradient is, Σ_m ∇E(S)·∇S_m: so each microbatch
    adds its own part of that.

    Args:
        loss: with `experts` of a network that has some; else it is returned as it is.
        whole: of the batch that this is a microbatch of; None: the loss is of the batch, or of a microbatch by itself.

    Returns:
        The sum grows by the added losses times the weight, so that the mean grows by them. Metrics, besides: "task_loss", the
        objective's own; "load_balance" and "router_z", the added losses without their factors; "router_entropy", nats;
        "expert_load" [X], tokens of each expert as a factor of an even share; "dropped", share of the choices that found no
        place. `experts` then holds the "load" alone, float32 [L, X].

    References: see `nn.router.LOSSES`.
    """
    if "load" not in loss.experts:
        return loss._replace(experts={}) if loss.experts else loss
    said = loss.experts
    whole = Whole(said, loss.weight) if whole is None else whole
    total, metrics = loss.sum, {**loss.metrics, "task_loss": (loss.sum, loss.weight)}
    with jax.named_scope("balance"):
        for name, kind, factor in (("load_balance", config.loss, config.weight), ("router_z", "z", config.z_weight)):
            if kind == "none" or (kind == "z" and not factor):
                continue
            value = partial(_value, kind, moe.top_k)
            if kind in MEANS:
                extra = value(said | {name: whole.experts[name] for name in COUNTS}) * whole.weight
            else:
                extra = _part(value, said, whole, loss.weight)
            total = total + factor * extra
            metrics[name] = (extra, loss.weight)
    tokens = jnp.sum(said["tokens"])
    choices = said["tokens"] * moe.top_k
    metrics["router_entropy"] = (jnp.sum(said["entropy"]), tokens)
    metrics["expert_load"] = (
        moe.num_experts * jnp.sum(said["load"], 0),
        jnp.broadcast_to(jnp.sum(choices), (moe.num_experts,)),
    )
    if moe.capacity is not None:
        metrics["dropped"] = (jnp.sum(said["dropped"]), jnp.sum(choices))
    return Loss(total, loss.weight, metrics, {"load": said["load"]})


def _part(
    value: Callable[[dict[str, jax.Array]], jax.Array], said: dict[str, jax.Array], whole: Whole, weight: jax.Array
) -> jax.Array:
    """A microbatch's part of value(S)·weight of the whole batch, by value and by gradient."""
    extra, slope = jax.value_and_grad(value)(jax.lax.stop_gradient(whole.experts))
    change = jax.tree.map(
        lambda s, x: jnp.sum(s * (x - jax.lax.stop_gradient(x))), slope, said
    )  # 0, but for its gradient
    return extra * weight + sum(jax.tree.leaves(change), start=jnp.zeros(())) * whole.weight


def spread(experts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """ "expert_load_spread": the coefficient of variation of the load within a layer, mean over the layers; nothing without experts."""
    return {"expert_load_spread": jnp.mean(jnp.sqrt(router.squared_variation(experts["load"])))} if experts else {}


def _value(kind: str, top_k: int, statistics: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(router.LOSSES[kind](statistics, top_k))


def with_updated_bias(params: dict[str, Any], experts: dict[str, jax.Array], config: BalanceConfig) -> dict[str, Any]:
    """The parameters with the balance bias of each layer moved against its load, where there is such a bias.

    Args:
        experts: "load" float32 [L, X] of the whole batch, layers in the order of `STACKS`.

    Reference: Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-AI 2024, arXiv:2412.19437, §2.1.2.
    """
    if not experts or not config.bias_rate:
        return params
    first = 0
    for name in STACKS:
        found = params.get(name, {}).get("stack", {}).get("experts", {}).get("mlp", {})
        if "balance_bias" not in found:
            continue
        bias = found["balance_bias"]
        load = experts["load"][first : first + len(bias)]
        first += len(bias)
        params = _with(
            params, (name, "stack", "experts", "mlp", "balance_bias"), router.updated_bias(bias, load, config.bias_rate)
        )
    return params


def _with(tree: dict[str, Any], path: tuple[str, ...], leaf: jax.Array) -> dict[str, Any]:
    """A copy of nested dicts with another leaf."""
    name, *rest = path
    return tree | {name: _with(tree[name], tuple(rest), leaf) if rest else leaf}
