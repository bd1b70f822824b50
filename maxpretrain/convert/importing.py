"""A Hugging Face directory made into a run directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from maxpretrain import configio
from maxpretrain.convert.published import Published, open_published
from maxpretrain.errors import UserError
from maxpretrain.rundir import is_published


def import_directory(source: Path, name: str) -> dict[str, Any]:
    """Makes a run directory with the network, the tokenizer and one checkpoint, of step 0.

    Args:
        source: a Hugging Face directory.
        name: of the run, under runs/; or a path.

    Returns:
        "run", "class", "parameters", and "tokenizer", its kind or None.

    Raises:
        UserError: the source cannot be read, or the run exists; nothing was written.
        StorageError: the disk is full.
    """
    import jax
    import jax.numpy as jnp

    from maxpretrain.checkpoint import Checkpoints

    run_dir = (Path(name).expanduser() if os.sep in name else Path("runs", name)).absolute()
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir} exists; give the run another name, or remove it")
    if not source.is_dir():
        raise UserError(f"{source} is no directory; give the folder that holds config.json and model.safetensors")
    if not is_published(source):
        raise UserError(f"{source} has no config.json with a model_type, so it is no Hugging Face directory")
    published: Published = open_published(source)
    tokenizer = published.tokenizer
    partial = run_dir.with_name(f".{run_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        params = published.params()
        with Checkpoints(partial / "checkpoints") as checkpoints:
            state = {"params": params, "step": jnp.zeros((), jnp.int32)}
            checkpoints.save(0, state, published.meta(0), final=True)
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer")
        run = published.config.replace(name=run_dir.name, root=str(run_dir.parent))
        (partial / "config.json").write_text(configio.to_json(run), encoding="utf-8")
        if run_dir.exists():
            run_dir.rmdir()
        partial.rename(run_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "run": str(run_dir),
        "class": published.class_name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokenizer": None if tokenizer is None else tokenizer.kind,
    }
