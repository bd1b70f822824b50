"""The train state: a plain dict {params, opt_state, step}, and where each leaf of it lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxpretrain.mesh import Layout
from maxpretrain.models import Model
from maxpretrain.nn.base import is_spec

State = dict[str, Any]


def state_shardings(model: Model, optimizer: optax.GradientTransformation, layout: Layout) -> State:
    """Placement of every leaf: optimizer moments lie where their parameter lies.

    This is given explicitly because `jit(optimizer.init)` under an Auto mesh replicates them: eight devices would
    each hold all of Adam's moments.
    """
    params = layout.param_shardings(model.abstract)
    structs = jax.tree.map(lambda spec: spec.struct, model.abstract, is_leaf=is_spec)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, structs),
        params,
        transform_non_params=lambda _: layout.replicated,
    )
    return {"params": params, "opt_state": opt_state, "step": layout.replicated}


def abstract_state(model: Model, optimizer: optax.GradientTransformation, layout: Layout) -> State:
    """Shapes, dtypes and placements: the target of a restore, and what the step is compiled for."""
    structs = jax.tree.map(lambda spec: spec.struct, model.abstract, is_leaf=is_spec)
    shapes = {
        "params": structs,
        "opt_state": jax.eval_shape(optimizer.init, structs),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, layout),
    )


def init_state(model: Model, optimizer: optax.GradientTransformation, layout: Layout, seed: int) -> State:
    """A fresh state, made in place on the devices that will hold it."""

    def make(key: jax.Array) -> State:
        params = model.init(key)
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    return jax.jit(make, out_shardings=state_shardings(model, optimizer, layout))(jax.random.key(seed))
