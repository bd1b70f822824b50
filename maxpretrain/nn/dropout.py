"""Dropout with the randomness as an argument."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and divides the rest by 1 − rate; the identity where `key` is None.

    Reference: Srivastava et al. 2014.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def split(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """`jax.random.split` that passes None (no randomness) through."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
