import io
import re
import time

import pytest
from terminal import run_on_terminal, screen

from maxpretrain.monitor.console import Console
from maxpretrain.monitor.units import count, duration, percent, significant

TRAIN = {"train/loss": 3.41214, "train/learning_rate": 9.8e-4, "train/tokens_per_second": 41_234.0, "train/mfu": 0.3141}
EVALUATION = {"eval/loss": 3.21, "eval/perplexity": 1234.567, "eval/bits_per_byte": 1.912, "eval/accuracy": 0.351}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines(tmp_path):
    clock, out = Clock(), io.StringIO()
    with Console(1000, tmp_path / "log.txt", stream=out, log_every=10, clock=clock) as console:
        console.say("demo: 3.1 M parameters")
        with console.working("compiling the training step") as work:
            clock.now += 6.1
            assert out.getvalue().endswith("compiling the training step …")  # said before it is done
        assert work.seconds == 6.1
        for step in range(1, 31):
            clock.now += 0.5
            console.step(step, TRAIN if step % 10 == 0 else None)
        console.evaluation(30, EVALUATION)
        console.checkpoint(30, 0.048)
        console.warn("the loss was not finite at step 29; the step was skipped")
        console.step(1000, {"train/loss": float("nan")})
    expected = (
        "demo: 3.1 M parameters\n"
        "compiling the training step … done in 6.1 s\n"
        "step   10/1000  loss 3.4121  lr 9.80e-04  41.2k tok/s  MFU 31.4 %  8 min 15 s left\n"
        "step   20/1000  loss 3.4121  lr 9.80e-04  41.2k tok/s  MFU 31.4 %  8 min 10 s left\n"
        "step   30/1000  loss 3.4121  lr 9.80e-04  41.2k tok/s  MFU 31.4 %  8 min 5 s left\n"
        "eval   30/1000  loss 3.2100  perplexity 1,234.57  bits/byte 1.9120  accuracy 35.1 %\n"
        "save   30/1000  checkpoint, training waited 0.05 s\n"
        "warning: the loss was not finite at step 29; the step was skipped\n"
        "step 1000/1000  loss nan\n"
    )
    assert out.getvalue() == expected
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == expected


def test_the_log_is_appended_to(tmp_path):
    for text in ("first session", "second session"):
        with Console(10, tmp_path / "log.txt", stream=io.StringIO()) as console:
            console.say(text)
    assert (tmp_path / "log.txt").read_text() == "first session\nsecond session\n"


def test_time_left_begins_at_the_first_step_of_the_session():
    clock, out = Clock(), io.StringIO()
    with Console(600, stream=out, clock=clock) as console:
        console.step(500, {"train/loss": 1.0})  # resumed
        clock.now += 10
        console.step(510, {"train/loss": 1.0})
    assert out.getvalue().splitlines() == ["step 500/600  loss 1.0000", "step 510/600  loss 1.0000  1 min 30 s left"]


def test_something_said_while_working():
    clock, out = Clock(), io.StringIO()
    with Console(10, stream=out, clock=clock) as console:
        with console.working("preparing data"):
            console.warn("2 documents were empty")
            clock.now += 65
        with pytest.raises(ValueError, match="could not convert"), console.working("compiling"):
            clock.now += float("2x")
    assert out.getvalue().splitlines() == [
        "preparing data …",
        "warning: 2 documents were empty",
        "preparing data … done in 1 min 5 s",
        "compiling … failed after 0.00 s",
    ]


def test_a_closed_pipe_does_not_end_the_training(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Console(10, tmp_path / "log.txt", stream=Closed(), clock=Clock()) as console:
        console.step(1, {"train/loss": 1.0})
        console.step(2, {"train/loss": 0.5})
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "step  1/10  loss 1.0000",
        "step  2/10  loss 0.5000  1 s left",
    ]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    out = io.StringIO()
    with Console(10, tmp_path / "log.txt", stream=out, clock=Clock()) as console:
        console._log.close()
        console._log = Full()
        console.step(1, {"train/loss": 1.0})
        console.step(2, {"train/loss": 0.5})
    assert out.getvalue().splitlines() == [
        "step  1/10  loss 1.0000",
        "warning: log.txt cannot be written any more: No space left on device",
        "step  2/10  loss 0.5000  1 s left",
    ]


def test_an_ascii_stream_gets_ascii():
    raw = io.BytesIO()
    with (
        Console(10, stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True)) as console,
        console.working("compiling"),
    ):
        pass
    assert raw.getvalue() == b"compiling ... done in 0.00 s\n"


def test_a_step_costs_the_host_little(tmp_path):
    with Console(100_000, tmp_path / "log.txt", stream=io.StringIO()) as console:
        best = min(_timed(lambda: [console.step(step, TRAIN) for step in range(200)]) for _ in range(5)) / 200
        assert best < 100e-6
        best = min(_timed(lambda: [console.step(step) for step in range(200)]) for _ in range(5)) / 200
        assert best < 20e-6


def _timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


DEMO = """
import time
from maxpretrain.monitor.console import Console
with Console(200, {log!r}, log_every=50) as console:
    console.say("demo [bold]not markup[/bold]")
    with console.working("compiling the training step"):
        time.sleep(0.4)
    for step in range(1, 101):
        console.step(step, {train})
        if step == 50:
            time.sleep(0.3)
            console.evaluation(step, {evaluation})
            console.checkpoint(step, 0.05)
            console.warn("something odd")
            print("printed by a library")
    time.sleep(0.3)
"""


def demo(log, **options):
    return run_on_terminal(DEMO.format(log=str(log), train=TRAIN, evaluation=EVALUATION), **options)


def test_on_a_terminal_one_line_is_live_and_the_others_stay(tmp_path):
    raw = demo(tmp_path / "log.txt", columns=100)
    lines = screen(raw)
    assert lines[0] == "demo [bold]not markup[/bold]"
    assert re.fullmatch(r"compiling the training step … done in 0\.\d\d s", lines[1])
    assert lines[2:6] == [
        "eval  50/200  loss 3.2100  perplexity 1,234.57  bits/byte 1.9120  accuracy 35.1 %",
        "save  50/200  checkpoint, training waited 0.05 s",
        "warning: something odd",
        "printed by a library",
    ]
    live = r"━{15}─{15} 100/200  loss 3\.4121  lr 9\.80e-04  41\.2k tok/s  MFU 31\.4 %  1 s left"
    assert re.fullmatch(live, lines[6])
    assert not any(lines[7:])
    # A spinner with the time so far, while it compiled; the cursor comes back; there is colour.
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] ?(\x1b\[0m)?compiling the training step … 0\.\d\d s", raw)
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")
    assert "\x1b[32meval" in raw
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "\x1b" not in log
    assert log.splitlines()[2].startswith("step  50/200  loss 3.4121  lr 9.80e-04  41.2k tok/s  MFU 31.4 %")
    assert log.splitlines()[3] == "eval  50/200  loss 3.2100  perplexity 1,234.57  bits/byte 1.9120  accuracy 35.1 %"
    assert log.splitlines()[6].startswith("step 100/200  loss 3.4121")
    assert len(log.splitlines()) == 7


def test_no_color_is_honoured_and_a_narrow_terminal_gets_one_line(tmp_path):
    raw = demo(tmp_path / "log.txt", columns=48, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38|48)[0-9;]*m", raw)
    lines = screen(raw)
    live = next(line for line in lines if "100/200" in line)
    assert re.fullmatch(r"━+╸?─+ 100/200  loss 3\.4121  1 s left", live)
    assert len(live) <= 47


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    raw = demo(tmp_path / "log.txt", TERM="dumb")
    assert "\x1b" not in raw
    assert "step  50/200  loss 3.4121" in raw


def test_units():
    cases = {0.0478: "0.05 s", 0.999: "1.0 s", 6.14: "6.1 s", 9.96: "10 s", 59.6: "1 min 0 s", 151: "2 min 31 s"}
    cases |= {3599.7: "1 h 0 min", 11_520: "3 h 12 min", 86_399: "1 d 0 h", 356_400: "4 d 3 h", float("nan"): "?"}
    assert {value: duration(value) for value in cases if value == value} == {k: v for k, v in cases.items() if k == k}
    counts = {0: "0", 512: "512", 12.34: "12.3", 999.6: "1 k", 4096: "4.1 k", 12_300_000: "12.3 M", 999_960: "1 M"}
    counts |= {124_439_808: "124 M", 1_543_714_304: "1.5 B", 15e12: "15 T", 3_113_280: "3.1 M"}
    assert {value: count(value) for value in counts} == counts
    assert count(41_234.0, "") == "41.2k"
    assert percent(0.3141) == "31.4 %"
    assert [significant(v) for v in (3.41214, 0.0001, 2.5e-7, 41_234.0, float("inf"), float("nan"))] == [
        "3.412", "0.0001", "2.5e-07", "41230", "∞", "NaN",
    ]  # fmt: skip
