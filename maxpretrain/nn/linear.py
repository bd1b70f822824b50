"""Linear maps. Every contraction of activations with parameters goes through `einsum`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxpretrain import mesh
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Initializer, Module, param

PRODUCT = "product"  # what remat "dots" saves; a policy does not see inside a function that has a gradient of its own


def einsum(spec: str, x: jax.Array, kernel: jax.Array, *, out: jnp.dtype | None = None) -> jax.Array:
    """Contracts activations with a parameter in the activations' dtype.

    The kernel is cast here, at its use: under FSDP it is then gathered in the compute dtype, at half the bytes of float32.

    Args:
        out: dtype of the result (float32 logits from bfloat16 operands, say); None: that of `x`.
    """
    return jnp.einsum(spec, x, kernel.astype(x.dtype), preferred_element_type=out or x.dtype)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x·W over the last axis of x: [..., I] and [I, O] of one dtype -> [..., O]."""
    return jnp.einsum("...i,io->...o", x, kernel, preferred_element_type=x.dtype)


def _project_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = jnp.einsum("...o,io->...i", dy, kernel, preferred_element_type=x.dtype)
    if mesh.parts("length") == 1:
        # As a product of matrices, which XLA's CPU backend hands to the library as it is. Over several axes of tokens it first
        # copies the first operand into transposed form, and in doing so computes again, badly vectorized, what made it.
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    tokens = tuple(range(x.ndim - 1))
    product = lambda a, b: jnp.tensordot(a, b, (tokens, tokens), preferred_element_type=x.dtype)  # noqa: E731
    # Narrow operand first: with more rows than columns the same product takes up to twice as long on a CPU.
    return dx, product(x, dy) if x.shape[-1] <= dy.shape[-1] else product(dy, x).T


project.defvjp(lambda x, kernel: (project(x, kernel), (x, kernel)), _project_backward)


class Linear(Module):
    """y = x·W + b over the last `inputs` axes of x, with the shape `outputs` in their place."""

    def __init__(
        self,
        inputs: dict[str | None, int],
        outputs: dict[str | None, int],
        initializer: Initializer,
        *,
        bias: bool,
        bias_axes: tuple[str | None, ...] | None = None,
    ):
        """
        Args:
            inputs, outputs: logical axis -> size, in order.
            bias_axes: logical axes of the bias; None: those of the outputs.
        """
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = param(shape, axes, initializer, "matrix")
        self.bias = param(tuple(outputs.values()), bias_axes or tuple(outputs), inits.zeros, "bias") if bias else None
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        n = self.num_inputs
        contracted, kept = kernel.shape[:n], kernel.shape[n:]
        # As one plain matrix product: the CPU and GPU libraries know no faster shape.
        flat = x.reshape(*x.shape[: x.ndim - n], math.prod(contracted)) if n > 1 else x
        y = checkpoint_name(
            project(flat, kernel.reshape(math.prod(contracted), math.prod(kept)).astype(x.dtype)), PRODUCT
        )
        y = y.reshape(*y.shape[:-1], *kept)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)
        return y
