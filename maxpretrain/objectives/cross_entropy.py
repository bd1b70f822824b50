"""Cross entropy over a vocabulary, in chunks of tokens, so that the logits of a whole batch never exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain import mesh
from maxpretrain.objectives.base import Loss

Sums = dict[str, jax.Array]


def cross_entropy_sums(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Sums:
    """Weighted sums over the last axis of tokens, in float32.

    nll = log Z − logit[label]; loss = (1 − ε)·nll + ε·(log Z − mean logit) + c·log²Z.

    Args:
        logits: float32 [..., N, V].
        labels: int32 [..., N], any value where the weight is 0.
        weights: float32 [..., N].
        label_smoothing: ε in [0, 1), spread evenly over all V.
        z_loss: c ≥ 0.

    Returns:
        "loss", "nll", "correct" (the label's logit is the largest; a tie counts), float32 [...] each.

    Reference: smoothing: Szegedy et al. 2015, arXiv:1512.00567, §7; z-loss: Chowdhery et al. 2022, arXiv:2204.02311, §5.
    """
    peak = jax.lax.stop_gradient(jnp.max(logits, -1))
    log_z = peak + jnp.log(jnp.sum(jnp.exp(logits - peak[..., None]), -1))
    # A comparison instead of a gather: its gradient is elementwise (no scatter), and a vocabulary cut over devices stays so.
    at_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == labels[..., None]
    label_logit = jnp.sum(jnp.where(at_label, logits, 0.0), -1)
    nll = log_z - label_logit
    loss = nll
    if label_smoothing:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, -1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    total = lambda x: jnp.sum(jnp.where(weights > 0, x * weights, 0.0), -1)  # noqa: E731
    return {"loss": total(loss), "nll": total(nll), "correct": total((label_logit >= peak).astype(jnp.float32))}


ChunkLoss = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(chunk_loss: ChunkLoss, head: Any, hidden: jax.Array, targets: Any) -> tuple[jax.Array, Any]:
    """Sums chunk_loss(head, hidden[i], targets[i]) -> (sum, aux sums) over i. Gradients for head and hidden only."""
    rows = jax.lax.map(lambda x: chunk_loss(head, *x), (hidden, targets))
    return jax.tree.map(lambda x: jnp.sum(x, 0), rows)


def _forward(chunk_loss: ChunkLoss, head: Any, hidden: jax.Array, targets: Any) -> tuple[Any, Any]:
    # The gradient of a chunk is taken while its logits are at hand: they are neither kept nor computed again. It can
    # be taken before the cotangent is known because that is one scalar.
    def one(x: Any) -> tuple[Any, jax.Array]:
        loss, pullback, aux = jax.vjp(lambda head, h: chunk_loss(head, h, x[1]), head, x[0], has_aux=True)
        d_head, d_hidden = pullback(jnp.ones_like(loss))
        return ((loss, aux), d_head), d_hidden

    first, rest = jax.tree.map(lambda x: x[0], (hidden, targets)), jax.tree.map(lambda x: x[1:], (hidden, targets))
    sums, d_first = one(first)
    if hidden.shape[0] == 1:
        return sums[0], (sums[1], d_first[None])

    def body(sums: Any, x: Any) -> tuple[Any, jax.Array]:
        more, d_hidden = one(x)
        return jax.tree.map(jnp.add, sums, more), d_hidden

    sums, d_rest = jax.lax.scan(body, sums, rest)
    return sums[0], (sums[1], jnp.concatenate([d_first[None], d_rest]))


def _backward(chunk_loss: ChunkLoss, saved: Any, cotangent: Any) -> tuple[Any, Any, None]:
    scale = lambda x: x * cotangent[0].astype(x.dtype)  # noqa: E731
    return jax.tree.map(scale, saved[0]), scale(saved[1]), None


_over_chunks.defvjp(_forward, _backward)


def num_chunks(batch: int, length: int, chunk_tokens: int, shards: int) -> int:
    """Parts that the sequence is cut into, so that no device holds the logits of more than `chunk_tokens` tokens."""
    return min(length, max(1, -(-batch * length // (shards * chunk_tokens))))


def gathered(hidden: jax.Array, places: jax.Array) -> jax.Array:
    """Hidden states at some places of each row: [B, T, D] and int32 [B, M] -> [B, M, D].

    Logits at these alone cost M/T of those at all: six times less for BERT's 15 %.
    """
    whole, rows = ("batch", None, None), ("batch", None)
    hidden = mesh.constrain(hidden, *whole)  # each device has its rows whole
    take = lambda h, p: jnp.take_along_axis(h, p[..., None], 1, mode="clip")  # noqa: E731
    return mesh.per_device(take, [whole, rows], whole)(hidden, places)


def token_cross_entropy(
    model: Any,
    params: Any,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """Cross entropy of every token, unembedding `model.execution.loss_chunk` tokens at a time.

    Args:
        model: has `head(params)` and `logits(head, hidden)`.
        hidden: [B, T, D].
        labels: int32 [B, T].
        weights: float32 [B, T].

    Returns:
        The sum of the loss (differentiable with respect to params and hidden), and for each row the sums "nll" and "correct",
        float32 [B] (not differentiable).
    """
    return chunked_cross_entropy(
        model.logits,
        model.head(params),
        hidden,
        labels,
        weights,
        chunk_tokens=model.execution.loss_chunk,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def chunked_cross_entropy(
    logits: Callable[..., jax.Array],
    head: Any,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *more: jax.Array,
    chunk_tokens: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """`token_cross_entropy` of any scores over the vocabulary.

    Args:
        logits: (head, hidden [B, n, D], more [B, n] each) -> float32 [B, n, V].
        head: parameters that it reads, differentiated with respect to chunk by chunk.
        hidden, labels, weights: see `token_cross_entropy`.
        more: integer [B, T], whatever else the scores of a token need; no gradient.
        chunk_tokens: tokens of which a device has the scores at once.
    """
    batch, length = labels.shape
    chunks = num_chunks(batch, length, chunk_tokens, mesh.batch_parts())
    padding = -length % chunks

    def cut(x: jax.Array) -> jax.Array:
        # Chunks along the sequence: the batch stays cut over devices as it is.
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, (length + padding) // chunks, *x.shape[2:]), 1, 0)

    def chunk_loss(head: Any, hidden: jax.Array, targets: tuple[jax.Array, ...]) -> tuple[jax.Array, Sums]:
        labels, weights, *more = targets
        # Where nothing is predicted a NaN must not reach the gradient through 0 · NaN.
        hidden = jnp.where(weights[..., None] > 0, hidden, jnp.zeros((), hidden.dtype))
        scores = mesh.constrain(logits(head, hidden, *more), "batch", "length", "vocab")
        sums = cross_entropy_sums(scores, labels, weights, label_smoothing=label_smoothing, z_loss=z_loss)
        return jnp.sum(sums.pop("loss")), sums

    return _over_chunks(chunk_loss, head, cut(hidden), tuple(cut(x) for x in (labels, weights, *more)))


def label_loss(
    model: Any,
    params: Any,
    output: Any,
    batch: dict[str, jax.Array],
    *,
    label_smoothing: float,
    z_loss: float,
    groups: dict[str, jax.Array] | None = None,
) -> Loss:
    """The loss of a batch with "labels" and "weights" [B, U], of all hidden states of a network's `output` or of "places" [B, U].

    Args:
        groups: name -> bool [B], rows whose cross entropy is a metric of its own.

    Returns:
        With metrics "accuracy"; "cross_entropy" where smoothing or z-loss make the loss another; "loss_<name>" of groups.
    """
    hidden = gathered(output.hidden, batch["places"]) if "places" in batch else output.hidden
    how = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    total, sums = token_cross_entropy(model, params, hidden, batch["labels"], batch["weights"], **how)
    rows = batch["weights"].sum(-1)
    weight = rows.sum()
    metrics = {"accuracy": (sums["correct"].sum(), weight)}
    if label_smoothing or z_loss:
        metrics["cross_entropy"] = (sums["nll"].sum(), weight)
    for name, here in (groups or {}).items():
        metrics[f"loss_{name}"] = (jnp.where(here, sums["nll"], 0.0).sum(), jnp.where(here, rows, 0.0).sum())
    return Loss(total, weight, metrics, output.aux)
