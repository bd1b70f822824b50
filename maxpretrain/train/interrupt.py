"""SIGINT and SIGTERM ask the loop to stop after the step it is in; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context manager; `requested` turns true at the first signal. Does nothing off the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever called us there handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._say(b"\nsecond signal: ended without saving\n")
            os._exit(1)
        self.requested = True
        self._say(b"\nstopping after this step, then saving; once more to end at once\n")

    @staticmethod
    def _say(text: bytes) -> None:
        # Nobody may be listening: Ctrl-C in `train | tee log` ends tee first, and a notebook's stderr has no descriptor. An
        # exception from here would end the loop without saving.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), text)
