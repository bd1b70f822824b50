"""What a run came to, in a sentence, by rules; and what about it deserves a second look."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from maxpretrain.monitor.record import Record, smooth
from maxpretrain.monitor.units import count, duration, percent

Trend = Literal["improving", "plateau", "overfitting", "rising", "unknown"]

# Relative change of the validation loss that counts as one.
_PLATEAU, _RISE = 0.005, 0.01
_FEW_EVALUATIONS = 4
# Share of the training time spent waiting for data, and of the wall time spent compiling, worth a word.
_DATA_WAIT, _COMPILE = 0.05, 0.3


def trend(run: Record) -> Trend:
    """Where the validation loss was heading at the end.

    * overfitting: it ended 1 % or more above its best, and training loss fell meanwhile; rising: training loss did not fall.
    * improving: over the last quarter of the steps it fell by 0.5 % or more; plateau: by less.
    * unknown: fewer than four evaluations.
    """
    steps, values = run.finite("eval/loss")
    if len(values) < _FEW_EVALUATIONS:
        return "unknown"
    best = int(np.argmin(values))
    if values[-1] > values[best] * (1 + _RISE):
        train_steps, train = run.finite("train/loss")
        if len(train) < 2:
            return "rising"
        then, now = np.interp([steps[best], steps[-1]], *smooth(train_steps, train))
        return "overfitting" if now < then * (1 - _PLATEAU) else "rising"
    quarter = np.interp(steps[-1] - 0.25 * (steps[-1] - steps[0]), steps, values)
    return "improving" if values[-1] < quarter * (1 - _PLATEAU) else "plateau"


def verdict(run: Record) -> str:
    """One sentence: how much was trained, how it ended, how good it is, where it was heading."""
    if not run.metrics:
        return (
            f"{_ending(run)}; no step has been logged yet."
            if run.events
            else "Not trained yet: nothing has been logged."
        )
    return "; ".join(part for part in (_beginning(run), _quality(run), _heading(run)) if part) + "."


def _beginning(run: Record) -> str:
    amount: list[str] = []
    if math.isfinite(run.parameters):
        amount.append(f"{count(run.parameters)} parameters")
    if math.isfinite(run.tokens):
        amount.append(f"on {count(run.tokens)} tokens")
    if math.isfinite(run.wall):
        amount.append(f"in {duration(run.wall)}")
    trained = " ".join(amount)
    if run.status == "done":
        return f"Trained {trained}".rstrip()
    return f"{_ending(run)}: trained {trained}" if trained else _ending(run)


def _ending(run: Record) -> str:
    word = {"done": "Done", "stopped": "Stopped", "diverged": "Diverged", "failed": "Failed"}.get(
        run.status, "Unfinished,"
    )
    return f"{word} at step {run.step:,} of {run.total_steps:,}"


def _quality(run: Record) -> str:
    loss, bits = run.last("eval/loss"), run.last("eval/bits_per_byte")
    if not math.isfinite(loss):
        train = run.smoothed_last("train/loss")
        return f"training loss {train:.2f}, never evaluated" if math.isfinite(train) else "no finite loss was logged"
    text = f"{'last ' if run.status in ('diverged', 'failed') else ''}validation loss {loss:.2f}"
    if math.isfinite(bits):
        text += f" ({bits:.2f} bits per byte)"
        name = next((name for name in ("bigram", "unigram") if name in run.baselines), None)
        if name is not None:
            below = round(100 * (1 - bits / run.baselines[name]))
            relation = f"{below} % below" if below > 0 else f"{-below} % above" if below < 0 else "level with"
            text += f", {relation} the {name} baseline"
    return text


def _heading(run: Record) -> str:
    steps, values = run.finite("eval/loss")
    direction = trend(run)
    if direction in ("overfitting", "rising"):
        best = int(np.argmin(values))
        rose = f"the validation loss rose from its best, {values[best]:.2f} at step {int(steps[best]):,}, to {values[-1]:.2f} at the end"
        return f"overfitting: {rose}, while the training loss fell" if direction == "overfitting" else rose
    if direction == "unknown" or run.status == "diverged":
        return ""
    end = "at the end" if run.status == "done" else "when last evaluated"
    return f"still improving {end}" if direction == "improving" else f"no longer improving {end}"


def notes(run: Record) -> list[str]:
    """Sentences about what deserves a second look, the gravest first."""
    found = []
    _, losses = run.series("train/loss")
    bad = int(np.sum(~np.isfinite(losses)))
    if run.status == "diverged":
        found.append(
            "The run diverged: loss or gradients stayed non-finite. A lower optimizer.peak_lr or a longer warmup is the usual cure."
        )
    elif bad:
        found.append(f"The training loss was not finite at {bad:,} of {len(losses):,} logged steps.")
    if run.status == "failed":
        found.append("The run failed; the end of the log, below, says why.")
    bits = run.last("eval/bits_per_byte")
    for name in ("unigram", "bigram"):
        if math.isfinite(bits) and bits >= run.baselines.get(name, math.inf):
            found.append(f"It does not beat the {name} baseline of {run.baselines[name]:.2f} bits per byte.")
            break
    if run.data_wait > _DATA_WAIT:
        found.append(
            f"The device waited for data {percent(run.data_wait, 0)} of the training time; raise data.prefetch, or give it more cores."
        )
    compiling = run.ledger.get("compile", 0.0) / run.wall if run.wall > 0 else 0.0
    if compiling > _COMPILE and run.wall > 60:
        found.append(f"Compiling took {percent(compiling, 0)} of the wall time; a longer run dilutes it.")
    optimizer = run.config.get("optimizer")
    clip = optimizer.get("clip_norm") if isinstance(optimizer, dict) else None
    norms = run.finite("train/grad_norm")[1]
    if isinstance(clip, (int, float)) and len(norms) >= 10:
        share = float(np.mean(norms[len(norms) // 2 :] > clip))
        if share > 0.5:
            found.append(
                f"In the second half gradients were clipped to norm {clip:g} at {percent(share, 0)} of the logged steps."
            )
    if len(run.sessions) > 1:
        times = "once" if len(run.sessions) == 2 else f"{len(run.sessions) - 1} times"
        found.append(f"The run was resumed {times}; times below are of all sessions together.")
    return found


def compare(runs: list[Record], names: list[str]) -> str:
    """One sentence: which run (by `names`) ends lowest, and by how much. In bits per byte where all have it: losses per token of different
    tokenizers do not compare."""
    for key, what in (
        ("eval/bits_per_byte", "bits per byte"),
        ("eval/loss", "validation loss"),
        ("train/loss", "training loss"),
    ):
        finals = {index: run.last(key) for index, run in enumerate(runs)}
        if all(math.isfinite(value) for value in finals.values()):
            order = sorted(finals, key=finals.__getitem__)
            first, second = order[0], order[1]
            text = f"{names[first]} ends lowest: {what} {finals[first]:.3f}"
            gap = 1 - finals[first] / finals[second] if finals[second] > 0 else 0.0
            return f"{text}, {percent(gap)} below {names[second]}."
    return f"{len(runs)} runs that share no final metric."
