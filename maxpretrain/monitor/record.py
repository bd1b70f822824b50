"""A run as its directory tells it: everything the report needs, read once and never failing on what a kill left behind."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxpretrain.errors import UserError
from maxpretrain.monitor.sinks import read_events, read_metrics


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """The value as a float; NaN where it is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True)
class Record:
    """One run directory.

    Attributes:
        metrics: one record per step, ascending (see `read_metrics`).
        events: in the order in which they were written.
        log: the lines of log.txt.
    """

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    log: list[str]

    @classmethod
    def read(cls, directory: Path | str) -> Record:
        """Reads a run directory.

        Raises:
            UserError: it is not there, or holds no run.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"there is no run directory {directory}; give the path of one, or a run's name under runs/")
        if not (directory / "config.json").exists():
            raise UserError(
                f"{directory} holds no run: config.json is missing; give a directory that `maxpretrain train` made"
            )
        try:
            log = (directory / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            log = []
        return cls(
            directory=directory,
            config=_read_json(directory / "config.json"),
            environment=_read_json(directory / "environment.json"),
            metrics=read_metrics(directory),
            events=read_events(directory),
            log=log,
        )

    # What it was ------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.directory.resolve().name)

    @functools.cached_property
    def sessions(self) -> list[list[dict[str, Any]]]:
        """Events by session: one per process that trained, each beginning with its "start"."""
        sessions: list[list[dict[str, Any]]] = []
        for event in self.events:
            if event["event"] == "start" or not sessions:
                sessions.append([])
            sessions[-1].append(event)
        return sessions

    def _last(self, name: str) -> dict[str, Any]:
        return next((event for event in reversed(self.events) if event["event"] == name), {})

    @property
    def status(self) -> str:
        """ "done", "stopped", "diverged" or "failed" as the last session ended; "unfinished": it runs still, or was killed."""
        ends = [event for event in self.sessions[-1] if event["event"] == "end"] if self.sessions else []
        return str(ends[-1].get("status", "unfinished")) if ends else "unfinished"

    @property
    def total_steps(self) -> int:
        value = self.config.get("steps")
        return value if isinstance(value, int) else self.step

    @property
    def step(self) -> int:
        """The last step known of."""
        steps = [self.metrics[-1]["step"]] if self.metrics else []
        steps += (
            [event["step"] for event in self.sessions[-1] if isinstance(event.get("step"), int)]
            if self.sessions
            else []
        )
        return max(steps, default=0)

    @property
    def parameters(self) -> float:
        return _number(self._last("start").get("parameters"))

    @property
    def devices(self) -> str:
        start = self._last("start")
        devices, kind = start.get("devices"), start.get("device_kind")
        number = len(devices) if isinstance(devices, list) else devices
        if isinstance(number, int) and kind:
            return f"{number} × {kind}"
        return str(kind or (number if number is not None else ""))

    @property
    def tokens_per_step(self) -> float:
        batch = self.config.get("batch")
        return _number(batch.get("size")) * _number(batch.get("length")) if isinstance(batch, dict) else math.nan

    @property
    def tokens(self) -> float:
        """Training tokens seen."""
        seen = [_number(record.get("tokens")) for record in self.metrics]
        return max((value for value in seen if math.isfinite(value)), default=self.tokens_per_step * self.step)

    # What was measured ------------------------------------------------------------------------------------------------

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (float64 [n]) and values (float64 [n], NaN and infinities as they came) of a metric."""
        pairs = [(record["step"], _number(record[key])) for record in self.metrics if key in record]
        array = np.array(pairs, np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def finite(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """`series` without what is not finite."""
        steps, values = self.series(key)
        keep = np.isfinite(values)
        return steps[keep], values[keep]

    def last(self, key: str) -> float:
        """The last finite value; NaN where there is none."""
        values = self.finite(key)[1]
        return float(values[-1]) if len(values) else math.nan

    def smoothed_last(self, key: str) -> float:
        """The end of the smoothed curve; NaN where nothing finite was logged."""
        values = smooth(*self.finite(key))[1]
        return float(values[-1]) if len(values) else math.nan

    def median(self, key: str) -> float:
        values = self.finite(key)[1]
        return float(np.median(values)) if len(values) else math.nan

    def names(self) -> list[str]:
        """The metrics with a prefix, in order of first appearance."""
        return list(dict.fromkeys(key for record in self.metrics for key in record if "/" in key))

    @property
    def baselines(self) -> dict[str, float]:
        """Bits per byte by name: "unigram", "bigram"."""
        suffix = "_bits_per_byte"
        found = {k.removesuffix(suffix): _number(v) for k, v in self._last("baselines").items() if k.endswith(suffix)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @property
    def loss_unit(self) -> str:
        """Of the loss: a mean over tokens has a perplexity; another adds up several means."""
        names = self.names()
        return "nats per token" if "eval/perplexity" in names or "eval/loss" not in names else "nats"

    @property
    def nats_per_bit_per_byte(self) -> float:
        """What one bit per byte is in nats per token of this validation text; NaN where no evaluation had both."""
        for record in reversed(self.metrics):
            loss, bits = _number(record.get("eval/loss")), _number(record.get("eval/bits_per_byte"))
            if math.isfinite(loss) and math.isfinite(bits) and bits > 0:
                return loss / bits
        return math.nan

    @property
    def samples(self) -> list[tuple[int, list[tuple[str, str]]]]:
        """(step, [(prompt, text), ...]) of each evaluation, the latest first; of a repeated step the last samples."""
        steps: dict[int, list[tuple[str, str]]] = {}
        for session in self.sessions:
            fresh: dict[int, list[tuple[str, str]]] = {}
            for event in session:
                if event["event"] == "sample" and isinstance(event.get("step"), int):
                    fresh.setdefault(event["step"], []).append(
                        (str(event.get("prompt", "")), str(event.get("text", "")))
                    )
            steps |= fresh
        return sorted(steps.items(), reverse=True)

    # Where the time went ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def ledger(self) -> dict[str, float]:
        """Seconds by part over all sessions, adding up to `wall`; "unrecorded": a killed session's end."""
        parts: dict[str, float] = {}
        for session in self.sessions:
            seconds = next(
                (
                    e["seconds"]
                    for e in reversed(session)
                    if e["event"] == "ledger" and isinstance(e.get("seconds"), dict)
                ),
                {},
            )
            recorded = {str(part): _number(value) for part, value in seconds.items()}
            recorded = {part: value for part, value in recorded.items() if math.isfinite(value) and value >= 0}
            for part, value in recorded.items():
                parts[part] = parts.get(part, 0.0) + value
            missing = self._session_wall(session) - sum(recorded.values())
            if missing > 0 and (missing > 1.0 or not recorded):
                parts["unrecorded"] = parts.get("unrecorded", 0.0) + missing
        return parts

    @staticmethod
    def _session_wall(session: list[dict[str, Any]]) -> float:
        """Seconds of a session by its "end"; without one, up to its last event."""
        for event in reversed(session):
            if event["event"] == "end" and math.isfinite(_number(event.get("seconds"))):
                return _number(event["seconds"])
        times = [_number(event.get("time")) for event in session]
        times = [value for value in times if math.isfinite(value)]
        return max(times) - min(times) if times else 0.0

    @property
    def wall(self) -> float:
        """Seconds of all sessions together; NaN where nothing tells."""
        total = sum(self.ledger.values())
        if total > 0:
            return total
        seconds = [_number(record.get("seconds")) for record in self.metrics]
        return max((value for value in seconds if math.isfinite(value)), default=math.nan)

    @property
    def data_wait(self) -> float:
        """Share of the training time in which the device waited for data; NaN where nothing tells."""
        wait, train = self.ledger.get("data_wait"), self.ledger.get("train")
        if wait is not None and train is not None and wait + train > 0:
            return wait / (wait + train)
        waits, steps = self.finite("train/data_wait_seconds")[1], self.finite("train/step_seconds")[1]
        return float(waits.sum() / steps.sum()) if len(waits) and steps.sum() > 0 else math.nan


def smooth(x: np.ndarray, y: np.ndarray, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A curve without its noise: means of stretches, then at each a straight line fitted with Gaussian weights (standard deviation
    1.2 % of the curve). Unlike a moving average it neither lags behind a fall nor bends at the ends.

    Args:
        x, y: float64 [n], finite, x ascending; fewer than 16 points stay as they are.
        points: of the result, at most.

    Returns:
        float64 [m] each.
    """
    if len(x) < 16:
        return x, y
    edges = np.linspace(0, len(x), min(points, len(x)) + 1).round().astype(int)
    size = np.diff(edges)
    xs, ys = (np.add.reduceat(values, edges[:-1]) / size for values in (x, y))
    # The ends of the curve stay where they are.
    at = xs.copy()
    at[0], at[-1] = x[0], x[-1]
    width = max(0.012 * (at[-1] - at[0]), 1.5 * (at[-1] - at[0]) / len(at), 1e-9)
    offset = (xs[None, :] - at[:, None]) / width
    weight = np.exp(-0.5 * offset**2) * size
    s0, s1, s2 = (weight.sum(1), (weight * offset).sum(1), (weight * offset**2).sum(1))
    t0, t1 = (weight * ys).sum(1), (weight * offset * ys).sum(1)
    return at, (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)
