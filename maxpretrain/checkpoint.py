"""Checkpoints: saved by Orbax in the background, listed, verified and kept by us. The only file that imports orbax.

Orbax writes arrays fast and in any layout, but restores a flipped bit silently, lists failed saves as steps, casts dtypes
and lets a NaN metric win. So a checkpoint here is one directory that is renamed into place when it is complete:

    checkpoints/<step>/state/          Orbax: a nested dict of arrays; `params` is readable alone
    checkpoints/<step>/manifest.json   ours: step, metric, meta, file sizes, and shape, dtype and fingerprint of each leaf
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from maxpretrain import manifest
from maxpretrain.errors import StorageError, UserError
from maxpretrain.fingerprint import fingerprints, named_leaves, nested
from maxpretrain.manifest import DamagedCheckpoint
from maxpretrain.storage import StepDirectories, is_full, sentence

Tree = Any
_SLACK = 1 << 20  # bytes of metadata that a save needs beside its arrays


@dataclass
class _Pending:
    """A save on its way."""

    step: int
    body: dict[str, Any]  # of the manifest, without fingerprints and sizes
    fingerprints: dict[str, jax.Array]
    replace: bool


class Checkpoints:
    """The checkpoints of one run.

    Every process of a job makes one and makes the same calls; process 0 alone touches manifests and directories.

    Args:
        directory: the run's `checkpoints` directory; made at the first save.
        keep: how many of the latest to keep, at least 1.
        keep_best: whether to keep the one of lowest finite metric too.
        warn: called with each warning, a sentence, from the thread that calls the methods; None: `warnings.warn`.
        debug: let Orbax log.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int = 2,
        keep_best: bool = True,
        warn: Callable[[str], None] | None = None,
        debug: bool = False,
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; it must be at least 1")
        self.directory = Path(directory).absolute()
        self._on_disk = StepDirectories(self.directory, keep=keep, keep_best=keep_best, note=self._note)
        self._tell = warn or (lambda text: warnings.warn(text, stacklevel=4))
        _quiet(not debug)
        self._primary = jax.process_index() == 0
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            # Made in the foreground, a directory that cannot be made is an error of the call that wanted it.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._pending: _Pending | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._committed: int | None = None  # the last step this object brought to the disk
        self._notes: list[str] = []  # warnings, until the caller's thread can tell them

    # Which checkpoints there are

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete (manifest sound, every file there in its full size), ascending.

        The arrays themselves are verified when they are read. A save on its way is not among them.
        """
        valid = self._on_disk.valid()
        self._flush()
        return list(valid)

    def latest(self) -> int | None:
        """The last complete step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The complete step of lowest finite metric, the later one of two equals; None where no metric is finite."""
        return self._on_disk.best(self._on_disk.valid())

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` that was saved with `step`.

        Raises:
            StorageError: there is no such checkpoint, or it is damaged.
        """
        return self._on_disk.read(step)["meta"]

    # Saving

    def save(
        self,
        step: int,
        state: Tree,
        meta: dict[str, Any],
        *,
        metric: float | None = None,
        final: bool = False,
        replace: bool = False,
    ) -> float | None:
        """Save a state. It returns as soon as the state may be donated; the writing goes on in the background.

        A save that fails (a full disk, say) frees what it wrote and becomes a warning at the next call, or an error at
        `wait`, and training goes on. A final save waits, drops old checkpoints where that makes room, and raises.

        Args:
            step: number of updates the state has seen; above every saved one.
            state: pytree of jax.Array.
            meta: JSON values that belong to the state (config, data position, …).
            metric: validation loss, lower is better; None or not finite: never the best.
            final: wait until the checkpoint is on the disk. Where this step was just saved, only its metric is updated.
            replace: allow `step` to exist; the old one stays until the new one is complete.

        Returns:
            Seconds for which the call blocked; None where this save failed at once (a warning says why).

        Raises:
            UserError: the step exists, or a later one does.
            StorageError: a final save is impossible.
        """
        begun = time.perf_counter()
        self._settle_or_warn()
        if final and step == self._committed and not replace:
            self._set_metric(step, metric)
            return time.perf_counter() - begun
        self._check_step(step, replace)
        leaves = _checked(state)
        body = _body(step, leaves, meta, metric)
        while True:
            try:
                self._start(_Pending(step, body, {}, replace), leaves)
                if final:
                    self._settle()
                break
            except Exception as error:
                if self._primary:
                    self._on_disk.discard(step)
                if not isinstance(error, (OSError, StorageError)) and not is_full(error):
                    raise  # not the disk's fault: a deleted array, say
                if final and self._all(not self._primary or (is_full(error) and self._on_disk.drop_oldest())):
                    continue
                text = self._not_saved(step, error)
                if final:
                    raise StorageError(f"{text}; free space or mend the directory, and run again") from error
                self._note(f"{text}; training goes on")
                self._flush()
                return None
        self._flush()
        return time.perf_counter() - begun

    def wait(self) -> None:
        """Wait for the save on its way.

        Raises:
            StorageError: it failed.
        """
        try:
            self._settle()
        finally:
            self._flush()

    def close(self) -> None:
        """Wait for the save on its way and release Orbax's threads. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
            return
        self._settle_or_warn()  # an exception is under way: it must not be hidden by ours
        self._orbax.close()

    def remove_after(self, step: int) -> list[int]:
        """Remove the checkpoints of later steps, for a rollback to `step`. Returns the steps removed."""
        self._settle_or_warn()
        later = [s for s in self._on_disk.numbered() if s > step]
        if self._primary:
            for s in reversed(later):  # from the end: a kill leaves a shorter run, never one with a hole
                self._on_disk.delete(s)
        self._barrier(f"remove_after/{step}")
        if self._committed is not None and self._committed > step:
            self._committed = None
        return later

    def _check_step(self, step: int, replace: bool) -> None:
        there = self._on_disk.numbered()
        if step in there and not replace:
            raise UserError(f"checkpoint {self._on_disk.at(step)} exists; pass replace=True to save that step again")
        if any(s > step for s in there):
            raise UserError(
                f"step {step} lies before checkpoint {there[-1]} in {self.directory}; remove_after({step}) drops the later ones"
            )

    def _start(self, pending: _Pending, leaves: dict[str, jax.Array]) -> None:
        """Hand a save to Orbax. Fingerprints are queued first: they read the buffers before any donation can."""
        problem = None
        saving = self._on_disk.saving(pending.step)
        if self._primary:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._on_disk.sweep()
                self._on_disk.make_room(sum(leaf.nbytes for leaf in leaves.values()) + _SLACK)
                saving.mkdir()
            except OSError as error:
                problem = error
        if not self._all(problem is None):
            raise problem or StorageError("process 0 could not prepare the directory")
        pending.fingerprints = fingerprints(leaves)
        # Orbax refuses arrays of size 0; they hold nothing, and the manifest has their shape.
        stored = nested({name: leaf for name, leaf in leaves.items() if leaf.size})
        self._orbax.save(saving / "state", args=ocp.args.PyTreeSave(stored))
        self._pending = pending
        self._thread = threading.Thread(target=self._finish, args=(pending,), name="checkpoint")
        self._thread.start()

    def _finish(self, pending: _Pending) -> None:
        """In the background: wait for the arrays of all processes, commit, drop what is no longer kept."""
        try:
            self._orbax.wait_until_finished()
            if not self._primary:
                return
            for name, value in pending.fingerprints.items():
                pending.body["leaves"][name]["fingerprint"] = f"{int(value):08x}"
            self._on_disk.commit(pending.step, pending.body, replace=pending.replace)
            try:
                self._on_disk.retain()
            except OSError as error:  # the save itself is good
                self._note(f"an old checkpoint in {self.directory} could not be removed: {sentence(error)}")
        except BaseException as error:
            self._failure = error

    def _settle(self) -> None:
        """Join the save on its way and agree on its outcome over all processes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        pending, self._pending = self._pending, None
        failure, self._failure = self._failure, None
        if pending is None:
            return
        if self._all(failure is None):
            self._committed = pending.step
            return
        if self._primary:
            self._on_disk.discard(pending.step)
        failure = failure or RuntimeError("another process failed")
        raise StorageError(self._not_saved(pending.step, failure)) from failure

    def _settle_or_warn(self) -> None:
        try:
            self._settle()
        except StorageError as error:
            self._note(f"{error}; training goes on")
            if is_full(error) and self._primary:
                self._on_disk.drop_oldest()
        self._flush()

    def _set_metric(self, step: int, metric: float | None) -> None:
        if metric is None or not math.isfinite(metric):
            return
        if self._primary:
            body = self._on_disk.read(step)
            if body["metric"] != metric:
                manifest.write(self._on_disk.at(step), {**body, "metric": float(metric)})
        self._barrier(f"metric/{step}")

    # Restoring

    def restore(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Read a checkpoint and verify every leaf.

        Args:
            step: which.
            abstract: pytree of jax.ShapeDtypeStruct; a leaf without sharding goes to the default device. Mesh, sharding
                and number of devices may differ from those at the save: the values are the same.

        Returns:
            The state, as `abstract`, and the meta.

        Raises:
            UserError: a leaf is missing, unknown, or has another shape or dtype: another model or optimizer.
            DamagedCheckpoint: a file or a leaf is not what was saved (a StorageError).
            StorageError: there is no such checkpoint, or it cannot be read.
        """
        self._settle_or_warn()
        body = self._on_disk.read(step)
        wanted = named_leaves(abstract)
        leaves = self._read(step, body["leaves"], wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted]), body["meta"]

    def restore_params(self, step: int, abstract: Tree | None = None) -> tuple[Tree, dict[str, Any]]:
        """Read the `params` of a checkpoint alone, without knowing the optimizer.

        Args:
            step: which.
            abstract: pytree of jax.ShapeDtypeStruct of the parameters; None: a nested dict, as saved, on the default device.

        Returns:
            The parameters and the meta. Raises as `restore`.
        """
        self._settle_or_warn()
        body = self._on_disk.read(step)
        saved = {n.removeprefix("params/"): leaf for n, leaf in body["leaves"].items() if n.startswith("params/")}
        if abstract is None:
            abstract = nested({n: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for n, leaf in saved.items()})
        wanted = named_leaves(abstract)
        leaves = self._read(step, saved, wanted, prefix="params/")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted]), body["meta"]

    def restore_latest(
        self, abstract: Tree, resume: Literal["auto", "must", "never"] = "auto"
    ) -> tuple[Tree, dict[str, Any], int] | None:
        """The last checkpoint that verifies; damaged ones are set aside as `<step>.corrupt`, with a warning.

        Returns:
            (state, meta, step), or None where the run has never saved anything.

        Raises:
            StorageError: no checkpoint is sound though there are some, or `must` and there is none.
            UserError: `never` and there are some; or the checkpoint is of another model or optimizer.
        """
        self._settle_or_warn()
        if resume == "never":
            if there := self._on_disk.numbered():
                raise UserError(
                    f"{self.directory} holds a checkpoint of step {there[-1]} and checkpoint.resume is never; pass --fresh to "
                    "keep that run aside and start over, or give the run another name"
                )
            return None
        if self._primary:
            self._on_disk.recover()
        self._barrier("recover")
        for step in reversed(self._on_disk.numbered()):
            try:
                state, meta = self.restore(step, abstract)
                problem = None
            except DamagedCheckpoint as error:
                problem = str(error)
            if self._all(problem is None):
                return state, meta, step
            self._set_aside(step, problem or "another process could not read it")
        aside = self._on_disk.aside()
        if aside:
            raise StorageError(
                f"no checkpoint in {self.directory} is usable, the damaged ones were set aside ({', '.join(aside)}); nothing was "
                "started: restore them from a copy, or pass --fresh to start over"
            )
        if resume == "must":
            raise StorageError(
                f"there is no checkpoint in {self.directory} and checkpoint.resume is must; check --root and --name, or use auto"
            )
        return None

    def _read(
        self, step: int, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct], prefix: str = ""
    ) -> dict[str, jax.Array]:
        """The leaves `wanted`, under names without `prefix`, each verified against `saved`."""
        where = self._on_disk.at(step)
        manifest.check_same(where, saved, wanted, prefix)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = {name: leaf.sharding or default for name, leaf in wanted.items()}
        stored = {prefix + name: leaf for name, leaf in wanted.items() if math.prod(leaf.shape)}
        how = {
            name: ocp.ArrayRestoreArgs(
                sharding=place[name.removeprefix(prefix)], dtype=leaf.dtype, global_shape=leaf.shape
            )
            for name, leaf in stored.items()
        }
        try:
            tree = self._orbax.restore(
                where / "state",
                args=ocp.args.PyTreeRestore(item=nested(stored), restore_args=nested(how), partial_restore=True),
            )
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # says nothing about the checkpoint
            kind = (
                StorageError
                if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error)
                else DamagedCheckpoint
            )
            raise kind(f"checkpoint {where} cannot be read: {sentence(error)}") from error
        read = named_leaves(tree)
        leaves = {
            name: read[prefix + name]
            if prefix + name in read
            else jnp.zeros(leaf.shape, leaf.dtype, device=place[name])
            for name, leaf in wanted.items()
        }
        prints = fingerprints(leaves)
        for name, value in prints.items():
            if f"{int(value):08x}" != saved[name]["fingerprint"]:
                raise DamagedCheckpoint(
                    f"checkpoint {where}: {prefix}{name} has fingerprint {int(value):08x}, saved was "
                    f"{saved[name]['fingerprint']}: its data changed on the disk"
                )
        return leaves

    def _set_aside(self, step: int, problem: str) -> None:
        if self._primary:
            try:
                name = self._on_disk.set_aside(step)
            except OSError as error:
                raise StorageError(f"{problem}; it cannot be set aside: {sentence(error)}") from error
            self._note(f"{problem}; it was set aside as {name} and the one before is taken")
        self._barrier(f"aside/{step}")
        self._flush()

    # Small things

    def _not_saved(self, step: int, error: BaseException) -> str:
        if isinstance(error, StorageError):
            return str(error)
        return f"checkpoint {step} was not saved in {self.directory}: {sentence(error)}"

    def _all(self, good: bool) -> bool:
        """Whether it is good for every process."""
        if jax.process_count() == 1:
            return good
        return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))

    def _barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"maxpretrain/checkpoint/{name}")

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _flush(self) -> None:
        while self._notes:
            self._tell(self._notes.pop(0))


def _checked(state: Tree) -> dict[str, jax.Array]:
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"the leaf {name} of the state is a {type(leaf).__name__}; make it a jax.Array")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"the leaf {name} of the state is a typed random key; store jax.random.key_data of it")
    return leaves


def _body(step: int, leaves: dict[str, jax.Array], meta: dict[str, Any], metric: float | None) -> dict[str, Any]:
    finite = metric is not None and math.isfinite(metric)
    return {
        "format": manifest.FORMAT,
        "step": step,
        "metric": float(metric) if finite else None,
        "time": time.time(),
        "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
        "leaves": {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()},
        "meta": json.loads(json.dumps(meta)),  # now: the caller may change its dict while the save is on its way
    }


class _OrbaxSilence(logging.Filter):
    """Drops what Orbax logs through absl: dozens of lines a save, and a traceback where we give a sentence."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_SILENCE = _OrbaxSilence()


def _quiet(quiet: bool) -> None:
    logger = logging.getLogger("absl")
    logger.removeFilter(_SILENCE)
    if quiet:
        logger.addFilter(_SILENCE)
