"""What a person watching the run sees: one live line on a terminal, plain lines anywhere else, and log.txt with both."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from maxpretrain.monitor.units import count, duration, percent

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
# Colours of the terminal's own palette, so that they fit light and dark themes.
_BAR, _TRACK, _LABEL, _MARK, _WARN = "cyan", "dim", "dim", "green", "bold yellow"
_REFRESH_PER_SECOND = 8


class Working:
    """What `Console.working` hands out: `update` shows how far it is, `seconds` is how long it took."""

    def __init__(self, text: str, clock: Callable[[], float]):
        self.text, self.detail, self.seconds = text, "", 0.0
        self._clock, self._start = clock, clock()

    def update(self, detail: str) -> None:
        """Shows, on a terminal, `detail` behind the text: "12.3 MB of 45.6 MB"."""
        self.detail = detail

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start


class Console:
    """The console of a run.

    On a terminal the last line is live: bar, step, loss, learning rate, tokens/s, MFU, time left, drawn by a thread a few times a
    second. Elsewhere every log interval is one plain line. Everything shown is appended to `log_file` without colours; there the
    live line is one line per log interval too. NO_COLOR is honoured. One thread calls it.

    Args:
        total_steps: of the run.
        log_file: appended to; None: no file.
        stream: where to write; None: standard output.
        log_every: `step` may be called every step, and leaves a plain line every so many steps and at the last.
    """

    def __init__(
        self,
        total_steps: int,
        log_file: Path | str | None = None,
        *,
        stream: IO[str] | None = None,
        log_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._every, self._clock = max(1, total_steps), max(1, log_every), clock
        self._stream: IO[str] | None = sys.stdout if stream is None else stream
        self._log = open(log_file, "a", encoding="utf-8", errors="replace") if log_file else None  # noqa: SIM115 (closed by close)
        self._mid_line = False  # the plain line of a `working` waits for its end
        self._step, self._metrics = 0, {}  # type: int, Mapping[str, Any]
        self._first: tuple[int, float] | None = None  # step and time of the first `step` call
        self._stepped = 0.0
        self._working: list[Working] = []
        self._live: Live | None = None
        self._rich: RichConsole | None = None
        if self._stream is not None and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._rich = RichConsole(file=self._stream, highlight=False, emoji=False, markup=False)
        atexit.register(self.close)  # gives the cursor back where nobody else did

    # What is reported -------------------------------------------------------------------------------------------------

    def step(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """A step is done. Without metrics only the bar moves. Costs some microseconds."""
        self._step, self._stepped = step, self._clock()
        if self._first is None:
            self._first = (step, self._stepped)
        if metrics:
            self._metrics = metrics
            if step % self._every == 0 or step >= self._total:
                self._emit(self._plain_step(step, metrics), shown=self._rich is None)
        if self._rich is not None and self._live is None:
            self._start_live()

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A permanent line with what was measured: loss, perplexity, bits per byte, accuracy."""
        parts = []
        if "eval/loss" in metrics:
            parts.append(f"loss {_loss(metrics['eval/loss'])}")
        if "eval/perplexity" in metrics:
            parts.append(f"perplexity {float(metrics['eval/perplexity']):,.2f}")
        if "eval/bits_per_byte" in metrics:
            parts.append(f"bits/byte {float(metrics['eval/bits_per_byte']):.4f}")
        for name, value in metrics.items():  # "accuracy", "pair_accuracy", "replaced_token_accuracy", …
            if name.startswith("eval/") and name.endswith("accuracy"):
                parts.append(f"{name.removeprefix('eval/').replace('_', ' ')} {percent(float(value))}")
        self._permanent("  ".join([f"eval {self._position(step)}", *parts]), _MARK, "eval")

    def checkpoint(self, step: int, seconds: float) -> None:
        """A permanent line: saved, and for how long training waited."""
        self._permanent(f"save {self._position(step)}  checkpoint, training waited {duration(seconds)}", _MARK, "save")

    def say(self, text: str) -> None:
        """A permanent line (or several)."""
        self._permanent(text)

    def warn(self, text: str) -> None:
        """A permanent line that begins with "warning:"."""
        self._permanent(f"warning: {text}", _WARN, "warning:")

    @contextmanager
    def working(self, text: str) -> Iterator[Working]:
        """Says that something long is going on, and at its end how long it took.

        On a terminal a spinner with the time so far, which leaves a permanent line; elsewhere the line "text … done in 6.1 s", its end
        written when it ends.
        """
        work = Working(text, self._clock)
        self._working.append(work)
        plain = self._rich is None
        if plain:
            self._end_line()
            self._write(f"{text} …")
            self._mid_line = True
        elif self._live is None:
            self._start_live()
        outcome = "failed after"
        try:
            yield work
            outcome = "done in"
        finally:
            work.seconds = work.elapsed
            self._working.remove(work)
            ending = f"{outcome} {duration(work.seconds)}"
            if not plain:
                if not self._working and self._first is None:
                    self._stop_live(keep=False)  # nothing to show until the first step
                self._permanent(f"{text} … {ending}")
            elif self._mid_line:
                self._mid_line = False
                self._write(f" {ending}\n")
                self._log_line(f"{text} … {ending}")
            else:  # something else was said meanwhile
                self._permanent(f"{text} … {ending}")

    def close(self) -> None:
        """Leaves the live line as it last was, gives the cursor back and closes the log."""
        atexit.unregister(self.close)
        self._stop_live(keep=self._first is not None)
        self._end_line()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Text -------------------------------------------------------------------------------------------------------------

    def _position(self, step: int) -> str:
        return f"{step:>{len(str(self._total))}}/{self._total}"

    def _fields(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(name, "label value") of what is known, in the order in which they are shown."""
        fields = []
        if "train/loss" in metrics:
            fields.append(("loss", f"loss {_loss(metrics['train/loss'])}"))
        if "train/learning_rate" in metrics:
            fields.append(("lr", f"lr {float(metrics['train/learning_rate']):.2e}"))
        if "train/tokens_per_second" in metrics:
            fields.append(("speed", f"{count(float(metrics['train/tokens_per_second']), '')} tok/s"))
        if metrics.get("train/mfu") is not None:
            fields.append(("mfu", f"MFU {percent(float(metrics['train/mfu']))}"))
        return fields

    def _left(self, step: int) -> str:
        """Time left by the mean pace since the first step of this session, evaluations and saves included."""
        if self._first is None or step <= self._first[0] or step >= self._total:
            return ""
        pace = (self._stepped - self._first[1]) / (step - self._first[0])
        seconds = round(pace * (self._total - step) - (self._clock() - self._stepped))
        return f"{duration(seconds) if seconds >= 10 else f'{max(1, seconds)} s'} left"

    def _plain_step(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = [f"step {self._position(step)}", *(text for _, text in self._fields(metrics)), self._left(step)]
        return "  ".join(part for part in parts if part)

    # The terminal -----------------------------------------------------------------------------------------------------

    def _start_live(self) -> None:
        assert self._rich is not None
        self._live = Live(console=self._rich, get_renderable=self._render, refresh_per_second=_REFRESH_PER_SECOND)
        self._live.start()

    def _stop_live(self, keep: bool) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.transient = not keep
            live.stop()

    def _render(self) -> Text:
        """The live line, never wider than the terminal: what is least missed is left out first."""
        assert self._rich is not None
        width = max(20, self._rich.width - 1)
        if self._working:
            work = self._working[-1]
            frame = _SPINNER[int(work.elapsed * 10) % len(_SPINNER)] if _is_utf8(self._stream) else "*"
            line = Text.assemble((f"{frame} ", _BAR))
            line.append(f"{work.text} … {duration(work.elapsed)}")
            line.append(f"  {work.detail}" if work.detail else "", style=_LABEL)
            line.truncate(width, overflow="ellipsis")
            return line
        if self._first is None:
            return Text("")
        fields = dict(self._fields(self._metrics))
        if left := self._left(self._step):
            fields["left"] = left
        counter = f"{self._position(self._step)}"
        for name in ("mfu", "lr", "speed", "left", "loss"):
            if sum(len(text) + 2 for text in fields.values()) + len(counter) + 12 <= width:
                break
            fields.pop(name, None)
        tail = "".join(f"  {text}" for text in fields.values())
        line = self._bar(min(40, width - len(counter) - len(tail) - 1))
        line.append(f" {counter}", style="bold")
        line.append(tail)
        line.truncate(width)
        return line

    def _bar(self, width: int) -> Text:
        full, half, rest = ("━", "╸", "─") if _is_utf8(self._stream) else ("#", "#", "-")
        halves = int(2 * width * min(1.0, self._step / self._total)) if width > 0 else 0
        done = full * (halves // 2) + half * (halves % 2)
        return Text.assemble((done, _BAR), (rest * (width - len(done)), _TRACK))

    # Writing ----------------------------------------------------------------------------------------------------------

    def _permanent(self, text: str, style: str = "", styled: str = "") -> None:
        """A line that stays; its first word `styled` in colour on a terminal."""
        if self._rich is None:
            self._emit(text, shown=True)
            return
        line = Text(text)
        if styled:
            line.stylize(style, 0, len(styled))
        try:
            self._rich.print(line, soft_wrap=True)
        except (OSError, ValueError):  # the terminal is gone; the log is not
            self._live = self._rich = self._stream = None
        self._log_line(text)

    def _emit(self, text: str, *, shown: bool) -> None:
        if shown:
            self._end_line()
            self._write(text + "\n")
        self._log_line(text)

    def _end_line(self) -> None:
        if self._mid_line:
            self._mid_line = False
            self._write("\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        if not _is_utf8(self._stream):
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            text = text.replace("…", "...").encode(encoding, errors="replace").decode(encoding)
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # `| head` closed the pipe: training goes on, log.txt has the rest
            self._stream = None

    def _log_line(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as error:  # a full disk does not end the training; say so once
            self._log = None
            self.warn(f"log.txt cannot be written any more: {error.strerror}")


def _loss(value: Any) -> str:
    return f"{float(value):.4f}"


def _is_utf8(stream: IO[str] | None) -> bool:
    # A StringIO has no encoding and takes everything.
    encoding = getattr(stream, "encoding", None)
    return encoding is None or encoding.lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig")
