"""Drawing tokens from a network's scores, and putting them into a sequence: device side of replaced token detection."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain import mesh
from maxpretrain.objectives.cross_entropy import num_chunks


def sampled(model: Any, params: Any, hidden: jax.Array, seeds: jax.Array) -> jax.Array:
    """Tokens drawn from softmax(logits), by the largest of logit + Gumbel noise; no gradient passes.

    The noise of a place is a function of its row's seed and its number alone: neither of the rows beside it, nor of how the
    batch is cut into chunks, microbatches or devices.

    Args:
        model: has `head(params)` and `logits(head, hidden)`.
        hidden: [B, M, D].
        seeds: uint32 [B, 2].

    Returns:
        int32 [B, M].

    Reference: Clark et al. 2020, arXiv:2003.10555, §3.1; the Gumbel trick: Maddison et al. 2014, arXiv:1411.0030.
    """
    head, hidden = jax.lax.stop_gradient((model.head(params), hidden))
    batch, count = hidden.shape[:2]
    chunks = num_chunks(batch, count, model.execution.loss_chunk, mesh.batch_parts())
    size = -(-count // chunks)
    numbers = jnp.arange(chunks * size, dtype=jnp.uint32).reshape(chunks, size)
    hidden = jnp.pad(hidden, [(0, 0), (0, chunks * size - count), (0, 0)])
    hidden = jnp.moveaxis(hidden.reshape(batch, chunks, size, -1), 1, 0)

    def noise(seed: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number)
        return jax.random.gumbel(key, (model.config.vocab_size,), jnp.float32)

    def draw(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, numbers = chunk
        added = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(seeds, numbers)
        scores = mesh.constrain(model.logits(head, hidden) + added, "batch", None, "vocab")
        return jnp.argmax(scores, -1).astype(jnp.int32)

    # [chunks, B, size]; a single chunk outside a loop, where XLA finds what the loss computes as well.
    rows = draw((hidden[0], numbers[0]))[None] if chunks == 1 else jax.lax.map(draw, (hidden, numbers))
    return jnp.moveaxis(rows, 0, 1).reshape(batch, chunks * size)[:, :count]


def placed(x: jax.Array, places: jax.Array, values: jax.Array, real: jax.Array) -> jax.Array:
    """`x` with other values at some places of each row.

    Args:
        x: [B, T].
        places: int32 [B, M], no real one twice in a row.
        values: [B, M].
        real: bool [B, M]; what is not real changes nothing.
    """
    rows = ("batch", None)
    beyond = jnp.where(real, places, jnp.asarray(x.shape[1], places.dtype))  # dropped
    put = jax.vmap(lambda x, at, values: x.at[at].set(values, mode="drop"))
    return mesh.per_device(put, [rows, rows, rows], rows)(x, beyond, values)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """log(1 + e^x) − y·x, as log(1 + e^∓x): float32 logits and bool labels of one shape -> float32."""
    return jax.nn.softplus(jnp.where(labels, -logits, logits))
