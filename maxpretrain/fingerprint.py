"""A 32-bit fingerprint of an array, computed where the array lies and the same under every sharding.

    fingerprint(x) = Σ_i  mix(bits(x_i) + i · 0x9E3779B1)   mod 2³²

`i` is the element's row-major index, `bits` its bit pattern as an unsigned integer and `mix` murmur3's finalizer, which is a
bijection. An integer sum depends on no order, so neither do devices, meshes or layouts.

What it catches: any change confined to one element, always (a bijection cannot map two patterns to one); changes to
several elements, elements swapped or a region zeroed, each missed with a chance of about 2⁻³². (A plain product with an odd
multiplier would miss an even number of flipped sign bits: 2³¹·odd is 2³¹ mod 2³².) It is no defence against someone who
wants a collision.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

_GOLDEN = np.uint32(0x9E3779B1)  # odd, 2³² / golden ratio: neighbouring indices land far apart
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(h: jax.Array) -> jax.Array:
    """murmur3's 32-bit finalizer."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _words(x: jax.Array) -> list[jax.Array]:
    """The bit pattern of each element, as one array of uint32 for every 32 bits of it."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(x.real) + _words(x.imag)
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(jnp.int8)  # a bitcast would pack several elements into a byte
    size = x.dtype.itemsize
    if size == 8:
        halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [halves[..., 0], halves[..., 1]]
    return [jax.lax.bitcast_convert_type(x, _UNSIGNED[size]).astype(jnp.uint32)]


@jax.jit
def fingerprint(x: jax.Array) -> jax.Array:
    """The fingerprint of one array.

    Args:
        x: array of any shape, sharding and real, integer, boolean or complex dtype. Positions 2³² elements apart share a key.

    Returns:
        uint32 scalar on the same devices, replicated.
    """
    # The index comes from one iota per axis, never from a reshape: that would gather a sharded array.
    key = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        key = key + iota * np.uint32(stride * int(_GOLDEN) % 2**32)
        stride = stride * x.shape[axis]
    for word in _words(x):
        key = _mix(key + word)
    return jnp.sum(key, dtype=jnp.uint32)


def fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The fingerprint of each array: uint32 scalars, queued on the devices but on a CPU split into several, where they are awaited.

    There each is a program with a collective, and many of them in flight hold every thread in one that cannot finish.
    """
    prints = {}
    for name, leaf in leaves.items():
        prints[name] = fingerprint(leaf)
        devices = leaf.devices()
        if len(devices) > 1 and next(iter(devices)).platform == "cpu":
            prints[name].block_until_ready()
    return prints


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves of a pytree by name, as `params/blocks/attention/query`; list and tuple entries are numbered.

    Raises:
        ValueError: two leaves have one name, or a dict key is empty, `.`, `..` or holds a slash.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = "/".join(parts)
        if any(part in ("", ".", "..") or "/" in part for part in parts) or name in leaves:
            raise ValueError(f'the leaf "{name}" of the state has a name that cannot be stored; rename its keys')
        leaves[name] = leaf
    return leaves


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that names such as those of `named_leaves` stand for."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
