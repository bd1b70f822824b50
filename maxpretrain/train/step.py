"""One optimizer step, as a pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxpretrain.config import BalanceConfig, OptimizerConfig
from maxpretrain.mesh import constrain
from maxpretrain.models import Model
from maxpretrain.objectives import Loss, Objective
from maxpretrain.objectives.balance import COUNTS, Whole, balanced, of_whole, spread, with_updated_bias
from maxpretrain.optim import clip
from maxpretrain.train.state import State

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def accumulate(
    loss_fn: Callable[[Any, Batch, jax.Array], Loss], params: Any, batch: Batch, key: jax.Array, microbatches: int
) -> tuple[Loss, Any]:
    """Loss of a batch and gradient of its sum, in `microbatches` parts, one after another.

    Sums are added and the division comes once, later: parts of unequal weight give what the whole gives.

    Args:
        batch: arrays [B, …]; part i is rows i, i + k, i + 2k, …, which leaves every device the rows that it has.
    """

    def one(batch: Batch, key: jax.Array) -> tuple[Loss, Any]:
        def total(params: Any) -> tuple[jax.Array, Loss]:
            loss = loss_fn(params, batch, key)
            return loss.sum, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, grads

    return summed(one, batch, key, microbatches)


def summed(one: Callable[[Batch, jax.Array], Any], batch: Batch, key: jax.Array, microbatches: int) -> Any:
    """The sum of `one` over the parts of a batch, each with a key of its own; see `accumulate`."""
    if microbatches == 1:
        return one(batch, key)

    def part(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return jnp.moveaxis(constrain(x, "batch", *[None] * (x.ndim - 1)), 1, 0)

    parts = (jax.tree.map(part, batch), jax.random.split(key, microbatches))
    sums = one(*jax.tree.map(lambda x: x[0], parts))
    body = lambda sums, x: (jax.tree.map(jnp.add, sums, one(*x)), None)  # noqa: E731
    return jax.lax.scan(body, sums, jax.tree.map(lambda x: x[1:], parts))[0]


def _updates(opt_state: Any) -> jax.Array:
    """Updates that the optimizer has made: what its schedule goes by."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """A metric's mean; NaN where the batch had nothing to count, which is left out of the record."""
    return jnp.where(weight > 0, total / jnp.maximum(weight, 1e-8), jnp.nan)


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    seed: int,
    microbatches: int,
    balance: BalanceConfig = BalanceConfig(),
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The function (state, batch) -> (state, metrics) of one step.

    A step whose loss or gradient norm is not finite changes nothing but the step number; metrics then has "skipped" 1.
    Dropout draws from a key of (seed, step), so that a resumed run draws the same.
    """

    needed = of_whole(balance, model.config.moe) if microbatches > 1 else "nothing"

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state["step"])
        batch = objective.normalized(batch, state["step"])

        def experts(batch: Batch, key: jax.Array) -> Whole:
            loss = objective.loss(model, state["params"], batch, key)
            names = loss.experts if needed == "all" else COUNTS  # for which XLA has no need of the network
            return Whole({name: loss.experts[name] for name in names}, loss.weight)

        whole = None if needed == "nothing" else summed(experts, batch, key, microbatches)
        loss, grads = accumulate(
            lambda params, batch, key: balanced(
                objective.loss(model, params, batch, key), balance, model.config.moe, whole
            ),
            state["params"],
            batch,
            key,
            microbatches,
        )
        with jax.named_scope("optimizer"):
            share = 1.0 / jnp.maximum(loss.weight, 1e-8)
            grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
            grads, norm = clip(grads, config)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            params = with_updated_bias(params, loss.experts, balance)
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        new_state = {
            "params": jax.tree.map(keep, params, state["params"]),
            "opt_state": jax.tree.map(keep, opt_state, state["opt_state"]),
            "step": state["step"] + 1,
        }
        metrics = {name: ratio(total, weight) for name, (total, weight) in loss.metrics.items()}
        if "task_loss" in metrics:  # what counts as the loss is the objective's own, whatever is added to it
            metrics["total_loss"] = loss.sum * share
        metrics |= spread(loss.experts) | {
            "loss": metrics.pop("task_loss", loss.sum * share),
            "grad_norm": norm,
            # The optimizer counts updates, which a skipped step is not.
            "learning_rate": learning_rate(_updates(state["opt_state"])),
            "predicted": loss.weight,
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        return new_state, metrics

    return train_step
