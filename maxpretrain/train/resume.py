"""May this run go on in that directory? Decided before anything is prepared, compiled or written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from maxpretrain import configio
from maxpretrain.config import Run
from maxpretrain.errors import UserError

# What makes a run what it is: another value means other parameters, other data or another order of it. A name ends with a dot
# where it stands for all fields below it.
FIXED = (
    "seed",
    "init_from",
    "model.",
    "objective.",
    "tokenizer.",
    "data.train",
    "data.weights",
    "data.validation",
    "data.split",
    "data.text_field",
    "data.tfds_split",
    "data.separator",
    "data.shuffle",
    "batch.size",
    "batch.length",
    "optimizer.name",
    "optimizer.moment_dtype",
)
# Where the text and the tokenizer lie may change: their contents are compared, once they are prepared.
PLACES = ("data.train", "data.validation", "tokenizer.path")


def differences(old: Run, new: Run) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every field that differs."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for name, value in tree.items():
            leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return leaves

    before, after = flat(configio.to_dict(old)), flat(configio.to_dict(new))
    names = [*before, *(name for name in after if name not in before)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def check_same_run(old: Run, new: Run, run_dir: Path) -> list[str]:
    """Lines that say which fields changed since the run was last started.

    Raises:
        UserError: one of them makes it another run.
    """
    changed = differences(old, new)
    if old.model.vocab_size is not None and new.model.vocab_size is None:
        changed.pop("model.vocab_size", None)  # left to the tokenizer, which is compared by itself
    fixed = [
        name
        for name in changed
        if not (name in PLACES and _moved(*changed[name]))
        and any(name.startswith(f) if f.endswith(".") else name == f or name.startswith(f"{f}_") for f in FIXED)
    ]
    if fixed:
        name = fixed[0]
        others = f" (and {len(fixed) - 1} more)" if len(fixed) > 1 else ""
        raise UserError(
            f"{run_dir} holds a run with {name} {changed[name][0]}, and this one has {changed[name][1]}{others}; "
            "give it another --name, or --fresh to keep the old run aside and start over"
        )
    ignored = ("name", "root")  # where it is, not what it is
    return [
        f"changed since it was last started: {name} {a} -> {b}"
        for name, (a, b) in changed.items()
        if name not in ignored
    ]


def _moved(old: Any, new: Any) -> bool:
    """Whether the same names are in other folders. Other names are refused without reading what may be terabytes."""
    names = [[Path(p).name for p in ([places] if isinstance(places, str) else places or ())] for places in (old, new)]
    return names[0] == names[1]


def set_aside(run_dir: Path) -> Path | None:
    """Renames the directory of an earlier run, keeping all of it; None where there is none."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = run_dir.with_name(f"{run_dir.name}.{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = run_dir.with_name(f"{run_dir.name}.{stamp}-{number}")
    run_dir.rename(aside)
    return aside


def previous(run_dir: Path) -> Run | None:
    """The config of the run that is in the directory, or None where it is empty.

    Raises:
        UserError: the directory holds something that is no run.
    """
    if not run_dir.exists():
        return None
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, and a run needs a directory there; give another --name or --root")
    if (run_dir / "config.json").exists():
        return configio.read_saved(run_dir)
    strange = [
        path.name for path in run_dir.iterdir() if path.name[0] != "." and path.name not in ("lock.json", "log.txt")
    ]
    if strange:
        raise UserError(
            f"{run_dir} holds {sorted(strange)[0]} but no config.json, so it is no run; give another --name or --root, or remove it"
        )
    return None
