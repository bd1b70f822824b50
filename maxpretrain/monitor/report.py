"""report.html: one self-contained page about a run, or several compared, made from the run directories alone."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxpretrain import __version__
from maxpretrain.errors import StorageError, UserError
from maxpretrain.monitor.comparison import comparison
from maxpretrain.monitor.fields import config_cards, environment_cards
from maxpretrain.monitor.page import RUN_COLORS, draw, escape, header, page, section, unbroken
from maxpretrain.monitor.plots import Chart, Line
from maxpretrain.monitor.record import Record, smooth
from maxpretrain.monitor.units import count, duration, percent, significant, three_decimals, three_digits
from maxpretrain.monitor.verdict import notes, verdict

_LOG_LINES = 400
_RECENT = 4  # evaluations whose samples have a line of their own
_CONFIG_HINT = '<p class="hint"><mark>Marked</mark> fields differ from the defaults.</p>'
_PARTS = {
    "train": "training",
    "compile": "compiling",
    "prepare": "preparing data",
    "data_wait": "waiting for data",
    "evaluate": "evaluating",
    "save": "saving",
    "other": "everything else",
    "unrecorded": "not recorded",
}
# Metrics that have a chart of their own, or are no curve.
_KNOWN = (
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/tokens_per_second",
    "train/tokens_per_second_per_device",
)
_KNOWN += (
    "train/mfu",
    "train/mfu_full",
    "train/step_seconds",
    "train/data_wait_seconds",
    "eval/loss",
    "eval/perplexity",
    "eval/bits_per_byte",
)


def write_report(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Writes the report of a run, or a comparison of several.

    Args:
        run_dirs: run directories, finished or not.
        out: the file to write; None: report.html in the run directory, comparison.html beside the first of several.

    Returns:
        The file written. It replaces an older one at once, never half.

    Raises:
        UserError: no run there, or the file cannot be written.
        StorageError: the disk is full.
    """
    if not run_dirs:
        raise UserError("a report needs at least one run directory")
    runs = [Record.read(directory) for directory in run_dirs]
    single = len(runs) == 1
    if out is None:
        out = runs[0].directory / "report.html" if single else runs[0].directory.resolve().parent / "comparison.html"
    out = Path(out)
    text = page(runs[0].name, _single(runs[0])) if single else page("comparison of runs", comparison(runs))
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        if isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            raise UserError(f"cannot write {out}: {error.strerror}; give another file, or make it writable") from error
        raise StorageError(
            f"cannot write {out}: {error.strerror}; make room and run `maxpretrain report` again"
        ) from error
    return out


def _single(run: Record) -> str:
    return "\n".join(
        (
            header(run.name, run.status, verdict(run), notes(run)),
            "<main>" + _tiles(run),
            section("Curves", _charts(run), _steps_hint(run)),
            section("Where the time went", _ledger(run.ledger)),
            section("Samples", _samples(run)),
            section("Config", config_cards(run.config), _CONFIG_HINT),
            section("Environment", environment_cards(run.environment)),
            section("Log", _log(run.log)) + "</main>",
            f"<footer>{escape(run.directory.resolve().name)} · written by maxpretrain {escape(__version__)}</footer>",
        )
    )


# Numbers --------------------------------------------------------------------------------------------------------------


def _tiles(run: Record) -> str:
    tiles: list[tuple[str, str, str]] = []
    loss, bits = run.last("eval/loss"), run.last("eval/bits_per_byte")
    train = run.smoothed_last("train/loss")
    if math.isfinite(loss):
        tiles.append(
            (
                "Validation loss",
                f"{loss:.3f}",
                run.loss_unit + (f"; training {train:.3f}" if math.isfinite(train) else ""),
            )
        )
    elif math.isfinite(train):
        tiles.append(("Training loss", f"{train:.3f}", f"{run.loss_unit}, smoothed"))
    if math.isfinite(bits):
        baselines = ", ".join(f"{name} {value:.2f}" for name, value in run.baselines.items())
        tiles.append(("Bits per byte", f"{bits:.3f}", f"baselines: {baselines}" if baselines else "validation"))
    if math.isfinite(perplexity := run.last("eval/perplexity")):
        tiles.append(("Perplexity", significant(perplexity), "validation, per token"))
    if math.isfinite(accuracy := run.last("eval/accuracy")):
        tiles.append(("Accuracy", percent(accuracy), "validation, of predicted tokens"))
    if math.isfinite(run.parameters):
        model = run.config.get("model")
        shape = (
            f"{model['num_layers']} layers of width {model['model_dim']}"
            if isinstance(model, dict) and {"num_layers", "model_dim"} <= set(model)
            else ""
        )
        tiles.append(("Parameters", count(run.parameters), shape))
    if run.metrics:
        per_step = f" × {count(run.tokens_per_step)} tokens" if math.isfinite(run.tokens_per_step) else ""
        of = f"{run.step:,} steps" if run.step >= run.total_steps else f"{run.step:,} of {run.total_steps:,} steps"
        tiles.append(("Tokens", count(run.tokens), of + per_step))
    if math.isfinite(run.wall):
        sessions = f"{len(run.sessions)} sessions" if len(run.sessions) > 1 else ""
        tiles.append(
            (
                "Wall time",
                duration(run.wall),
                ", ".join(part for part in (f"on {run.devices}" if run.devices else "", sessions) if part),
            )
        )
    if math.isfinite(speed := run.median("train/tokens_per_second")):
        mfu, full = run.median("train/mfu"), run.median("train/mfu_full")
        aside = f"MFU {percent(mfu)}" if math.isfinite(mfu) else ""
        aside += f" (full {percent(full)})" if aside and math.isfinite(full) else ""
        tiles.append(("Tokens per second", count(speed), aside))
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd{" class=small" if len(value) > 16 else ""}>{escape(value)}</dd><p>{unbroken(escape(aside))}</p></div>'
        for name, value, aside in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _steps_hint(run: Record) -> str:
    each = f" of {count(run.tokens_per_step)} tokens" if math.isfinite(run.tokens_per_step) else ""
    return f'<p class="hint">Over optimizer steps{each}. Bold lines are smoothed, what was logged is behind them.</p>'


# Charts ---------------------------------------------------------------------------------------------------------------


def _curve(
    run: Record, key: str, label: str, color: str, *, smoothed: bool = False, markers: bool = False
) -> list[Line]:
    """A metric as a curve; smoothed: over a faint one of what was logged. Nothing where nothing finite was logged."""
    x, y = run.finite(key)
    if not len(x):
        return []
    if not smoothed or len(x) < 16:
        return [Line(label, x, y, color, markers=markers)]
    return [Line(label, x, y, color, faint=True), Line(label, *smooth(x, y), color)]


def _charts(run: Record) -> str:
    ratio, levels = run.nats_per_bit_per_byte, list(run.baselines.items())
    gaps = int(np.sum(~np.isfinite(run.series("train/loss")[1])))
    charts = [
        Chart(
            "Loss",
            _curve(run, "train/loss", "training", "train", smoothed=True)
            + _curve(run, "eval/loss", "validation", "validation", markers=True),
            run.loss_unit,
            [(name, value * ratio) for name, value in levels if math.isfinite(ratio)],
            three_decimals,
            note=f"{gaps:,} non-finite values are left out." if gaps else "",
        ),
        Chart(
            "Bits per byte",
            _curve(run, "eval/bits_per_byte", "validation", "validation", markers=True),
            "",
            levels,
            three_decimals,
        ),
        Chart("Learning rate", _curve(run, "train/learning_rate", "last", "train"), format=three_digits, zero=True),
        Chart(
            "Gradient norm",
            _curve(run, "train/grad_norm", "global norm", "train", smoothed=True),
            "before clipping",
            zero=True,
        ),
        Chart(
            "Throughput",
            _curve(run, "train/tokens_per_second", "all devices", "train", smoothed=True),
            "tokens per second",
            (),
            count,
            zero=True,
        ),
        Chart(
            "MFU",
            _curve(run, "train/mfu", "causal", "train", smoothed=True)
            + _curve(run, "train/mfu_full", "full attention", "third", smoothed=True),
            "model FLOPs utilization",
            format=percent,
            zero=True,
        ),
    ]
    rest: dict[str, list[Line]] = {}
    for key in run.names():
        group, _, name = key.partition("/")
        if key not in _KNOWN and group in ("train", "eval"):
            rest.setdefault(name, []).extend(
                _curve(run, key, "training", "train", smoothed=True)
                if group == "train"
                else _curve(run, key, "validation", "validation", markers=True)
            )
    charts += [
        Chart(
            name.replace("_", " ").replace("/", " · ").capitalize(),
            lines,
            format=percent if "accuracy" in name else significant,
        )
        for name, lines in rest.items()
    ]
    return draw(dataclasses.replace(chart, steps=run.step) for chart in charts)


# Time, samples, log ---------------------------------------------------------------------------------------------------


def _ledger(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    if total <= 0:
        return ""
    order = [part for part in _PARTS if part in parts] + [part for part in parts if part not in _PARTS]
    colors = {
        part: f"var(--run-{i % RUN_COLORS})"
        for i, part in enumerate(part for part in order if part not in ("other", "unrecorded"))
    }
    colors |= {"other": "var(--axis)", "unrecorded": "var(--level)"}
    names = {part: _PARTS.get(part, part.replace("_", " ")) for part in order}
    bar = "".join(
        f'<span style="--key:{colors[part]};flex:{parts[part] / total:.5f} 0 0" title="{escape(names[part])}: {duration(parts[part])}"></span>'
        for part in order
        if parts[part] > 0
    )
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch" style="--key:{colors[part]}"></span>{escape(names[part])}</th>'
        f'<td class="number">{duration(parts[part])}</td><td class="number">{percent(parts[part] / total)}</td></tr>'
        for part in order
    )
    return (
        f'<div class="card ledger"><div class="bar" aria-hidden="true">{bar}</div><table><tbody>{rows}</tbody><tfoot><tr><th scope="row">wall time</th>'
        f'<td class="number">{duration(total)}</td><td class="number">{percent(1.0)}</td></tr></tfoot></table></div>'
    )


def _samples(run: Record) -> str:
    losses = dict(zip(*(list(values) for values in run.finite("eval/loss")), strict=True))
    blocks: list[str] = []
    for i, (step, samples) in enumerate(run.samples):
        texts = ""
        for prompt, text in samples:
            rest = text.removeprefix(prompt)  # some write the prompt into the text
            texts += f'<p class="sample"><span class="prompt">{escape(prompt)}</span>{escape(rest)}</p>'
        loss = f'<span class="aside">validation loss {losses[step]:.3f}</span>' if step in losses else ""
        blocks.append(
            f'<details{" open" if i == 0 else ""}><summary>Step {step:,}{loss}</summary><div class="inside">{texts}</div></details>'
        )
    recent, older = blocks[:_RECENT], blocks[_RECENT:]
    if older:
        what = f"{len(older):,} earlier evaluation{'s' if len(older) > 1 else ''}"
        recent.append(f'<details><summary>{what}</summary><div class="inside nested">{"".join(older)}</div></details>')
    return "".join(recent)


def _log(lines: list[str]) -> str:
    if not lines:
        return ""
    shown = lines[-_LOG_LINES:]
    what = f"{len(lines):,} lines" if len(shown) == len(lines) else f"the last {len(shown):,} of {len(lines):,} lines"
    text = "\n".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in shown)
    return f'<details><summary>log.txt<span class="aside">{what}</span></summary><div class="inside"><pre class="log">{escape(text)}</pre></div></details>'
