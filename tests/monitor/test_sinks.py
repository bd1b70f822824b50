import errno
import json
import logging
import math
import struct
import sys
import types

import numpy as np
import pytest

from maxpretrain.config import LogConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.monitor.sinks import Sinks, read_events, read_metrics

QUIET = Run(log=LogConfig(tensorboard=False))


def test_a_step_is_one_line(tmp_path):
    sinks = Sinks(tmp_path, QUIET)
    sinks.write(
        10, {"tokens": 40_960, "train/loss": np.float32(0.5), "train/learning_rate": 1e-3, "train/mfu": np.array(0.25)}
    )
    # Written already, before close: a kill loses nothing.
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 10, "tokens": 40960, "train/loss": 0.5, "train/learning_rate": 0.001, "train/mfu": 0.25}\n'
    )
    sinks.close()
    sinks.close()


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    with Sinks(tmp_path, QUIET) as sinks:
        sinks.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/x": -math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "train/loss": "NaN",
        "train/grad_norm": "Infinity",
        "train/x": "-Infinity",
    }
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["train/loss"])
    assert record["train/grad_norm"] == math.inf
    assert record["train/x"] == -math.inf


def test_a_torn_last_line_breaks_neither_appending_nor_reading(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/lo')
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start", "step": 0}\n{"event": "sam\xc3')
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 3.0}]
    assert read_events(tmp_path) == [{"event": "start", "step": 0}]
    with Sinks(tmp_path, QUIET) as sinks:
        sinks.write(2, {"train/loss": 2.5})
        sinks.event("start", time=5.0, step=1)
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.5}]
    assert read_events(tmp_path) == [{"event": "start", "step": 0}, {"event": "start", "time": 5.0, "step": 1}]


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}')
    with Sinks(tmp_path, QUIET) as sinks:
        sinks.write(2, {"train/loss": 2.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_for_each_step_the_last_line_wins_key_by_key(tmp_path):
    with Sinks(tmp_path, QUIET) as sinks:
        for step in (10, 20, 30, 40):
            sinks.write(step, {"train/loss": 5.0 - step / 100})
            if step % 20 == 0:
                sinks.write(step, {"eval/loss": 6.0 - step / 100})
        # Killed after step 40 and resumed from step 10: 30 and 40 are not yet reached again.
        sinks.write(20, {"train/loss": 9.0})
    assert read_metrics(tmp_path) == [
        {"step": 10, "train/loss": 4.9},
        {"step": 20, "train/loss": 9.0, "eval/loss": 5.8},
        {"step": 40, "eval/loss": 5.6},
    ]


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '[1]\n{"train/loss": 1}\n{"step": true, "train/loss": 1}\n\n{"step": 3, "train/loss": 2}\n'
    )
    assert read_metrics(tmp_path) == [{"step": 3, "train/loss": 2}]
    assert read_events(tmp_path) == []


def test_events_hold_any_text_and_have_a_time(tmp_path):
    with Sinks(tmp_path, QUIET) as sinks:
        sinks.event("sample", step=5, prompt="The ", text="a\nb\u2028c \ud800 NaN\x00")
        sinks.event("ledger", step=5, seconds={"train": np.float64(1.5)}, path=tmp_path)
    sample, ledger = read_events(tmp_path)
    assert sample["text"] == "a\nb\u2028c ? NaN\x00"
    assert sample["time"] > 1.7e9
    assert ledger["seconds"] == {"train": 1.5}
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 2


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot write .*metrics\.jsonl: .*; choose another `root` or make it writable"
    ):
        Sinks(tmp_path / "missing", QUIET)


def test_a_disk_that_is_full_for_a_while_loses_nothing(tmp_path):
    said = []
    sinks = Sinks(tmp_path, QUIET, warn=said.append)
    real = sinks._metrics._file

    class Full:
        room = 12

        def write(self, data):
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real.write(data[: self.room])  # the disk takes what it can
            self.room -= written
            return written

    sinks._metrics._file = Full()
    sinks.write(1, {"train/loss": 3.0})
    sinks.write(2, {"train/loss": 2.0})
    assert len(said) == 1
    assert "No space left on device; lines are kept in memory and tried again" in said[0]
    sinks._metrics._file = real
    sinks.write(3, {"train/loss": 1.0})
    assert said[1].endswith("can be written again; nothing more is missing")
    assert [(record["step"], record["train/loss"]) for record in read_metrics(tmp_path)] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]
    sinks.close()


def tensorboard_events(directory):
    """(step, tag, value) of the scalars, and steps of session starts, of every event file; records are length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, starts = [], []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                starts.append(event.step)
    return scalars, starts


def test_tensorboard_has_the_same_numbers(tmp_path, caplog):
    run = Run()
    with caplog.at_level(logging.WARNING), Sinks(tmp_path, run) as sinks:
        sinks.event("start", step=0)
        sinks.write(5, {"train/loss": 2.5, "train/learning_rate": 0.5})
        sinks.write(6, {"train/loss": math.nan})
    scalars, starts = tensorboard_events(tmp_path / "tensorboard")
    assert scalars[:2] == [(5, "train/loss", 2.5), (5, "train/learning_rate", 0.5)]
    assert math.isnan(scalars[2][2])
    assert starts == []
    assert caplog.text == ""


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    with Sinks(tmp_path, Run()) as sinks:
        sinks.event("start", step=40)
        sinks.write(41, {"train/loss": 2.5})
    assert tensorboard_events(tmp_path / "tensorboard") == ([(41, "train/loss", 2.5)], [41])


def test_tensorboard_can_be_off(tmp_path):
    with Sinks(tmp_path, QUIET) as sinks:
        sinks.write(5, {"train/loss": 2.5})
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_missing_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as error:
        Sinks(tmp_path, Run(log=LogConfig(wandb=True)))
    assert str(error.value) == (
        'log.wandb is on, but wandb is not installed; pip install "maxpretrain[track]", or set log.wandb to False'
    )
    assert error.value.exit_status == 2
    assert list(tmp_path.iterdir()) == []


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []
    fake = types.ModuleType("wandb")
    session = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("finish"))
    fake.init = lambda **options: started.append(options) or session
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = Run(name="demo", log=LogConfig(wandb=True, wandb_project="mine", tensorboard=False))
    for _ in range(2):
        with Sinks(tmp_path, run) as sinks:
            sinks.write(3, {"train/loss": 2.5})
    assert logged == [{"step": 3, "train/loss": 2.5}, "finish"] * 2
    first, second = started
    assert (first["project"], first["name"], first["resume"]) == ("mine", "demo", "allow")
    assert first["id"] == second["id"]
    assert len(first["id"]) == 12
    assert first["config"]["optimizer"]["peak_lr"] == 0.001


def test_wandb_is_not_imported_unasked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Sinks(tmp_path, QUIET) as sinks:
        sinks.write(1, {"train/loss": 2.0})
    assert '"train/loss":2.0' in (tmp_path / "metrics.jsonl").read_text().replace(" ", "")
