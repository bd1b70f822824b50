"""The manifest of a checkpoint: what a step directory must hold, and the mark that it is complete.

`manifest.json` is written into `<step>.saving/` after everything else, and the directory is renamed to `<step>/` after
that: a directory with a number for a name and no sound manifest in it is damaged, never half-written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from maxpretrain.errors import StorageError, UserError

FILE = "manifest.json"
FORMAT = 1


class DamagedCheckpoint(StorageError):
    """A checkpoint does not hold what was saved."""


def file_sizes(directory: Path) -> dict[str, int]:
    """Size in bytes of every regular file below `directory` but the manifest; links are neither followed nor listed."""
    sizes = {}
    for root, _, names in os.walk(directory, followlinks=False):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink() and path.is_file():
                sizes[path.relative_to(directory).as_posix()] = path.stat().st_size
    sizes.pop(FILE, None)
    return sizes


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write(directory: Path, body: dict[str, Any]) -> None:
    """Write the manifest of `directory` atomically, with its own sha256, and flush it to the disk."""
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True)
    temporary = directory / (FILE + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / FILE)
    sync_directory(directory)


def read(directory: Path, step: int) -> dict[str, Any]:
    """The manifest of `directory`, checked against itself, the step and the sizes of the files.

    Raises:
        DamagedCheckpoint: there is none, it was altered, it is another step's, or a file is missing or has another size.
    """
    try:
        text = (directory / FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        raise DamagedCheckpoint(f"checkpoint {directory} has no {FILE}: it is empty or incomplete") from None
    try:
        body = json.loads(text)
        digest = body.pop("sha256")
        sound = digest == _digest(body)
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise DamagedCheckpoint(f"{directory / FILE} was altered or cut short: it does not match its own sha256")
    if body["format"] != FORMAT:
        raise StorageError(
            f"checkpoint {directory} has format {body['format']} and this maxpretrain reads format {FORMAT}; use the "
            "version that wrote it"
        )
    if body["step"] != step:
        raise DamagedCheckpoint(f"checkpoint {directory} holds step {body['step']}, not the step of its name")
    found = file_sizes(directory)
    for name, size in body["files"].items():
        if found.get(name) != size:
            have = "is missing" if name not in found else f"has {found[name]} bytes"
            raise DamagedCheckpoint(f"checkpoint {directory}: {name} {have} where {size} bytes were saved")
    return body


def check_same(where: Path, saved: dict[str, Any], wanted: dict[str, Any], prefix: str) -> None:
    """A leaf that differs is a changed config: an error that names it, never a cast."""
    out = "; change the config back, or pass --fresh to start over"
    for name in [*wanted, *saved]:
        if name not in saved:
            raise UserError(f"checkpoint {where} has no {prefix}{name}, which this run's state has{out}")
        if name not in wanted:
            raise UserError(f"checkpoint {where} has {prefix}{name}, which this run's state has not{out}")
        there = f"{saved[name]['dtype']}{saved[name]['shape']}"
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}"
        if there != here:
            raise UserError(f"checkpoint {where}: {prefix}{name} is {there} there and {here} in this run{out}")


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse to; the rename itself stands
        pass
    finally:
        os.close(descriptor)
