"""What can go wrong through no fault of the program: one sentence each, and the exit status it ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The command line, the config or the input is wrong, and nothing was touched. The message says what, where and the way out."""

    exit_status = 2


class DoesNotFit(UserError):
    """The plan needs more memory than the device has."""

    exit_status = 3


class StorageError(UserError):
    """The disk is full, or no usable checkpoint is there where one was demanded."""

    exit_status = 4


class Diverged(UserError):
    """Loss or gradients stayed non-finite."""

    exit_status = 5


class Stopped(UserError):
    """A signal asked the run to stop; the state was saved."""

    exit_status = 75


def nearest(word: str, choices: Iterable[str]) -> str:
    """A `; did you mean "..."?` for the choice nearest to `word`, or the list of choices where none is near."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not close:  # a nested name typed alone: `peak_lr` for `optimizer.peak_lr`
        close = [c for c in choices if c.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    if close:
        return f'; did you mean "{close[0]}"?'
    shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return f"; there is: {shown}" if choices else ""
