"""Makes run directories as training would leave them, without training: python fake_run.py DIRECTORY."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np

from maxpretrain import configio
from maxpretrain.config import (
    BatchConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
)
from maxpretrain.monitor.console import Console
from maxpretrain.monitor.sinks import Sinks

NATS_PER_BIT_PER_BYTE = 2.6  # tokens of 3.75 bytes
BASELINES = {"unigram_bits_per_byte": 3.16, "bigram_bits_per_byte": 2.43}
TEXTS = (
    "qe the of to  a. module(st, \nwit the the obj",
    "module of the class is returned by the function, and the value of the string is the number.",
    "The module provides a function that returns the number of bytes in the buffer, or None if the file <b>is not</b> open & ready.",
    "The function returns a new iterator over the (key, value) pairs of the mapping. If the key is missing, KeyError is raised; see\n"
    "also the description of dict.get() in the library reference. Changed in version 3.3: the default is now True.",
)
STARTED = 1_700_000_000.0


def make_run(
    directory: Path,
    *,
    name: str = "quickstart",
    steps: int = 600,
    until: int | None = None,
    every: int = 5,
    evaluate_every: int = 60,
    status: str | None = "done",
    final_loss: float = 4.85,
    overfit: float = 0.0,
    data_wait: float = 0.01,
    nan_from: int | None = None,
    resumed_at: int | None = None,
    peak_lr: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Writes a run directory.

    Args:
        until: the last step that happened; None: all.
        evaluate_every: 0: never.
        status: of the end event; None: the process was killed.
        overfit: nats by which the validation loss rises from its best.
        data_wait: share of the time in which the device waits.
        nan_from: the loss is NaN from this step on.
        resumed_at: a session was killed 20 steps after this one, and the next began there.
    """
    directory.mkdir(parents=True)
    run = Run(
        name=name,
        root="elsewhere",
        steps=steps,
        seed=seed,
        model=ModelConfig(num_layers=4, model_dim=192, num_heads=6, max_length=128),
        batch=BatchConfig(size=32, length=128),
        optimizer=OptimizerConfig(peak_lr=peak_lr, schedule=ScheduleConfig(warmup=60)),
        evaluation=EvaluationConfig(every=evaluate_every, prompts=("The ", "A <script>alert(1)</script>")),
        log=LogConfig(every=every, tensorboard=False),
    )
    (directory / "config.json").write_text(configio.to_json(run), encoding="utf-8")
    environment = {
        "maxpretrain": "0.1.0",
        "python": "3.12.4",
        "platform": "Linux-6.8-x86_64-with-glibc2.39",
        "command": ["maxpretrain", "train", "configs/quickstart.py", "--name", "a run"],
        "git_commit": "5973ebc",
        "versions": {"jax": "0.12.0.1", "flax": "0.12.12", "optax": "0.2.6", "numpy": "2.4.6"},
        "devices": [{"kind": "cpu", "id": 0}, {"kind": "cpu", "id": 1}],
    }
    (directory / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")
    last = steps if until is None else until
    sessions = [(0, last)] if resumed_at is None else [(0, resumed_at + 20), (resumed_at, last)]
    for i, (begin, end) in enumerate(sessions):
        _session(
            directory, run, begin, end, i == len(sessions) - 1,
            status=status, final_loss=final_loss, overfit=overfit, data_wait=data_wait, nan_from=nan_from,
        )  # fmt: skip
    return directory


def _session(directory, run, begin, end, is_last, *, status, final_loss, overfit, data_wait, nan_from):
    rng = np.random.default_rng((run.seed, begin))
    step_seconds, started = 0.21, STARTED + 1000 * begin
    spent = {
        "prepare": 4.1 if begin == 0 else 0.2,
        "compile": 6.1,
        "train": 0.0,
        "data_wait": 0.0,
        "evaluate": 0.0,
        "save": 0.0,
        "other": 1.3,
    }
    now = lambda: started + sum(spent.values())  # noqa: E731
    with (
        Sinks(directory, run) as sinks,
        Console(run.steps, directory / "log.txt", stream=io.StringIO(), clock=now) as console,
    ):
        sinks.event("start", time=started, step=begin, devices=2, device_kind="cpu", parameters=3_113_280)
        sinks.event("baselines", time=now(), **BASELINES)
        with console.working("compiling the training step"):
            sinks.event("compile", time=now(), seconds=6.1)
        for step in range(begin + 1, end + 1):
            spent["train"] += step_seconds * (1 - data_wait)
            spent["data_wait"] += step_seconds * data_wait
            share = step / run.steps
            true = final_loss + (8.32 - final_loss) * (0.75 * math.exp(-14 * share) + 0.25 * math.exp(-3.2 * share))
            lr = run.optimizer.peak_lr * min(1.0, step / 60) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
            if step % run.log.every == 0:
                speed = run.tokens_per_step / step_seconds * rng.normal(1, 0.02)
                lost = nan_from is not None and step >= nan_from
                metrics = {
                    "tokens": step * run.tokens_per_step,
                    "seconds": now() - started,
                    "train/loss": math.nan if lost else true + rng.normal(0, 0.06),
                    "train/grad_norm": math.inf
                    if lost
                    else 0.45 + 2 * math.exp(-25 * share) + abs(rng.normal(0, 0.06)),
                    "train/learning_rate": lr,
                    "train/tokens_per_second": speed,
                    "train/tokens_per_second_per_device": speed / 2,
                    "train/mfu": 0.31 * speed / 19_505,
                    "train/mfu_full": 0.34 * speed / 19_505,
                    "train/step_seconds": step_seconds,
                    "train/data_wait_seconds": step_seconds * data_wait,
                }
                sinks.write(step, metrics)
                console.step(step, metrics)
            if run.evaluation.every and (step % run.evaluation.every == 0 or step == run.steps):
                loss = true + 0.05 + overfit * max(0.0, share - 0.5) * 2
                evaluation = {
                    "tokens": step * run.tokens_per_step,
                    "eval/loss": loss,
                    "eval/perplexity": math.exp(loss),
                    "eval/bits_per_byte": loss / NATS_PER_BIT_PER_BYTE,
                    "eval/accuracy": 0.42 * (1 - math.exp(-4 * share)),
                }
                spent["evaluate"] += 1.4
                sinks.write(step, evaluation)
                console.evaluation(step, evaluation)
                text = TEXTS[min(len(TEXTS) - 1, int(len(TEXTS) * share))]
                for prompt in run.evaluation.prompts:
                    sinks.event("sample", time=now(), step=step, prompt=prompt, text=prompt + text)
                spent["save"] += 0.05
                sinks.event("checkpoint", time=now(), step=step, seconds=0.05)
                console.checkpoint(step, 0.05)
                sinks.event("ledger", time=now(), step=step, seconds=spent)
        if is_last and status is not None:
            sinks.event("ledger", time=now(), step=end, seconds=spent)
            sinks.event("end", time=now(), status=status, step=end, seconds=sum(spent.values()))
            console.say(f"{status} at step {end}")


if __name__ == "__main__":
    from maxpretrain.monitor.report import write_report

    out = Path(sys.argv[1])
    done = make_run(out / "quickstart")
    variants = {
        "quickstart": done,
        "wide": make_run(out / "wide", name="wide", final_loss=4.62, peak_lr=1e-3, seed=1),
        "small": make_run(out / "small", name="small", final_loss=5.2, overfit=0.4, seed=2),
        "diverged": make_run(out / "diverged", status="diverged", until=340, nan_from=310),
        "resumed": make_run(out / "resumed", resumed_at=240, status="stopped", until=420, data_wait=0.13),
        "begun": make_run(out / "begun", until=5, status=None, evaluate_every=0),
    }
    for directory in variants.values():
        print(write_report([directory]))
    print(write_report([variants["quickstart"], variants["wide"], variants["small"]]))
