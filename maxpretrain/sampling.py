"""How the next token is chosen from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.errors import UserError

NOT_FINITE = -2  # in place of a token: its logits are no numbers


class Sampling(NamedTuple):
    """How tokens are drawn: logits / temperature, then the `top_k` likeliest, then the likeliest of probability `top_p`.

    Values may be traced, so that another temperature does not compile again.

    Attributes:
        seed: uint32; token number n of row r is drawn with the key (seed, r, n), whatever else is in the batch.
        temperature: float32 above 0.
        top_k: int32 in [1, V].
        top_p: float32 in (0, 1].
    """

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any


def settings(
    vocab_size: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> tuple[str, Sampling]:
    """The mode of `draw`, and its numbers, that a user's settings mean.

    Raises:
        UserError: one is out of range.
    """
    for wrong, what in (
        (not 0 <= temperature < float("inf"), f"temperature is {temperature}; it must be at least 0 and finite"),
        (top_k is not None and top_k < 1, f"top_k is {top_k}; it must be at least 1, or None for all tokens"),
        (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}; it must be above 0 and at most 1"),
    ):
        if wrong:
            raise UserError(what)
    top_k = vocab_size if top_k is None else min(top_k, vocab_size)
    top_p = 1.0 if top_p is None else top_p
    mode = "greedy" if temperature == 0 else "sample" if top_k == vocab_size and top_p == 1 else "filter"
    # Below the smallest normal number a division overflows; so near 0 only the likeliest token is left anyway.
    temperature = max(temperature, 1e-6)
    return mode, Sampling(np.uint32(seed % 2**32), np.float32(temperature), np.int32(top_k), np.float32(top_p))


def filtered(logits: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Logits with −∞ for what is not among the likeliest.

    A token is kept if its rank is below `top_k` and those before it have less than `top_p` of the probability that is left
    after `top_k`; so the likeliest always is. Tokens as likely as the last one kept are kept too.

    Args:
        logits: float32 [B, V], already divided by the temperature.
        top_k: int32 [].
        top_p: float32 [].

    Reference: Holtzman et al. 2020, arXiv:1904.09751, §3.1; the order is that of Hugging Face transformers.
    """
    ranked = -jnp.sort(-logits, axis=-1)
    rank = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, 1)
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # 1 means all: rounding must not cut the tail off.
    within = jnp.logical_or(rank == 0, jnp.logical_or(before < top_p, top_p >= 1.0))
    least = jnp.min(jnp.where(jnp.logical_and(rank < top_k, within), ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def draw(logits: jax.Array, number: jax.Array, sampling: Sampling, mode: str) -> jax.Array:
    """The next token of every row.

    Args:
        logits: float32 [B, V].
        number: int32 [B], how many tokens each row was given before.
        mode: "greedy" (the likeliest), "sample", or "filter" (sample with top_k and top_p).

    Returns:
        int32 [B]; NOT_FINITE for a row whose logits are NaN or infinite.
    """
    peak = jnp.max(logits, axis=-1)
    if mode != "greedy":
        logits = logits / sampling.temperature
        if mode == "filter":
            logits = filtered(logits, sampling.top_k, sampling.top_p)
        key = jax.random.key(sampling.seed, impl="threefry2x32")
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
        keys = jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n))(rows, number)
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        logits = logits + jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
    return jnp.where(jnp.isfinite(peak), jnp.argmax(logits, axis=-1).astype(jnp.int32), NOT_FINITE)
