"""The fingerprint of an array: literal values, what it catches, and independence of the mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxpretrain.fingerprint import fingerprint, named_leaves, nested


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (lambda: jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 8, 0x6D4EB972),
        (lambda: jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), 0x008ADDCF),
        (lambda: jnp.arange(5, dtype=jnp.float16), 0x6C654EE6),
        (lambda: jnp.arange(5, dtype=jnp.float8_e4m3fn), 0x581F189E),
        (lambda: jnp.arange(-3, 3, dtype=jnp.int8), 0x4B2D829A),
        (lambda: jnp.arange(250, 256, dtype=jnp.uint8), 0x99559A1B),
        (lambda: jnp.arange(-2, 4, dtype=jnp.int32), 0x6EB2F754),
        (lambda: jnp.arange(24, dtype=jnp.int32).reshape(2, 3, 4), 0xFD88F226),
        (lambda: jnp.uint32(2**32 - 1), 0x81F16F39),
        (lambda: jnp.float32(1), 0xB1AAB1B6),
        (lambda: jnp.array([True, False, True]), 0x7121DD75),
        (lambda: jnp.array([1 + 2j, 3 - 1j], jnp.complex64), 0xE8269FB6),
        (lambda: jnp.zeros((0, 3)), 0),
    ],
)
def test_fingerprints_never_change(array, expected):
    """Computed once by a separate program, byte by byte: another value makes every checkpoint on disk look damaged."""
    assert int(fingerprint(array())) == expected


def test_fingerprint_sees_what_plain_sums_do_not():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16), np.float32))
    same = int(fingerprint(x))
    assert int(fingerprint(x.at[0, 0].multiply(-1).at[5, 7].multiply(-1))) != same  # two sign bits
    assert int(fingerprint(x[::-1])) != same  # order
    assert int(fingerprint(x.at[3].set(0))) != same  # a region lost
    assert int(fingerprint(jnp.float32(0.0))) != int(fingerprint(jnp.float32(-0.0)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_fingerprint_is_the_same_on_every_mesh(kind):
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    for shape, spec in [
        ((8,), ("a",)),
        ((8,), (None, "a")),
        ((4,), ("a",)),
        ((2, 4), ("a", "b")),
        ((2, 4), (("b", "a"),)),
    ]:
        mesh = jax.make_mesh(
            shape, ("a", "b")[: len(shape)], axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)]
        )
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert int(fingerprint(sharded)) == 0xBB0D75A8


class Moments(NamedTuple):
    count: int
    mu: dict


def test_names_of_leaves_and_back():
    state = {"params": {"w": 1, "block": {"b": 2}}, "opt_state": (Moments(3, {"w": 4}), (), [5]), "step": 6}
    assert list(named_leaves(state)) == [
        "opt_state/0/count", "opt_state/0/mu/w", "opt_state/2/0", "params/block/b", "params/w", "step",
    ]  # fmt: skip
    assert nested({"a/b": 1, "a/c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
