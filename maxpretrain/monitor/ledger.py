"""Where the wall time went: parts that add up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Ledger:
    """Wall time by part. A part inside a part is taken from the outer one, so that the parts never overlap.

        ledger = Ledger()
        with ledger("evaluate"):
            ...
            with ledger("data_wait"):  # not counted under "evaluate"
                ...
        ledger.seconds()  # {"evaluate": 1.9, "data_wait": 0.2, "other": 0.1}: adds up to the time since Ledger()

    For one thread: the one that runs the training loop. Entering and leaving a part costs about a microsecond.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = self._mark = clock()
        self._parts: dict[str, float] = {}
        self._stack: list[str] = []

    def _charge(self) -> None:
        """Gives the time since the last charge to the innermost open part; outside every part it stays unassigned."""
        now = self._clock()
        if self._stack:
            self._parts[self._stack[-1]] += now - self._mark
        self._mark = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time inside the `with` block under `part`.

        Raises:
            ValueError: `part` is "other", the name of what no part claims.
        """
        if part == "other":
            raise ValueError('"other" is the time that no part claims; give the part another name')
        self._charge()
        self._parts.setdefault(part, 0.0)
        self._stack.append(part)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by part, in order of first use, then "other"; their sum is the wall time since the ledger was made."""
        self._charge()
        parts = dict(self._parts)
        parts["other"] = max(0.0, self._mark - self._start - sum(parts.values()))
        return parts
