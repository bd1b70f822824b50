"""Gradient clipping: by value, then by global norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain.config import OptimizerConfig


def global_norm(tree: Any) -> jax.Array:
    """√Σ x² over every element of every leaf.

    The squares are summed in float32 whatever the leaves are: bfloat16 would lose all but the first 256 of equal terms.

    Args:
        tree: pytree of floating-point arrays.

    Returns:
        float32 []; 0 for an empty tree.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip(grads: Any, config: OptimizerConfig) -> tuple[Any, jax.Array]:
    """Clips every element to ± `clip_value`, then scales all to a global norm of at most `clip_norm`.

    Gradients whose norm is within the limit come back bit for bit. A norm that is not finite goes through (the gradients
    become NaN or zero): whoever applies the update tests the returned norm and skips the step.

    Args:
        grads: pytree of floating-point arrays.
        config: `clip_value` and `clip_norm`; None for no clipping of that kind.

    Returns:
        The clipped gradients, of the same dtypes, and the global norm before any clipping, float32 [].
    """
    norm = global_norm(grads)
    clipped_norm = norm
    if config.clip_value is not None:
        limit = config.clip_value
        grads = jax.tree.map(lambda g: jnp.clip(g, -limit, limit), grads)
        clipped_norm = global_norm(grads)
    if config.clip_norm is not None:
        # The maximum keeps a zero gradient from dividing by zero, and makes the factor exactly 1 within the limit.
        factor = config.clip_norm / jnp.maximum(clipped_norm, config.clip_norm)
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
    return grads, norm
