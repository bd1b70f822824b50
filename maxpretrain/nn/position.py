"""How a network knows where a token stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary positions, frequency i being θ^(−2i/K).

    Args:
        positions: int32 [B, T] or [1, T].
        head_dim: K, even.

    Returns:
        Two float32 [B, T, 1, K/2].

    Reference: Su et al. 2021, arXiv:2104.09864, §3.2.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = (
        positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)[None, None, None, :]
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x_i, x_{i+K/2}) of each head (the half-split layout of Llama and GPT-NeoX).

    Args:
        x: [B, T, H, K].
        angles: from `rotary_angles`.
    """
    cos, sin = (jnp.broadcast_to(a, (*x.shape[:-1], x.shape[-1] // 2)) for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def sinusoids(positions: jax.Array, dim: int) -> jax.Array:
    """Fixed positions: sin(p·10000^(−2i/D)) at even and cos at odd columns.

    Args:
        positions: int32 [B, T].

    Returns:
        float32 [B, T, D].

    Reference: Vaswani et al. 2017, arXiv:1706.03762, §3.5.
    """
    frequencies = 10_000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None, :]
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
    return pairs.reshape(*positions.shape, -1)[..., :dim]
