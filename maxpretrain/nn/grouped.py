"""Matrix products of rows that lie together by group, each group with a matrix of its own."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

# Rows of one step. On a CPU, 128 run as fast as one product of all rows; a GPU starts kernels for every step, so that a step
# must be worth it (not measured yet).
CPU_ROWS, GPU_ROWS = 128, 512


@jax.custom_vjp
def grouped(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """y[n] = x[n]·W[group of n], the groups being runs of rows from the first on.

    `jax.lax.ragged_dot` means the same, but XLA has it natively on TPUs only. Elsewhere it multiplies every row by every
    matrix, in memory for as many: with 8 groups on a CPU it took 7 times as long as what is here.

    Args:
        x: [N, I].
        kernel: [X, I, O], of the dtype of x.
        sizes: int32 [X], rows of each group, their sum at most N.

    Returns:
        [N, O]; rows behind the last group are zero.
    """
    return jax.lax.platform_dependent(
        x, kernel, sizes, tpu=_ragged, cpu=partial(_loop, CPU_ROWS), default=partial(_loop, GPU_ROWS)
    )


def _backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    dx, d_kernel = jax.lax.platform_dependent(
        *saved,
        dy,
        tpu=_ragged_backward,
        cpu=partial(_loop_backward, CPU_ROWS),
        default=partial(_loop_backward, GPU_ROWS),
    )
    return dx, d_kernel, None


grouped.defvjp(lambda x, kernel, sizes: (grouped(x, kernel, sizes), (x, kernel, sizes)), _backward)


def _ragged(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, kernel, sizes, preferred_element_type=x.dtype)


def _ragged_backward(x: jax.Array, kernel: jax.Array, sizes: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(lambda x, kernel: _ragged(x, kernel, sizes), x, kernel)[1](dy)


class _Steps:
    """The rows cut into steps of a fixed length that never reach over two groups: one for every `rows` begun in a group.

    A step near the end of the array begins early enough to fit, and masks what is not its own.
    """

    def __init__(self, sizes: jax.Array, rows: int, total: int):
        ends = jnp.cumsum(sizes)
        steps = (sizes + (rows - 1)) // rows
        last = jnp.cumsum(steps)
        number = jnp.arange(total // rows + sizes.shape[0], dtype=last.dtype)  # as many as there can be
        self.group = jnp.minimum(jnp.sum(last[None, :] <= number[:, None], 1, dtype=jnp.int32), sizes.shape[0] - 1)
        self.start = (ends - sizes)[self.group] + (number - (last - steps)[self.group]) * rows
        self.end = ends[self.group]
        self.at = jnp.clip(self.start, 0, total - rows)
        self.count, self.rows = last[-1], rows

    def take(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.at[step], self.rows)

    def own(self, step: jax.Array) -> jax.Array:
        """bool [rows, 1]: which rows of `take` belong to the step."""
        row = self.at[step] + jnp.arange(self.rows, dtype=self.at.dtype)
        return jnp.logical_and(row >= self.start[step], row < self.end[step])[:, None]


def _loop(rows: int, x: jax.Array, kernel: jax.Array, sizes: jax.Array, equation: str = "ni,io->no") -> jax.Array:
    """The product step by step, as many steps as the groups need: none for rows in no group."""
    total = x.shape[0]
    steps = _Steps(sizes, min(rows, total), total)
    width = kernel.shape[2 if equation == "ni,io->no" else 1]

    def body(step: jax.Array, y: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(kernel, steps.group[step], keepdims=False)
        product = jnp.einsum(equation, steps.take(x, step), weight, preferred_element_type=x.dtype)
        product = jnp.where(steps.own(step), product, steps.take(y, step))
        return jax.lax.dynamic_update_slice_in_dim(y, product, steps.at[step], 0)

    return jax.lax.fori_loop(0, steps.count, body, jnp.zeros((total, width), x.dtype))


def _loop_backward(
    rows: int, x: jax.Array, kernel: jax.Array, sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dx = _loop(rows, dy, kernel, sizes, "no,io->ni")
    steps = _Steps(sizes, min(rows, x.shape[0]), x.shape[0])

    def body(step: jax.Array, total: jax.Array) -> jax.Array:
        own = steps.own(step)
        rows_x, rows_dy = (jnp.where(own, steps.take(a, step), jnp.zeros((), a.dtype)) for a in (x, dy))
        product = jnp.einsum("ni,no->io", rows_x, rows_dy, preferred_element_type=jnp.float32)
        group = steps.group[step]
        before = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + product, group, 0)

    d_kernel = jax.lax.fori_loop(0, steps.count, body, jnp.zeros(kernel.shape, jnp.float32))
    return dx, d_kernel.astype(kernel.dtype)
