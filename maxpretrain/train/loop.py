"""The training loop: dispatch a step, read the one before, now and then evaluate, save and log. No jnp here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from maxpretrain import configio, mesh
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.data.pipeline import Batches
from maxpretrain.errors import Diverged, Stopped
from maxpretrain.monitor.console import Console
from maxpretrain.monitor.flops import peak_flops, training_flops
from maxpretrain.monitor.ledger import Ledger
from maxpretrain.monitor.sinks import Sinks
from maxpretrain.train.interrupt import Interrupt
from maxpretrain.train.samples import Sampler
from maxpretrain.train.setup import Setup
from maxpretrain.train.state import State

SKIPS_ALLOWED = 10  # non-finite steps in a row before the run ends


@dataclasses.dataclass
class Meter:
    """Speed since the last log line; what is not training (evaluation, saving) is taken out."""

    tokens_per_step: int
    devices: int
    flops: tuple[float, float]  # per token, causal attention counted once, and full
    peak: float
    started: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0

    def pause(self) -> float:
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        self.started += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """Metrics of the interval, and a new one begins."""
        now = time.perf_counter()
        seconds, steps = max(now - self.started, 1e-9), max(self.steps, 1)
        rate = steps * self.tokens_per_step / seconds
        metrics = {
            "train/tokens_per_second": rate,
            "train/tokens_per_second_per_device": rate / self.devices,
            "train/mfu": rate * self.flops[0] / (self.devices * self.peak),
            "train/mfu_full": rate * self.flops[1] / (self.devices * self.peak),
            "train/step_seconds": seconds / steps,
            "train/data_wait_seconds": self.waited / steps,
        }
        self.started, self.steps, self.waited = now, 0, 0.0
        return metrics


def _plain(value: Any) -> Any:
    """A number, or a list of numbers for a metric of several, such as the load of each expert."""
    return float(value) if value.ndim == 0 else [round(float(x), 4) for x in value]


class Trainer:
    """One session of a run: from the step it resumes at to the last, or to a signal.

    Args:
        setup: the parts of the run.
        state: on the mesh, given away (donated); None: a fresh one is made.
        sinks, checkpoints: where to write; `sinks` None on all processes but the first.
        seconds_before: of earlier sessions of the run.
    """

    def __init__(
        self,
        setup: Setup,
        state: State | None,
        *,
        start: int,
        run_dir: Path,
        sinks: Sinks | None,
        checkpoints: Checkpoints,
        console: Console,
        ledger: Ledger,
        seconds_before: float,
        identity: dict[str, Any],
        check_owner: Callable[[], None],
    ):
        self.setup, self.state, self.step, self.start = setup, state, start, start
        self.run, self.run_dir = setup.run, run_dir
        self.sinks, self.checkpoints, self.console, self.ledger = sinks, checkpoints, console, ledger
        self.identity, self.check_owner = identity, check_owner
        self.session_start = time.perf_counter() - seconds_before
        tokenizer = setup.prepared.tokenizer
        self.sampler = Sampler(setup.model, tokenizer, self.run.evaluation, self.run.seed, self.run.objective)
        self.skipped_in_a_row = 0
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.saved = start if start else -1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.session_start

    def start_up(self) -> None:
        """Compiles the step before the loop, so that a shape error or lack of memory shows at once, and makes a fresh state
        meanwhile: XLA compiles two programs on two cores.
        """
        step = jax.jit(self.setup.train_step(), donate_argnums=0)
        with self.console.working("compiling the training step") as work, self.ledger("compile"):
            with mesh.use(self.setup.layout):
                lowered = step.lower(self.setup.abstract_state, self.setup.abstract_batch)
            with ThreadPoolExecutor(1) as pool:
                compiling = pool.submit(lowered.compile)
                if self.state is None:
                    self.state = jax.block_until_ready(self.setup.init())
                self._train_step = compiling.result()
        self._event("compile", seconds=round(work.seconds, 3))

    def fit(self) -> dict[str, float]:
        """Trains to the end of the run.

        Returns:
            The metrics of the last evaluation.

        Raises:
            Stopped: a signal came; the state is saved.
            Diverged: too many steps in a row were not finite; nothing is saved.
            StorageError: the last checkpoint cannot be written.
        """
        run = self.run
        model = self.setup.model.config
        causal, full = (training_flops(run.objective, model, run.batch.length, causal) for causal in (True, False))
        devices = self.setup.layout.num_devices
        peak, source = peak_flops(self.setup.layout.mesh.devices.flat[0])
        self.console.say(f"MFU is counted against {source}")
        self.meter = Meter(run.tokens_per_step, devices, (causal, full), peak)
        with Interrupt() as interrupt, self.setup.pipeline.iterate(self.step, run.data.prefetch) as batches:
            self.meter = dataclasses.replace(self.meter, started=time.perf_counter())
            pending = None
            while self.step < run.steps and not interrupt.requested:
                metrics = self._dispatch(batches)
                if pending is not None:
                    self._read(*pending)
                pending = (self.step, metrics)
                if self._due(run.evaluation.every) or self._due(run.checkpoint.every) or self.step == run.steps:
                    self._read(*pending)
                    pending = None
                    if not interrupt.requested or self.step == run.steps:
                        self._evaluate_and_save(lambda: interrupt.requested)
            if pending is not None:
                self._read(*pending)
            if interrupt.requested and self.step < run.steps:
                self._save(final=True)
                raise Stopped(f"stopped at step {self.step} of {run.steps} and saved; run the same command to go on")
        return self.evaluated[1]

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _dispatch(self, batches: Batches) -> dict[str, jax.Array]:
        before = time.perf_counter()
        with self.ledger("data_wait"):
            batch = next(batches)
        self.meter.waited += time.perf_counter() - before
        with self.ledger("train"):
            on_device = self.setup.layout.global_batch(batch, self.run.batch.size)
            self.state, metrics = self._train_step(self.state, on_device)
        self.step += 1
        return metrics

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes in the metrics of a step; waits for it to be done, while the next one is already queued."""
        with self.ledger("train"):
            values = {name: _plain(value) for name, value in jax.device_get(metrics).items()}
        self.meter.steps += 1
        skipped = values.pop("skipped")
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.console.warn(
                f"step {step} skipped: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g} is not finite"
            )
        if self.skipped_in_a_row >= SKIPS_ALLOWED:
            raise Diverged(
                f"{SKIPS_ALLOWED} steps in a row up to step {step} had a loss or gradient that is not finite; nothing of them was "
                "saved: lower --optimizer.peak-lr, lengthen the warmup, or compute in float32"
            )
        every = self.run.log.every
        # A skipped step is always on record; the first one shows the initial loss.
        if skipped or step % every == 0 or step == self.run.steps or step == 1:
            record = {"tokens": step * self.run.tokens_per_step, "seconds": round(self.seconds, 3)}
            # What a batch had none of, such as examples of one denoiser, is no number.
            known = lambda value: isinstance(value, list) or skipped or not math.isnan(value)  # noqa: E731
            record |= {f"train/{name}": value for name, value in values.items() if name != "predicted" and known(value)}
            record |= self.meter.read()
            if skipped:
                record["train/skipped"] = 1
            self._write(step, record)
            self.console.step(step, record)
            if self.sinks is not None:
                self._event("ledger", step=step, seconds={k: round(v, 3) for k, v in self.ledger.seconds().items()})
        else:
            self.console.step(step)

    def _evaluate_and_save(self, stop: Callable[[], bool]) -> None:
        paused = self.meter.pause()
        last = self.step == self.run.steps
        if self._due(self.run.evaluation.every) or last:
            try:
                if not self.evaluate(stop):
                    if not last:
                        return
                    self._save(final=True)  # who was told to stop may have seconds left
                    self.evaluate()
            except Diverged:
                raise
            except Exception:
                self._save(final=True)  # the state is sound: what was trained is not lost with the evaluation
                raise
        if self._due(self.run.checkpoint.every) or last:
            self._save(final=last)
        self.meter.resume(paused)

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Validation loss, and samples for the report; False where `stop` ended it early."""
        with self.ledger("evaluate"):
            metrics = self.setup.evaluator(self.state["params"], stop)
            if metrics is None:
                return False
            self.evaluated = (self.step, metrics)
            seconds = round(self.seconds, 3)
            self._write(self.step, {"tokens": self.step * self.run.tokens_per_step, "seconds": seconds} | metrics)
            self.console.evaluation(self.step, metrics)
            self._sample()
        return True

    def _sample(self) -> None:
        """What the network says to the prompts, for the report."""
        said = self.sampler(self.state["params"])
        for prompt, text in said:
            self._event("sample", step=self.step, prompt=prompt, text=text)
        for prompt, text in said[:1]:
            self.console.say("sample: " + " ⏎ ".join(f"{prompt}{text}".splitlines()))

    def _save(self, *, final: bool) -> None:
        # A final save of a step whose save is still on its way waits for it, and makes up for one that failed.
        if self.saved == self.step and (not final or self.step == self.start):
            return
        step, metrics = self.evaluated
        meta = self.identity | {
            "config": configio.to_dict(self.run),
            "seconds": round(self.seconds, 3),
            "tokens": self.step * self.run.tokens_per_step,
        }
        self.check_owner()  # of the run directory: another trainer may have taken it over while this host slept
        with self.ledger("save"):
            blocked = self.checkpoints.save(
                self.step, self.state, meta, metric=metrics.get("eval/loss") if step == self.step else None, final=final
            )
        if blocked is None:
            return
        self.saved = self.step
        self._event("checkpoint", step=self.step, seconds=round(blocked, 4))
        self.console.checkpoint(self.step, blocked)

    def _write(self, step: int, record: dict[str, Any]) -> None:
        if self.sinks is not None:
            self.sinks.write(step, record)

    def _event(self, name: str, **fields: Any) -> None:
        if self.sinks is not None:
            self.sinks.event(name, **fields)

    def finish(self, status: str) -> None:
        """The last words of the session in events.jsonl."""
        seconds = {k: round(v, 3) for k, v in self.ledger.seconds().items()}
        self._event("ledger", step=self.step, seconds=seconds)
        self._event("end", status=status, step=self.step, seconds=round(self.seconds, 3))
