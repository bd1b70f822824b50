"""How a network knows where a token stands. Biases on attention scores that need parameters are in `relative.py`."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.modelconfig import RopeConfig

Angles = tuple[jax.Array, jax.Array]


def rotary_frequencies(
    rope: RopeConfig, width: int, *, length: int | None = None, local: bool = False
) -> tuple[np.ndarray, float]:
    """Frequencies of rotary positions: θ^(−2i/R), i = 0 … R/2 − 1, stretched as `rope.scaling` says.

    R, the entries of a head that turn, is the even part of width·fraction.

    Args:
        width: K, of a head; with latent attention `latent.rope_dim`.
        length: of this call's sequences; only "dynamic" reads it. None: as trained.
        local: of a layer with a window, which goes by `rope.local_theta`, unscaled, where there is one.

    Returns:
        float64 [R/2] in radians a token, and the factor of cosines and sines (1 but for "yarn").

    Raises:
        ValueError: R is 0, or too narrow for the scaling; `original_length` is needed and missing.

    Reference: Su et al. 2021, arXiv:2104.09864, §3.2. Scalings: linear: Chen et al. 2023, arXiv:2306.15595; ntk, dynamic
        and yarn: Peng et al. 2023, arXiv:2309.00071; llama3: the code of Llama 3.1. Here "dynamic" goes by this call's
        length alone; in transformers the longest length so far rules until one below the trained length comes.
    """
    turning = int(width * rope.fraction) // 2 * 2
    if turning == 0:
        raise ValueError(f"rope.fraction {rope.fraction} of a head of width {width} leaves no pair of entries to turn")
    if local and rope.local_theta is not None:
        return _powers(rope.local_theta, turning), 1.0
    match rope.scaling:
        case "none":
            return _powers(rope.theta, turning), 1.0
        case "linear":
            return _powers(rope.theta, turning) / rope.factor, 1.0
        case "ntk":
            return _powers(_raised(rope.theta, rope.factor, turning), turning), 1.0
        case "dynamic":
            trained = _trained(rope)
            stretch = rope.factor * max(length or 0, trained) / trained - (rope.factor - 1)
            return _powers(_raised(rope.theta, stretch, turning), turning), 1.0
        case "yarn":
            return _yarn(rope, turning), _yarn_factor(rope)
        case "llama3":
            return _llama3(rope, turning), 1.0
    raise ValueError(rope.scaling)


def _powers(theta: float, turning: int) -> np.ndarray:
    return theta ** (-np.arange(0, turning, 2, dtype=np.float64) / turning)


def _raised(theta: float, stretch: float, turning: int) -> float:
    """The base with which the slowest pair is stretched by `stretch` and the fastest not at all."""
    if turning == 2:
        raise ValueError("a single pair of rotary entries has no base to raise; scale with linear, or widen the head")
    return theta * stretch ** (turning / (turning - 2))


def _trained(rope: RopeConfig) -> int:
    if rope.original_length is None:
        raise ValueError(f'rope.scaling "{rope.scaling}" needs rope.original_length, the length before stretching')
    return rope.original_length


def _yarn(rope: RopeConfig, turning: int) -> np.ndarray:
    plain, trained = _powers(rope.theta, turning), _trained(rope)

    def index(turns: float) -> float:
        """Which pair makes so many turns within the trained length, as a real number."""
        return turning * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # There are R/2 pairs, yet the published bound is R − 1. It shows where the trained length is long against θ.
    first, last = max(first, 0), min(last, turning - 1)
    if first == last:
        last += 0.001
    ramp = np.clip((np.arange(turning // 2) - first) / (last - first), 0.0, 1.0)
    return plain * (1 - ramp) + plain / rope.factor * ramp


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor)


def yarn_scale(rope: RopeConfig) -> float:
    """What DeepSeek's latent attention multiplies its scale 1/√K with: (0.1·mscale_all_dim·ln(factor) + 1)².

    1 without scaling or `mscale_all_dim`. The square stands for the queries' and the keys' part, which other families
    have in the factor of cosines and sines; here it reaches the entries without position too.
    """
    if rope.scaling == "none" or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope.factor, rope.mscale_all_dim) ** 2


def _llama3(rope: RopeConfig, turning: int) -> np.ndarray:
    plain = _powers(rope.theta, turning)
    turns = _trained(rope) * plain / (2 * math.pi)  # within the trained length
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / rope.factor)


def rotary_angles(positions: jax.Array, frequencies: np.ndarray, factor: float = 1.0) -> Angles:
    """Cosines and sines of rotary positions.

    Args:
        positions: int32 [B, T] or [1, T].
        frequencies, factor: from `rotary_frequencies`.

    Returns:
        Two float32 [B, T, 1, R/2].
    """
    angles = (
        positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)[None, None, None, :]
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * jnp.float32(factor), sin * jnp.float32(factor))


def rotate(x: jax.Array, angles: Angles, layout: Literal["half", "interleaved"] = "half") -> jax.Array:
    """Rotates pairs among the first R entries of each head; the other K − R pass through.

    A pair is (x_i, x_{i+R/2}) in the layout "half" (Llama, GPT-NeoX) and (x_{2i}, x_{2i+1}) in "interleaved", and stays
    where it is. DeepSeek-V3 in transformers (`rope_interleave`) rotates interleaved pairs too, but leaves the result in the
    order of "half": queries and keys are permuted alike, so the scores are the same.

    Args:
        x: [B, T, H, K].
        angles: from `rotary_angles`, which say R.
    """
    half = angles[0].shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = (jnp.broadcast_to(a, (*x.shape[:-1], half)) for a in angles)
    turning = turning.astype(jnp.float32)
    if layout == "half":
        first, second = jnp.split(turning, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        pairs = turning.reshape(*x.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(turning.shape)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


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


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of ALiBi: scores get slope·(key − query) added, or slope·key, which differs by a constant along the keys.

    With N the greatest power of two up to H: 2^(−8i/N) for i = 1 … N, and for the H − N heads left over every other one of
    the slopes that 2N heads would have.

    Returns:
        float32 [H].

    Reference: Press, Smith and Lewis 2022, arXiv:2108.12409, §3; heads that are no power of two as in the authors' code and in
        BLOOM (BigScience Workshop 2022, arXiv:2211.05100).
    """
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8.0 * i / power for i in range(1, power + 1)]
    exponents += [4.0 * i / power for i in range(1, 2 * (num_heads - power), 2)]
    return np.exp2(-np.asarray(exponents)).astype(np.float32)
