"""Which experts a token goes to, the statistics of that choice, and the losses that balance it.

Statistics are sums over tokens: those of microbatches add up to those of the global batch, and those of layers, if wanted, to
those of the network. The losses take sums too, have no factor α in front, and may be given leading axes (of layers), which
they keep. Where there is no token they are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxpretrain import mesh
from maxpretrain.config import ModelConfig, MoEConfig
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Module, param
from maxpretrain.nn.init import matrix

Statistics = dict[str, jax.Array]
TOKENS = ("batch", "length", None)  # logical axes of [B, T, …]


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        choice: int32 [..., k], the chosen experts, best first, no two the same.
        weights: float32 [..., k], what the chosen experts' outputs are multiplied by.
        logits: float32 [..., X].
        probability: float32 [..., X], scores of all experts, adding up to 1.
    """

    choice: jax.Array
    weights: jax.Array
    logits: jax.Array
    probability: jax.Array


class Router(Module):
    """x·W in float32, for half the digits would often choose other experts."""

    def __init__(self, config: ModelConfig):
        d, x = config.model_dim, config.moe.num_experts
        self.kernel = param((d, x), ("embed", None), matrix(config, d, x), "matrix")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, X]."""
        # The default precision of a float32 product is bfloat16 on a TPU, TF32 on a GPU.
        return jnp.einsum("btd,dx->btx", x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class Noise(Module):
    """Noise on the logits, of a standard deviation softplus(x·W) + 0.01 that is learned for each expert; W begins at 0.

    Reference: Shazeer et al. 2017, arXiv:1701.06538, eq. 4 and appendix A (0.01: tensor2tensor's noisy_top_k_gating).
    """

    def __init__(self, config: ModelConfig):
        self.kernel = param((config.model_dim, config.moe.num_experts), ("embed", None), inits.zeros, "matrix")

    def __call__(self, x: jax.Array, clean: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, D] and logits float32 [B, T, X] -> logits with the noise drawn, and its standard deviations."""
        scale = jnp.einsum("btd,dx->btx", x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)
        std = jax.nn.softplus(scale) + 0.01
        return clean + std * jax.random.normal(key, clean.shape), std


def route(logits: jax.Array, config: MoEConfig, bias: jax.Array | None = None) -> Routing:
    """The k experts of highest score, and their weights.

    Scores are softmax(logits) or sigmoid(logits). `bias` is added for the choice only, and gets no gradient. With groups, the
    choice is among the experts of the best groups: by the sum of their two best scores (sigmoid: DeepSeek-V3), by their best
    (softmax: DeepSeek-V2). Of equal scores the lower number wins.

    Args:
        logits: float32 [B, T, X]; outside a mesh any leading axes.
        bias: [X].

    References: softmax, renormalized: Jiang et al. 2024, arXiv:2401.04088, §2.1; top 1: Fedus et al. 2021, arXiv:2101.03961;
    groups: DeepSeek-AI 2024, arXiv:2405.04434, §2.2.2; sigmoid, bias: DeepSeek-AI 2024, arXiv:2412.19437, §2.1.2.
    """
    if config.router == "softmax":
        scores = probability = jax.nn.softmax(logits)
    else:
        scores = jax.nn.sigmoid(logits)
        probability = scores / (jnp.sum(scores, -1, keepdims=True) + 1e-20)
    wanted = jax.lax.stop_gradient(scores)
    if bias is not None:
        wanted = wanted + jnp.broadcast_to(jax.lax.stop_gradient(bias), wanted.shape)
    # By each device for its own tokens: left to itself, XLA gathers the scores of all to sort them.
    choice = mesh.per_device(partial(_best, config), [TOKENS], TOKENS)(wanted)
    weights = mesh.per_device(lambda s, c: jnp.take_along_axis(s, c, -1), [TOKENS, TOKENS], TOKENS)(scores, choice)
    if config.renormalize:
        weights = weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20)
    return Routing(choice, weights * config.scale, logits, probability)


def _best(config: MoEConfig, wanted: jax.Array) -> jax.Array:
    wanted = _in_best_groups(wanted, config) if config.groups > 1 else wanted
    return jax.lax.top_k(wanted, config.top_k)[1]


def _in_best_groups(wanted: jax.Array, config: MoEConfig) -> jax.Array:
    """Scores [..., X] with −∞ for the experts outside the best groups."""
    grouped = wanted.reshape(*wanted.shape[:-1], config.groups, -1)
    counted = min(2 if config.router == "sigmoid" else 1, grouped.shape[-1])
    of_group = jnp.sum(jax.lax.top_k(grouped, counted)[0], -1)
    chosen = jax.lax.top_k(of_group, config.top_groups)[1][..., None]
    best = jnp.any(
        chosen == jax.lax.broadcasted_iota(jnp.int32, (*chosen.shape[:-1], config.groups), chosen.ndim - 1), -2
    )
    return jnp.where(best[..., None], grouped, -jnp.inf).reshape(wanted.shape)


def _by_expert(num_experts: int, values: jax.Array, choice: jax.Array) -> jax.Array:
    """Sums of what goes to each expert: [B, T, k] and int32 [B, T, k] -> [B, X]. Comparing with the number of every expert
    would take X operations for one."""
    rows = jax.lax.broadcasted_iota(jnp.int32, choice.shape, 0)
    return jnp.zeros((choice.shape[0], num_experts), values.dtype).at[rows, choice].add(values, mode="drop")


def statistics(routing: Routing, real: jax.Array, places: int | None = None) -> Statistics:
    """What the losses and the monitor need of a batch, over real tokens only.

    Args:
        routing: of [B, T] tokens.
        real: bool [B, T].
        places: of an expert in a sequence; None: as many as it needs.

    Returns:
        float32 sums, of these shapes: `load` [X], tokens that chose the expert; `probability` [X]; `importance` [X], of weights;
        `tokens` []; `logsumexp_squared` []; `entropy` [], of the probabilities, nats; `dropped` [], choices that found no
        place; `sequences` [], with any token; `sequence_balance` [], over sequences, of Σ f·P as DeepSeek-V3 has it (§2.1.2,
        eq. 17 to 20).
    """
    num_experts, k = routing.logits.shape[-1], routing.choice.shape[-1]
    mask = real.astype(jnp.float32)
    whole = ("batch", None, None)  # rows are not cut
    per_expert = mesh.per_device(partial(_by_expert, num_experts), [whole, whole], ("batch", None))
    each = jnp.broadcast_to(mask[..., None], routing.choice.shape)
    loads = per_expert(each, routing.choice)
    probabilities = jnp.einsum("bt,btx->bx", mask, routing.probability, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.sum(mask, 1)
    balance = jnp.sum(loads * probabilities, -1) * (num_experts / k) / jnp.square(jnp.maximum(lengths, 1.0))
    p = routing.probability
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny)), -1)
    over = jnp.zeros((), jnp.float32) if places is None else jnp.sum(jnp.maximum(loads - places, 0.0))
    return {
        "load": jnp.sum(loads, 0),
        "probability": jnp.sum(probabilities, 0),
        "importance": jnp.sum(per_expert(routing.weights * each, routing.choice), 0),
        "tokens": jnp.sum(lengths),
        "logsumexp_squared": jnp.sum(mask * jnp.square(jax.nn.logsumexp(routing.logits, -1))),
        "entropy": jnp.sum(mask * entropy),
        "dropped": over,
        "sequences": jnp.sum((lengths > 0).astype(jnp.float32)),
        "sequence_balance": jnp.sum(balance),
    }


def squared_variation(per_expert: jax.Array) -> jax.Array:
    """CV²: variance (of the population) over squared mean of importance or load [..., X]; 0 where all experts are equal.

    Reference: Shazeer et al. 2017, arXiv:1701.06538, eq. 6 to 7 and 11.
    """
    mean = jnp.mean(per_expert, -1)
    return jnp.var(per_expert, -1) / jnp.where(mean == 0, 1.0, jnp.square(mean))


def mean_square(per_expert: jax.Array) -> jax.Array:
    """1/X Σ_x (Σ_tokens G_x)²: of importance [..., X]. Unlike CV² it grows with the square of the number of tokens."""
    return jnp.mean(jnp.square(per_expert), -1)


def counted_load_loss(load: jax.Array, tokens: jax.Array) -> jax.Array:
    """X/N² Σ_x load_x² of N tokens: k² where even, k·X where all choose the same. Counts have no gradient: it is to watch."""
    return load.shape[-1] * jnp.sum(jnp.square(load), -1) / jnp.square(jnp.maximum(tokens, 1.0))


def smooth_load(
    clean: jax.Array, noisy: jax.Array, noise_std: jax.Array, top_k: int, real: jax.Array | None = None
) -> jax.Array:
    """Load with a gradient, of a router that chooses by noisy logits: Σ_tokens P(x), where P(x) = Φ((clean_x − threshold_x)/std_x)
    is the probability that x is chosen when its noise alone is drawn again, the threshold being the k-th best of the others.

    Args:
        clean, noisy: float32 [B, T, X], logits without and with the noise drawn; outside a mesh any leading axes.
        noise_std: [B, T, X], or a shape that broadcasts to it with as many axes.
        real: bool [B, T], false where there is padding; None: nowhere.

    Returns:
        [X]; its `squared_variation` is the loss.

    Reference: Shazeer et al. 2017, arXiv:1701.06538, appendix A.
    """
    mask = jnp.ones(clean.shape[:-1], jnp.float32) if real is None else real.astype(jnp.float32)
    if top_k >= clean.shape[-1]:
        chosen = jnp.ones_like(clean)
    else:
        best = mesh.per_device(lambda x: jax.lax.top_k(x, top_k + 1)[0], [TOKENS], TOKENS)(noisy)
        last_in, first_out = best[..., top_k - 1 : top_k], best[..., top_k:]
        threshold = jnp.where(noisy > first_out, first_out, last_in)
        chosen = jax.scipy.stats.norm.cdf((clean - threshold) / noise_std)
    return jnp.sum(chosen * mask[..., None], tuple(range(clean.ndim - 1)))


def switch_loss(load: jax.Array, probability: jax.Array, tokens: jax.Array) -> jax.Array:
    """X Σ_x f_x·P_x, f_x = load_x/N, P_x = probability_x/N: 1 where all is even and k is 1. With k choices a token it is k where
    even, as transformers has it; divide by k for 1.

    Reference: Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6.
    """
    count = jnp.maximum(tokens, 1.0)
    return load.shape[-1] * jnp.sum(load * probability, -1) / jnp.square(count)


def router_z_loss(logsumexp_squared: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean over tokens of logsumexp(logits)², which keeps logits small.

    Reference: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return logsumexp_squared / jnp.maximum(tokens, 1.0)


def sequence_loss(sequence_balance: jax.Array, sequences: jax.Array) -> jax.Array:
    """Mean over sequences of Σ_x f_x·P_x, f_x = X/(k·T)·load_x and P_x the mean probability: 1 where even.

    Reference: DeepSeek-AI 2024, arXiv:2412.19437, eq. 17 to 20.
    """
    return sequence_balance / jnp.maximum(sequences, 1.0)


def updated_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """The balance bias after a step: up by `rate` for experts below the mean load, down above it.

    Args:
        bias, load: [..., X].

    Reference: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    return bias + rate * jnp.sign(jnp.mean(load, -1, keepdims=True) - load)


# Name -> (statistics, k) -> loss.
LOSSES: Mapping[str, Callable[[Statistics, int], jax.Array]] = {
    "importance": lambda s, k: squared_variation(s["importance"]),
    "importance_mean_square": lambda s, k: mean_square(s["importance"]),
    "smooth_load": lambda s, k: squared_variation(s["smooth_load"]),
    "importance_load": lambda s, k: squared_variation(s["importance"]) + squared_variation(s["smooth_load"]),
    "load": lambda s, k: counted_load_loss(s["load"], s["tokens"]),
    "switch": lambda s, k: switch_loss(s["load"], s["probability"], s["tokens"]),
    "switch_mean": lambda s, k: switch_loss(s["load"], s["probability"], s["tokens"]) / k,
    "sequence": lambda s, k: sequence_loss(s["sequence_balance"], s["sequences"]),
    "z": lambda s, k: router_z_loss(s["logsumexp_squared"], s["tokens"]),
}
