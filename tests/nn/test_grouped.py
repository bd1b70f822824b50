"""Products by group against a loop over rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.nn import grouped as module
from maxpretrain.nn.grouped import grouped

SIZES = [
    [5, 0, 17, 1, 0, 9],  # some empty
    [0, 0, 0, 0, 0, 0],
    [40, 0, 0, 0, 0, 0],  # all in the first
    [0, 0, 0, 0, 0, 40],  # all in the last
    [8, 8, 8, 8, 8, 0],  # whole steps
    [7, 7, 7, 7, 7, 5],
]


def arrays(rows=40, groups=6, inputs=3, outputs=4):
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, inputs)), rng.normal(size=(groups, inputs, outputs)), rng.normal(size=(rows, outputs))


def by_row(x, kernel, dy, sizes):
    """Product and gradients in float64."""
    y, dx, d_kernel = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)
    for n, g in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[n], dx[n] = x[n] @ kernel[g], kernel[g] @ dy[n]
        d_kernel[g] += np.outer(x[n], dy[n])
    return y, dx, d_kernel


@pytest.mark.parametrize("way", ["public", "steps of 8", "steps of 512", "ragged"])
def test_against_a_loop(way):
    x, kernel, dy = arrays()
    f, backward = {
        "public": (grouped, lambda *a: jax.vjp(lambda x, k: grouped(x, k, a[2]), *a[:2])[1](a[3])),
        "steps of 8": (partial(module._loop, 8), partial(module._loop_backward, 8)),
        "steps of 512": (partial(module._loop, 512), partial(module._loop_backward, 512)),
        "ragged": (module._ragged, module._ragged_backward),
    }[way]
    f, backward = jax.jit(f), jax.jit(backward)
    for sizes in SIZES:
        inputs = [jnp.asarray(a, jnp.float32) for a in (x, kernel)] + [jnp.asarray(sizes, jnp.int32)]
        y, dx, d_kernel = by_row(x, kernel, dy, sizes)
        np.testing.assert_allclose(f(*inputs), y, atol=1e-5)
        got = backward(*inputs, jnp.asarray(dy, jnp.float32))
        np.testing.assert_allclose(got[0], dx, atol=1e-5)
        np.testing.assert_allclose(got[1], d_kernel, atol=1e-5)


def test_bfloat16_sums_in_float32():
    # 4096 products of 1: bfloat16 would stop at 256.
    x, dy = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    kernel, sizes = jnp.ones((2, 1, 1), jnp.bfloat16), jnp.asarray([4096, 0], jnp.int32)
    d_kernel = jax.jit(jax.grad(lambda k: jnp.vdot(grouped(x, k, sizes), dy)))(kernel)
    assert d_kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(d_kernel.astype(jnp.float32), [[[4096.0]], [[0.0]]])


def test_on_a_tpu_it_is_the_native_product():
    x, kernel, _ = arrays()
    inputs = [jnp.asarray(a, jnp.bfloat16) for a in (x, kernel)] + [jnp.asarray(SIZES[0], jnp.int32)]
    loss = jax.grad(lambda x, k, s: grouped(x, k, s).astype(jnp.float32).sum(), (0, 1))
    tpu = jax.export.export(jax.jit(loss), platforms=["tpu"])(*inputs).mlir_module()
    cpu = jax.export.export(jax.jit(loss), platforms=["cpu"])(*inputs).mlir_module()
    assert "ragged_dot" in tpu
    assert "while" not in tpu
    assert "ragged_dot" not in cpu
    assert "while" in cpu
