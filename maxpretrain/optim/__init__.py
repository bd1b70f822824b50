"""Optimizers, schedules and clipping. Optax does the work; what is here is what Optax has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from maxpretrain.config import OptimizerConfig
from maxpretrain.errors import UserError, nearest
from maxpretrain.optim import adamw
from maxpretrain.optim.clipping import clip, global_norm
from maxpretrain.optim.schedules import Schedule, schedule

__all__ = [
    "DECAYED_ROLES",
    "OPTIMIZERS",
    "Schedule",
    "build_optimizer",
    "clip",
    "decay_mask",
    "global_norm",
    "schedule",
    "update_scales",
]

# Name -> build(config, learning_rate, decay_mask, scales). A new optimizer is one file and one line here.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Schedule, Any, Any], optax.GradientTransformation]] = {
    "adamw": adamw.build,
}

# Roles of parameters that weight decay applies to: not biases, norms and position tables.
DECAYED_ROLES = frozenset({"matrix", "embedding"})


def decay_mask(abstract: Any) -> Any:
    """True for the parameters that weight decay applies to, by their role.

    Args:
        abstract: pytree whose leaves have a `role`, as `Model.abstract`.

    Returns:
        Pytree of bool, of the same structure.
    """
    return jax.tree.map(lambda spec: spec.role in DECAYED_ROLES, abstract, is_leaf=lambda leaf: hasattr(leaf, "role"))


def update_scales(abstract: Any, ratio: float) -> Any:
    """What each parameter's update is multiplied by: under muP, matrices between widths learn at a rate that falls with the width.

    Args:
        abstract: pytree whose leaves have a `role` and `axes`, as `Model.abstract`.
        ratio: width of the tuned model by that of this one.

    Returns:
        Pytree of float; None where all would be 1.

    Reference: Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, table 8, Adam.
    """
    if ratio == 1.0:
        return None
    hidden = lambda spec: spec.role == "matrix" and "vocab" not in spec.axes  # noqa: E731
    return jax.tree.map(lambda s: ratio if hidden(s) else 1.0, abstract, is_leaf=lambda leaf: hasattr(leaf, "role"))


def build_optimizer(
    config: OptimizerConfig, *, steps: int, tokens_per_step: int, decay_mask: Any, scales: Any = None
) -> optax.GradientTransformation:
    """The update rule with its learning rate built in; clipping is apart (`clip`), so that the step can log the norm and
    decide on it.

    Args:
        config: which rule, and its numbers.
        steps: updates in the run.
        tokens_per_step: tokens of one update.
        decay_mask: pytree of bool, of the parameters' structure: where weight decay applies.
        scales: pytree of float, of the parameters' structure, that updates are multiplied by; None: by 1. Not weight decay.

    Returns:
        An Optax transformation. Its state counts updates from 0; `update` needs the parameters.

    Raises:
        UserError: no optimizer of that name, or a schedule that the run cannot follow.
    """
    build = OPTIMIZERS.get(config.name)
    if build is None:
        raise UserError(f'optimizer.name is "{config.name}", which is no optimizer{nearest(config.name, OPTIMIZERS)}')
    rate = schedule(config.schedule, peak_lr=config.peak_lr, steps=steps, tokens_per_step=tokens_per_step)
    return build(config, rate, decay_mask, scales)
