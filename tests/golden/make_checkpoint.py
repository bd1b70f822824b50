"""Writes golden/checkpoint, a tiny checkpoint that every later version must read. Run once a release, on one device."""

from pathlib import Path

import jax.numpy as jnp

from maxpretrain.checkpoint import Checkpoints

state = {
    "params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 2, "b": jnp.array([1.0, -2.0], jnp.bfloat16)},
    "opt_state": {"mu": jnp.zeros((2, 3))},
    "step": jnp.uint32(7),
}
with Checkpoints(Path(__file__).parent / "checkpoint", keep=1, keep_best=True) as checkpoints:
    checkpoints.save(7, state, {"made": "for the test"}, metric=1.25, final=True)
