"""Whole runs on a tiny model: what is written, exact resume through real processes, and what is refused."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxpretrain import configio
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.errors import Diverged, Stopped, UserError
from maxpretrain.monitor.sinks import read_events, read_metrics
from maxpretrain.train import train

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "text",
    "and",
    "learns",
    "what",
    "follows",
    "from",
    "what",
    "it",
    "has",
    "seen",
    "so",
    "far",
    "in",
    "the",
    "same",
    "document",
]


def text(documents: int) -> str:
    return "\n".join(" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 24)) for i in range(1, documents + 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text(text(60))
    (folder / "validation.txt").write_text(text(4))
    return folder


@pytest.fixture
def run(corpus, tmp_path):
    return tiny(corpus, tmp_path)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that is done, with evaluations and samples; copy it rather than write in it."""
    return train(
        tiny(
            corpus,
            tmp_path_factory.mktemp("finished"),
            evaluation=EvaluationConfig(every=3, prompts=("the ",), sample_tokens=4),
        )
    )


@pytest.fixture
def copy(finished, run):
    """The finished run as `run`'s own."""
    run_dir = Path(run.root) / "tiny"
    shutil.copytree(finished, run_dir)
    return run_dir


def tiny(corpus: Path, root: Path, **changes) -> Run:
    config = Run(
        name="tiny",
        root=str(root / "runs"),
        steps=6,
        model=ModelConfig(num_layers=1, model_dim=16, num_heads=2, max_length=32, dropout=0.1),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            train=(str(corpus / "train.txt"),),
            validation=(str(corpus / "validation.txt"),),
            separator="\n",
            cache=str(corpus / "cache"),
        ),
        batch=BatchConfig(size=8, length=32),
        optimizer=OptimizerConfig(peak_lr=1e-2, schedule=ScheduleConfig(warmup=2)),
        mesh=MeshConfig(data=1, fsdp=-1),
        evaluation=EvaluationConfig(every=3, prompts=()),
        checkpoint=CheckpointConfig(every=3),
        log=LogConfig(every=1),
    )
    return dataclasses.replace(config, **changes)


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["train/loss"], m["train/grad_norm"]) for m in read_metrics(run_dir) if "train/loss" in m]


def test_a_run_leaves_what_the_contract_names(copy, run):
    run_dir = copy
    names = {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "tensorboard",
        "report.html",
        "tokenizer",
    }
    assert names <= {path.name for path in run_dir.iterdir()}
    saved = configio.read_saved(run_dir)
    assert saved.model == dataclasses.replace(run.model, vocab_size=256)
    assert (saved.data, saved.optimizer, saved.mesh) == (run.data, run.optimizer, run.mesh)
    metrics = read_metrics(run_dir)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    for record in metrics:
        assert {
            "step", "tokens", "seconds", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second",
            "train/tokens_per_second_per_device", "train/mfu", "train/mfu_full", "train/step_seconds", "train/data_wait_seconds",
        } <= set(record)  # fmt: skip
        assert record["tokens"] == record["step"] * 256
    assert [m["train/learning_rate"] for m in metrics][:2] == [pytest.approx(0.005), pytest.approx(0.01)]
    evaluations = [m for m in metrics if "eval/loss" in m]
    assert [m["step"] for m in evaluations] == [3, 6]
    assert {"eval/perplexity", "eval/bits_per_byte", "eval/accuracy"} <= set(evaluations[0])
    assert metrics[0]["train/loss"] == pytest.approx(5.55, abs=0.1)  # ln of about 257
    assert evaluations[1]["eval/loss"] < metrics[0]["train/loss"] - 0.5
    events = read_events(run_dir)
    assert [e["event"] for e in events if e["event"] in ("start", "end", "sample", "checkpoint")] == [
        "start", "sample", "checkpoint", "sample", "checkpoint", "end",
    ]  # fmt: skip
    assert events[-1]["status"] == "done"
    ledger = [e for e in events if e["event"] == "ledger"][-1]["seconds"]
    assert {"prepare", "compile", "train", "evaluate", "save"} <= set(ledger)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["devices"]["count"] == 8
    assert Checkpoints(run_dir / "checkpoints").steps() == [3, 6]
    assert Checkpoints(run_dir / "checkpoints").read_meta(6)["config"] == configio.to_dict(saved)
    assert "eval 6/6" in (run_dir / "log.txt").read_text()

    # Run again, it is done: nothing is trained, and nothing lost.
    before = curve(run_dir)
    train(run)
    assert curve(run_dir) == before
    assert "this run is done: step 6 of 6" in (run_dir / "log.txt").read_text()


# Run in a second process: resumes from each step of a finished run in turn, and prints the curves.
RESUME = """
import dataclasses, json, shutil, sys
from pathlib import Path
from maxpretrain import configio
from maxpretrain.train import train
from maxpretrain.monitor.sinks import read_metrics
source, target = Path(sys.argv[1]), Path(sys.argv[2])
run = configio.read_saved(source)
for step in (1, 2, 3, 4, 5):
    there = target / f"from{step}"
    there.mkdir(parents=True)
    shutil.copytree(source / "checkpoints" / str(step), there / "checkpoints" / str(step))
    shutil.copy(source / "config.json", there)
    train(run.replace(root=str(target), name=there.name))
    print("CURVE", json.dumps([step, [(m["step"], m["train/loss"], m["train/grad_norm"]) for m in read_metrics(there) if "train/loss" in m]]))
"""


def child(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)


def test_resume_is_exact_from_every_step_in_another_process(corpus, tmp_path):
    run = tiny(
        corpus, tmp_path, checkpoint=CheckpointConfig(every=1, keep=6), evaluation=EvaluationConfig(every=0, prompts=())
    )
    whole = train(run)
    result = child(RESUME, str(whole), str(tmp_path / "resumed"))
    assert result.returncode == 0, result.stderr[-2000:]
    curves = dict(json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("CURVE "))
    assert sorted(curves) == [1, 2, 3, 4, 5]
    expected = [list(point) for point in curve(whole)]
    for step, resumed in curves.items():
        assert resumed == expected[step:]  # bit for bit: Python's JSON round-trips floats exactly


MAIN = "import sys; from maxpretrain.cli import main; sys.exit(main(sys.argv[1:]))"


def config_file(folder: Path, run: Run) -> Path:
    path = folder / "config.json"
    path.write_text(configio.to_json(run))
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_same_command_goes_on(corpus, tmp_path, number):
    # Long enough that the signal arrives on the way; the reference stops at the same step count.
    run = tiny(
        corpus,
        tmp_path,
        steps=2000,
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0, prompts=()),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "train", str(config_file(tmp_path, run))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = Path(run.root) / "tiny" / "metrics.jsonl"
    deadline = time.time() + 240
    while not (metrics.exists() and metrics.stat().st_size > 500):
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert re.search(r"maxpretrain: stopped at step (\d+) of 2000 and saved; run the same command to go on", errors)
    run_dir = Path(run.root) / "tiny"
    stopped = int(re.search(r"stopped at step (\d+)", errors)[1])
    assert Checkpoints(run_dir / "checkpoints").latest() == stopped
    assert (run_dir / "report.html").exists()
    if number == signal.SIGTERM:
        return
    interrupted = curve(run_dir)
    train(run.replace(steps=stopped + 2))
    assert [s for s, *_ in curve(run_dir)] == list(range(1, stopped + 3))
    assert curve(run_dir)[:stopped] == interrupted


def test_a_run_of_another_config_is_refused_and_nothing_is_touched(copy, run):
    run_dir = copy
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    cases = {
        "model.num_layers 1, and this one has 2": run.replace(model=dataclasses.replace(run.model, num_layers=2)),
        "batch.size 8, and this one has 16": run.replace(batch=BatchConfig(size=16, length=32)),
        "data.shuffle True, and this one has False": run.replace(data=dataclasses.replace(run.data, shuffle=False)),
        "objective.mask_documents True": run.replace(
            objective=dataclasses.replace(run.objective, mask_documents=False)
        ),
        "seed 0, and this one has 1": run.replace(seed=1),
    }
    for message, other in cases.items():
        started = time.time()
        with pytest.raises(UserError, match=re.escape(message)):
            train(other)
        assert time.time() - started < 5
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    # What may change, may: the difference is said.
    train(run.replace(steps=7, log=LogConfig(every=2)))
    log = (run_dir / "log.txt").read_text()
    assert "changed since it was last started: steps 6 -> 7" in log
    assert "resuming after step 6" in log
    assert curve(run_dir)[-1][0] == 7


def test_fresh_starts_over_and_keeps_the_old_run(copy, run):
    run, first = run.replace(steps=2, evaluation=EvaluationConfig(every=0, prompts=())), copy
    (first / "notes.txt").write_text("mine")
    train(run, fresh=True)
    kept = [path for path in first.parent.iterdir() if path.name.startswith("tiny.")]
    assert len(kept) == 1
    assert (kept[0] / "notes.txt").read_text() == "mine"
    assert not (first / "notes.txt").exists()
    assert [s for s, *_ in curve(first)] == [1, 2]
    # Refused, it leaves the run where it was.
    with pytest.raises(UserError, match="12 is not divisible"):
        train(run.replace(batch=BatchConfig(size=12, length=32)), fresh=True)
    assert [s for s, *_ in curve(first)] == [1, 2]
    assert [path for path in first.parent.iterdir() if path.name.startswith("tiny.")] == kept


def test_a_text_that_changed_behind_the_config_is_refused(corpus, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(text(40))
    run = tiny(corpus, tmp_path, steps=2, evaluation=EvaluationConfig(every=0, prompts=()))
    run = run.replace(data=dataclasses.replace(run.data, train=(str(own),)))
    train(run)
    # Elsewhere, with the same content, it is the same text.
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "own.txt"
    own.rename(moved)
    elsewhere = run.replace(data=dataclasses.replace(run.data, train=(str(moved),)), steps=3)
    assert len(curve(train(elsewhere))) == 3
    moved.write_text(text(41))
    with pytest.raises(UserError, match="the prepared text is not the one that"):
        train(elsewhere.replace(steps=4))
    own.write_text(text(42))
    with pytest.raises(
        UserError, match=r"the prepared text is not the one .* \(changed since .* data\.train .*own\.txt"
    ):
        train(run.replace(steps=4))
    with pytest.raises(UserError, match=r"holds a run with data\.train"):  # another name: refused without reading it
        train(run.replace(data=dataclasses.replace(run.data, train=(str(tmp_path / "other.txt"),))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": BatchConfig(size=12, length=32)}, "batch.size 12 is not divisible by mesh fsdp = 8; use 8 or 16"),
        ({"mesh": MeshConfig(fsdp=4, tensor=2, data=1), "model": ModelConfig(num_layers=1, model_dim=24, num_heads=3, max_length=32)},
         "3 is not divisible by mesh tensor = 2; use 2 or 4"),
        ({"model": ModelConfig(num_layers=1, model_dim=16, num_heads=2, max_length=32, vocab_size=100)}, "model.vocab_size"),
        ({"compute": "cudnn"}, "compute.attention cudnn cannot run here: the device is a cpu; use auto or xla"),
        ({"compute": "devices"}, "compute.cpu_devices is 4, but jax has started with 8 CPU devices"),
        ({"log": LogConfig(wandb=True)}, 'pip install "maxpretrain[track]"'),
        ({"data": "missing"}, "missing.txt"),
        ({"data": "short"}, "validation"),
    ],
    ids=["batch", "heads", "vocabulary", "kernel", "devices", "wandb", "file", "short"],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_compilation_and_leaves_nothing(
    corpus, tmp_path, run, change, message, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    if change.get("compute") == "cudnn":
        change = {"compute": dataclasses.replace(run.compute, attention="cudnn")}
    if change.get("compute") == "devices":
        change = {"compute": dataclasses.replace(run.compute, cpu_devices=4)}
    if change.get("data") == "missing":
        change = {"data": dataclasses.replace(run.data, train=(str(tmp_path / "missing.txt"),))}
    if change.get("data") == "short":
        (tmp_path / "short.txt").write_text("too short")
        change = {"data": dataclasses.replace(run.data, validation=(str(tmp_path / "short.txt"),))}
    with pytest.raises(UserError, match=re.escape(message)):
        train(run.replace(**change))
    assert not (Path(run.root) / "tiny").exists()


def test_a_learning_rate_that_diverges_ends_the_run_with_a_diagnosis_and_saves_nothing_of_it(run, monkeypatch):
    from maxpretrain.train import loop

    monkeypatch.setattr(loop, "SKIPS_ALLOWED", 3)
    optimizer = OptimizerConfig(peak_lr=1e30, clip_norm=None, schedule=ScheduleConfig(shape="constant", warmup=0))
    with pytest.raises(Diverged, match="3 steps in a row"):
        train(
            run.replace(
                steps=40,
                optimizer=optimizer,
                checkpoint=CheckpointConfig(every=0),
                evaluation=EvaluationConfig(every=0),
            )
        )
    run_dir = Path(run.root) / "tiny"
    assert Checkpoints(run_dir / "checkpoints").steps() == []
    assert read_events(run_dir)[-1]["status"] == "diverged"
    assert "is not finite" in (run_dir / "log.txt").read_text()


def test_a_signal_during_an_evaluation_saves_first(run, monkeypatch):
    from maxpretrain.evaluate.perplexity import Evaluator
    from maxpretrain.train import loop

    order, real = [], Evaluator.__call__

    def evaluate(self, params, stop=lambda: False):
        os.kill(os.getpid(), signal.SIGTERM) if not order else None
        while not stop() and not order:
            time.sleep(0.01)
        order.append("given up" if stop() else "evaluated")
        return real(self, params, stop)

    def save(self, *, final):
        order.append(f"saved {self.step}")
        return saving(self, final=final)

    saving = loop.Trainer._save
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    monkeypatch.setattr(loop.Trainer, "_save", save)
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        train(run)
    assert order == ["given up", "saved 3"]
    order.clear()
    run_dir = train(run.replace(steps=6))  # the signal comes in the last evaluation: the run is saved, then evaluated
    assert order == ["given up", "saved 6", "evaluated", "saved 6"]
    assert [m["step"] for m in read_metrics(run_dir) if "eval/loss" in m] == [6]


def test_no_write_permission_is_one_sentence(run, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=re.escape(str(blocked))):
        train(run.replace(root=str(blocked)))


def test_a_save_that_failed_is_not_reported_as_one(run, monkeypatch):
    real = Checkpoints.save

    def failing(self, step, *args, final=False, **options):
        return real(self, step, *args, final=final, **options) if final else None

    monkeypatch.setattr(Checkpoints, "save", failing)
    run_dir = train(run.replace(evaluation=EvaluationConfig(every=0, prompts=())))
    assert [e["step"] for e in read_events(run_dir) if e["event"] == "checkpoint"] == [6]
    assert Checkpoints(run_dir / "checkpoints").steps() == [6]


def test_a_tokenizer_that_lacks_what_the_objective_needs_is_refused_before_text_is_read(tmp_path):
    from maxpretrain.config import ModelConfig
    from maxpretrain.data.tokenizer import Bytes
    from maxpretrain.objectives import MLM
    from maxpretrain.train import setup

    Bytes(("</s>",)).save(tmp_path)
    run = Run(
        model=ModelConfig(architecture="encoder"),
        objective=MLM(),
        tokenizer=TokenizerConfig(kind="bytes", path=str(tmp_path)),
        data=DataConfig(train=("nowhere.txt",)),
    )
    with pytest.raises(UserError, match="objective MLM needs a mask token, and the tokenizer has none"):
        setup.precheck(run)
