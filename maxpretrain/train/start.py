"""Where a run's network and first parameters come from, with `init_from`: a published shape, published weights, another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxpretrain.config import Run, TokenizerConfig
from maxpretrain.data.tokenizer import load_tokenizer
from maxpretrain.environment import cache_directory
from maxpretrain.errors import UserError
from maxpretrain.mesh import Layout
from maxpretrain.models import Model, families
from maxpretrain.rundir import RunDirectory
from maxpretrain.train.state import State, state_shardings


def resolve(run: Run) -> tuple[Run, RunDirectory | None, list[str]]:
    """The run with the network (and, from a directory, the tokenizer) of what `init_from` names.

    Returns:
        The run, the directory that its parameters come from (None: fresh ones), and lines that say what was taken.

    Raises:
        UserError: it names neither a preset nor a directory, or the run asks for another tokenizer.
    """
    name = run.init_from
    if not name:
        return run, None, []
    presets = {key: value for family in families.FAMILIES.values() for key, value in family.PRESETS.items()}
    place = next((p for p in (Path(name).expanduser(), Path("runs", name)) if (p / "config.json").exists()), None)
    if name in presets:
        if place is not None:
            raise UserError(
                f'init_from "{name}" is a preset and a directory, {place}; name the directory by its whole path'
            )
        model = dataclasses.replace(presets[name], dropout=run.model.dropout)
        said = f"model: the shape of {name}, with fresh parameters, in place of the config's (but for dropout)"
        return run.replace(model=model), None, [said]
    if place is not None and place.resolve() == Path(run.root, run.name).expanduser().resolve():
        raise UserError(f"init_from {name} is the directory of this run; give the run another --name")
    directory = RunDirectory.open(name)
    model = dataclasses.replace(directory.config.model, dropout=run.model.dropout)
    tokenizer = _tokenizer(run, directory)
    lines = [f"model (but for dropout) and first parameters: {directory.path}, step {directory.step()}"]
    if tokenizer != run.tokenizer:
        lines.append(f"tokenizer: {tokenizer.path}")
    return run.replace(model=model, tokenizer=tokenizer), directory, lines


def _tokenizer(run: Run, directory: RunDirectory) -> TokenizerConfig:
    """The tokenizer that the parameters were trained with, copied to the cache, unless the run names a file of its own."""
    if run.tokenizer.path:
        return run.tokenizer
    tokenizer = directory.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{directory.path} has no tokenizer, and another's ids mean nothing to its weights; set tokenizer.path"
        )
    folder = cache_directory(run) / f"tokenizer-{tokenizer.fingerprint[:20]}"
    tokenizer.save(folder)
    return TokenizerConfig(kind=tokenizer.kind, path=str(folder))  # type: ignore[arg-type]


def kept(run: Run, before: Run, run_dir: Path) -> Run:
    """The run that goes on from its own checkpoints: nothing is asked of where it once began, nor of the cache."""
    place = Path(before.tokenizer.path).expanduser()
    if place.parent == cache_directory(run) and not place.exists():
        load_tokenizer(run_dir / "tokenizer").save(place)
    return run.replace(model=dataclasses.replace(before.model, dropout=run.model.dropout), tokenizer=before.tokenizer)


def initial_state(
    model: Model, optimizer: optax.GradientTransformation, layout: Layout, directory: RunDirectory, seed: int
) -> State:
    """A state at step 0 with the parameters of a directory, each placed where it belongs.

    Where the directory's objective had other parameters beside the network's, or kept these in another way, those that this
    one adds are fresh ones of `seed`.
    """
    params: Any = directory.params(directory.step(), layout)
    places = state_shardings(model, optimizer, layout)
    origin = directory.config.objective.build(directory.config.model)
    if not model.keeps_like(origin):
        adopt = lambda params, key: model.adopted(origin.plain(params), model.init(key))  # noqa: E731
        params = jax.jit(adopt, out_shardings=places["params"])(params, jax.random.key(seed))
    opt_state = jax.jit(optimizer.init, out_shardings=places["opt_state"])(params)
    return {"params": params, "opt_state": opt_state, "step": jax.device_put(jnp.zeros((), jnp.int32), places["step"])}
