"""Where a run's network and first parameters come from, with `init_from`: a published shape, published weights, another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxpretrain.config import Run, TokenizerConfig
from maxpretrain.convert.tokenizers import SENTENCEPIECE_FILES
from maxpretrain.data.tokenizer import Tokenizer, load_tokenizer
from maxpretrain.data.tokenizer_base import MANIFEST
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
    place = Path(name).expanduser()
    if name in presets and not place.exists():
        model = dataclasses.replace(presets[name], dropout=run.model.dropout)
        return run.replace(model=model), None, [f"model: the shape of {name}, with fresh parameters"]
    directory = RunDirectory.open(name)
    model = dataclasses.replace(directory.config.model, dropout=run.model.dropout)
    tokenizer = _tokenizer(run.tokenizer, directory)
    lines = [f"model and first parameters: {directory.path}, step {directory.step()}"]
    if tokenizer != run.tokenizer:
        lines.append(f"tokenizer: {tokenizer.path}")
    return run.replace(model=model, tokenizer=tokenizer), directory, lines


def _tokenizer(asked: TokenizerConfig, directory: RunDirectory) -> TokenizerConfig:
    """The tokenizer that the parameters were trained with, unless the run names a file of its own."""
    if asked.path:
        return asked
    tokenizer = directory.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{directory.path} has no tokenizer, and another's ids mean nothing to its weights; set tokenizer.path"
        )
    files = (MANIFEST, "tokenizer.json", *SENTENCEPIECE_FILES)
    places = [directory.path / name for name in ("tokenizer", *files)]
    path = next(place for place in places if place.exists() and _is(place, tokenizer))
    path = path.parent if path.name == MANIFEST else path
    return TokenizerConfig(kind=tokenizer.kind, path=str(path))  # type: ignore[arg-type]


def _is(place: Path, tokenizer: Tokenizer) -> bool:
    return load_tokenizer(place.parent if place.name == MANIFEST else place).fingerprint == tokenizer.fingerprint


def initial_state(
    model: Model, optimizer: optax.GradientTransformation, layout: Layout, directory: RunDirectory
) -> State:
    """A state at step 0 with the parameters of a directory, each placed where it belongs."""
    params: Any = directory.params(directory.step(), layout)
    places = state_shardings(model, optimizer, layout)
    opt_state = jax.jit(optimizer.init, out_shardings=places["opt_state"])(params)
    return {"params": params, "opt_state": opt_state, "step": jax.device_put(jnp.zeros((), jnp.int32), places["step"])}
