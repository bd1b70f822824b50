"""The directories of a run's checkpoints: which are complete, which are kept, which go when the disk is full.

`<step>/` is a checkpoint, complete when its manifest says so; `<step>.saving` and `<step>.deleting` are on their way in or
out; `<step>.corrupt` failed verification and was set aside. Nothing here knows jax or orbax.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maxpretrain import manifest
from maxpretrain.errors import StorageError
from maxpretrain.manifest import DamagedCheckpoint

_STEP = re.compile(r"0|[1-9][0-9]*")
_TRANSIENT = re.compile(r"[0-9]+\.(saving|deleting)(-[0-9]+)?")


class StepDirectories:
    """What lies in `directory`, and the only code that renames or deletes there.

    Args:
        directory: the run's `checkpoints` directory; need not exist.
        keep: how many of the latest to keep.
        keep_best: whether the one of lowest metric is kept too.
        note: called with warnings.
    """

    def __init__(self, directory: Path, *, keep: int, keep_best: bool, note: Callable[[str], None]):
        self.directory, self.keep, self.keep_best, self._note = directory, keep, keep_best, note
        self._ignored: set[str] = set()
        self._swept = False

    def at(self, step: int) -> Path:
        return self.directory / str(step)

    def saving(self, step: int) -> Path:
        return self.directory / f"{step}.saving"

    def numbered(self) -> list[int]:
        """The steps for which there is a directory, sound or not, ascending."""
        steps = []
        for path in self._entries():
            if _STEP.fullmatch(path.name) is None:
                continue
            if path.is_symlink() or not path.is_dir():
                if path.name not in self._ignored:
                    kind = "a link, and links out of the run are not followed" if path.is_symlink() else "no directory"
                    self._note(f"{path} is ignored: it is {kind}")
                    self._ignored.add(path.name)
                continue
            steps.append(int(path.name))
        return sorted(steps)

    def valid(self) -> dict[int, dict[str, Any]]:
        """The manifests of the complete checkpoints, by step, ascending."""
        bodies = {}
        for step in self.numbered():
            with contextlib.suppress(DamagedCheckpoint):
                bodies[step] = manifest.read(self.at(step), step)
        return bodies

    def read(self, step: int) -> dict[str, Any]:
        """The manifest of one checkpoint.

        Raises:
            StorageError: there is none of this step.
            DamagedCheckpoint: it is not complete.
        """
        if step not in self.numbered():
            there = ", ".join(map(str, self.valid())) or "none"
            raise StorageError(f"there is no checkpoint of step {step} in {self.directory}; there is: {there}")
        return manifest.read(self.at(step), step)

    def best(self, valid: dict[int, dict[str, Any]]) -> int | None:
        """The step of lowest metric, the later of two equals. Manifests hold finite metrics only."""
        scored = {s: body["metric"] for s, body in valid.items() if body["metric"] is not None}
        return min(scored, key=lambda s: (scored[s], -s), default=None)

    def commit(self, step: int, body: dict[str, Any], *, replace: bool) -> None:
        """Write the manifest of a save whose arrays are all there, and rename it into place."""
        saving = self.saving(step)
        manifest.write(saving, {**body, "files": manifest.file_sizes(saving)})
        self._promote(step, replace)

    def _promote(self, step: int, replace: bool) -> None:
        old = self._unused(step, "deleting") if replace and self.at(step).exists() else None
        if old is not None:
            os.rename(self.at(step), old)  # a kill between these two renames is mended by `recover`
        os.rename(self.saving(step), self.at(step))
        manifest.sync_directory(self.directory)
        if old is not None:
            shutil.rmtree(old)

    def recover(self) -> None:
        """Put a complete save in place that a kill kept from its last rename."""
        for path in self._entries():
            step, _, kind = path.name.partition(".")
            if kind != "saving" or _STEP.fullmatch(step) is None or path.is_symlink() or self.at(int(step)).exists():
                continue
            with contextlib.suppress(DamagedCheckpoint):
                manifest.read(path, int(step))
                self._promote(int(step), replace=False)

    def set_aside(self, step: int) -> str:
        """Rename a damaged checkpoint, keeping it for whoever wants to look. Returns its new name."""
        target = self._unused(step, "corrupt")
        os.rename(self.at(step), target)
        return target.name

    def aside(self) -> list[str]:
        """The names of those that were set aside."""
        return sorted(path.name for path in self._entries() if re.fullmatch(r"[0-9]+\.corrupt(-[0-9]+)?", path.name))

    def delete(self, step: int) -> None:
        # Renamed first: a reader, or a kill half-way, never finds half a checkpoint under a step's name.
        gone = self._unused(step, "deleting")
        os.rename(self.at(step), gone)
        shutil.rmtree(gone)

    def retain(self) -> None:
        """Keep the last `keep` and the best; delete the other complete ones."""
        valid = self.valid()
        kept = {*sorted(valid)[-self.keep :], self.best(valid) if self.keep_best else None}
        for step in sorted(set(valid) - kept):
            self.delete(step)

    def drop_oldest(self) -> bool:
        """Delete the oldest that is neither the best nor the latest; False where there is none."""
        for step in self._droppable():
            self.delete(step)
            self._note(f"checkpoint {step} was dropped to make room in {self.directory}")
            return True
        return False

    def _droppable(self) -> dict[int, int]:
        """The steps that may go when the disk is full, oldest first, with their sizes in bytes."""
        valid = self.valid()
        spared = {max(valid, default=None), self.best(valid) if self.keep_best else None}
        return {s: sum(body["files"].values()) for s, body in valid.items() if s not in spared}

    def make_room(self, needed: int) -> None:
        """Drop old checkpoints until `needed` bytes are free; where even all of them would not do, drop none.

        Raises:
            OSError: ENOSPC, there is not enough room.
        """
        if self.free() + sum(self._droppable().values()) >= needed:
            while self.free() < needed and self.drop_oldest():
                pass
        if self.free() < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB needed, {self.free() / 1e6:.1f} MB free")

    def free(self) -> int:
        """Bytes that may still be written."""
        return shutil.disk_usage(self.directory).free

    def discard(self, step: int) -> None:
        """Free what a failed save wrote."""
        saving = self.saving(step)
        for _ in range(10):  # writers that have not noticed the failure may still add files
            shutil.rmtree(saving, ignore_errors=True)
            if not saving.exists():
                return
            time.sleep(0.05)
        self._swept = False

    def sweep(self) -> None:
        """Once a session: delete what earlier processes left half-written or half-deleted."""
        if self._swept:
            return
        self._swept = True
        for path in self._entries():
            if _TRANSIENT.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path)

    def _entries(self) -> list[Path]:
        return sorted(self.directory.iterdir()) if self.directory.is_dir() else []

    def _unused(self, step: int, kind: str) -> Path:
        path, count = self.directory / f"{step}.{kind}", 1
        while path.exists() or path.is_symlink():
            count += 1
            path = self.directory / f"{step}.{kind}-{count}"
        return path


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it."""
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        stack += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def is_full(error: BaseException) -> bool:
    """Whether a full disk or quota is behind an error, in whatever words the library chose."""
    return any(
        (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT))
        or re.search(r"No space left|ENOSPC|[Qq]uota exceeded", str(e)) is not None
        for e in _chain(error)
    )


def sentence(error: BaseException) -> str:
    """What went wrong, in a line: TensorStore's text runs to kilobytes of specification."""
    if isinstance(error, OSError) and error.strerror:
        if is_full(error):
            return f"the disk is full ({error.strerror})"
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if is_full(error):
        return "the disk is full"
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = re.split(r"\[tensorstore_spec=|\[source locations=|\[kvstore_spec=", lines[0])[0].strip()
    return text if len(text) <= 200 else text[:199] + "…"
