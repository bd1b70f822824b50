"""Where metrics and events go: metrics.jsonl, events.jsonl, TensorBoard and, where asked for, Weights & Biases.

The two JSONL files are the record that the report is made from. Every line is valid JSON. JSON has no NaN and no infinity:
they are written as the strings "NaN", "Infinity" and "-Infinity", which Python's float() and JavaScript's Number() read back
(null would not tell a loss that overflowed from one that was never a number). A resumed run appends; a line torn by a kill is
closed before the next one is written, and skipped by the readers.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxpretrain.errors import UserError

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.config import Run

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# What is kept for later while nothing can be written (a full disk): some hours of lines.
_PENDING_BYTES = 16_000_000


def _plain(value: Any) -> Any:
    """A value of plain JSON: numpy and jax scalars become numbers, non-finite numbers strings, paths text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if hasattr(value, "item") and getattr(value, "shape", ()) == ():  # numpy and jax scalars
        value = value.item()
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value)


class _Lines:
    """Appends whole lines to a file, each handed to the operating system at once. What cannot be written now is kept and
    tried again with the next line, so that a disk that is full for a while loses nothing and ends nothing."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self._path, self._warn, self._failing = path, warn, False
        try:
            self._file = path.open("ab", buffering=0)
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                torn = file.read(1) not in (b"", b"\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another `root` or make it writable"
            ) from error
        self._pending = b"\n" if torn else b""

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        # Half of a surrogate pair (a sampled byte sequence) has no UTF-8: "?" stands for it.
        self._pending += line.encode("utf-8", errors="replace")
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._failing:
                self._warn(f"cannot write {self._path}: {error.strerror}; lines are kept in memory and tried again")
            self._failing = True
            if len(self._pending) > _PENDING_BYTES:
                kept = self._pending[-_PENDING_BYTES // 2 :]
                self._pending = b"\n" + kept[kept.find(b"\n") + 1 :]
                self._warn(f"older lines of {self._path} are lost: it could not be written for too long")
        else:
            if self._failing:
                self._warn(f"{self._path} can be written again; nothing more is missing")
            self._failing = False

    def close(self) -> None:
        self._file.close()


class Sinks:
    """Writes metrics and events of one run. Only process 0 makes one.

    Args:
        run_dir: the run directory; it exists.
        run: decides on TensorBoard and Weights & Biases (`run.log`).
        warn: told, in a sentence, what could not be written.

    Raises:
        UserError: the directory cannot be written, or `log.wandb` is set and wandb is not installed.
    """

    def __init__(
        self, run_dir: Path | str, run: Run, *, warn: Callable[[str], None] = logging.getLogger(__name__).warning
    ):
        self._dir, self._run, self._warn = Path(run_dir), run, warn
        self._wandb = _open_wandb(self._dir, run) if run.log.wandb else None
        self._metrics = _Lines(self._dir / METRICS, warn)
        self._events = _Lines(self._dir / EVENTS, warn)
        self._start_step: int | None = None
        self._tensorboard: Any = None
        self._closed = False

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics of a step: keys of the contract, values numbers (Python, numpy or jax scalars)."""
        step = int(step)
        record = {key: _plain(value) for key, value in metrics.items() if key != "step"}
        self._metrics.write({"step": step, **record})
        numbers = {key: float(value) for key, value in record.items() if _is_number(value)}
        if self._run.log.tensorboard:
            if self._tensorboard is None:
                self._tensorboard = _open_tensorboard(self._dir / "tensorboard", self._start_step)
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            # Our step is a metric of its own: wandb's must rise, and a resumed run repeats steps.
            self._wandb.log({"step": step, **numbers})

    def event(self, name: str, **fields: Any) -> None:
        """Records that something happened: one line of events.jsonl, with the time where none is given."""
        if name == "start":
            self._start_step = int(fields.get("step", 0))
        self._events.write({"event": name, "time": time.time(), **fields})

    def flush(self) -> None:
        """Hands TensorBoard's queue to the disk; the JSONL files need none."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._metrics.close()
        self._events.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
        isinstance(value, str) and value in _NON_FINITE
    )


def _open_tensorboard(directory: Path, start_step: int | None) -> Any:
    from tensorboardX import SummaryWriter

    # It warns on stderr at every NaN, in the middle of the live line; the console says so itself.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
    # A resumed run: TensorBoard forgets what earlier sessions wrote from this step on, and draws one line.
    return SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None, flush_secs=20)


def _open_wandb(run_dir: Path, run: Run) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            'log.wandb is on, but wandb is not installed; pip install "maxpretrain[track]", or set log.wandb to False'
        ) from error
    # The same run continues after a resume: its id stays beside it.
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return wandb.init(
        project=run.log.wandb_project,
        name=run.name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run_dir),
        config=_plain(dataclasses.asdict(run)),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, in order; torn and damaged lines are left out. No file: none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for line in raw.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill, or not UTF-8
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """One record per step, ascending, from metrics.jsonl; NaN and infinities are floats again.

    Lines of one step are merged, the last value of a key wins. Where `train/…` (or `eval/…`) metrics go back to an earlier step the
    run was resumed from there: what the earlier session had measured beyond that step is left out.
    """
    steps: dict[int, dict[str, Any]] = {}
    last: dict[str, int] = {}
    for line in _read_lines(Path(run_dir) / METRICS):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        values = {
            key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in line.items()
        }
        for group in {key.partition("/")[0] for key in values if "/" in key}:
            if step < last.get(group, step):
                _forget(steps, group, step)
            last[group] = step
        steps.setdefault(step, {}).update(values)
    return [steps[step] for step in sorted(steps) if any("/" in key for key in steps[step])]


def _forget(steps: dict[int, dict[str, Any]], group: str, beyond: int) -> None:
    for step, record in steps.items():
        if step > beyond:
            for key in [key for key in record if key.startswith(group + "/")]:
                del record[key]


def read_events(run_dir: Path | str) -> list[dict[str, Any]]:
    """The events of events.jsonl, in the order in which they were written."""
    return [record for record in _read_lines(Path(run_dir) / EVENTS) if isinstance(record.get("event"), str)]
