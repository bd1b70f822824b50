"""Several runs against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from maxpretrain import __version__
from maxpretrain.monitor.fields import flatten, show
from maxpretrain.monitor.page import RUN_COLORS, STATES, draw, escape, header, section, table
from maxpretrain.monitor.plots import Chart, Line
from maxpretrain.monitor.record import Record, smooth
from maxpretrain.monitor.units import count, duration, percent, three_decimals, three_digits
from maxpretrain.monitor.verdict import compare


def _labels(runs: Sequence[Record]) -> list[str]:
    """A different name for each run: its own, with its folder or a number where that is not enough."""
    labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{run.name} ({run.directory.resolve().name})" for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{label} {i + 1}" for i, label in enumerate(labels)]
    return labels


def comparison(runs: list[Record]) -> str:
    """The page's body: which ends lowest, final numbers, curves on top of each other, config fields that differ."""
    labels = _labels(runs)

    def curves(key: str, smoothed: bool = False, markers: bool = False) -> list[Line]:
        lines = []
        for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
            x, y = run.finite(key)
            if len(x):
                color = f"run-{i % RUN_COLORS}"
                x, y = smooth(x, y) if smoothed else (x, y)
                lines.append(Line(label, x, y, color, markers=markers, dashed=i >= RUN_COLORS))
        return lines

    drawn = [
        Chart("Validation loss", curves("eval/loss", markers=True), "nats per token", (), three_decimals),
        Chart("Bits per byte", curves("eval/bits_per_byte", markers=True), "validation", (), three_decimals),
        Chart("Training loss", curves("train/loss", smoothed=True), "nats per token, smoothed", (), three_decimals),
        Chart("Learning rate", curves("train/learning_rate"), format=three_digits, zero=True),
        Chart("Gradient norm", curves("train/grad_norm", smoothed=True), "smoothed", zero=True),
        Chart(
            "Throughput",
            curves("train/tokens_per_second", smoothed=True),
            "tokens per second, smoothed",
            (),
            count,
            zero=True,
        ),
        Chart("MFU", curves("train/mfu", smoothed=True), "causal, smoothed", (), percent, zero=True),
    ]
    configs = [flatten(run.config) for run in runs]
    tokenizers = {json.dumps(run.config.get("tokenizer"), sort_keys=True) for run in runs}
    remarks = []
    if len(tokenizers) > 1:
        remarks.append("The runs have different tokenizers: compare bits per byte, not losses per token.")
    return "\n".join(
        (
            header(" · ".join(labels), "", compare(runs, labels), remarks),
            "<main>" + section("Final numbers", _finals(runs, labels)),
            section("Curves", draw(drawn)),
            section("Config fields that differ", _differences(configs, labels)) + "</main>",
            f"<footer>{len(runs)} runs · written by maxpretrain {escape(__version__)}</footer>",
        )
    )


def _finals(runs: list[Record], labels: list[str]) -> str:
    columns: list[tuple[str, list[float], Any, Any]] = [
        ("validation loss", [run.last("eval/loss") for run in runs], three_decimals, min),
        ("bits per byte", [run.last("eval/bits_per_byte") for run in runs], three_decimals, min),
        ("parameters", [run.parameters for run in runs], count, None),
        ("tokens", [run.tokens for run in runs], count, None),
        ("wall time", [run.wall for run in runs], duration, None),
        ("tokens/s", [run.median("train/tokens_per_second") for run in runs], count, max),
        ("MFU", [run.median("train/mfu") for run in runs], percent, max),
    ]
    columns = [column for column in columns if any(math.isfinite(value) for value in column[1])]
    rows = []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        cells = f'<th scope="row"><span class="swatch" style="--key:var(--run-{i % RUN_COLORS})"></span>{escape(label)}</th>'
        cells += f'<td class="number"><span class="badge" style="--state:var(--{STATES.get(run.status, "warn")})">{escape(run.status)}</span></td>'
        for _, values, form, best in columns:
            known = [value for value in values if math.isfinite(value)]
            mark = " best" if best is not None and len(known) > 1 and values[i] == best(known) else ""
            cells += f'<td class="number{mark}">{escape(form(values[i])) if math.isfinite(values[i]) else "–"}</td>'
        rows.append(f"<tr>{cells}</tr>")
    return table(["run", "status", *(title for title, *_ in columns)], rows)


def _differences(configs: list[dict[str, Any]], labels: list[str]) -> str:
    missing = object()
    rows = []
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [config.get(name, missing) for config in configs]
        if name not in ("name", "root") and any(value != values[0] for value in values):
            cells = "".join(
                f'<td class="number">{"–" if value is missing else escape(show(value))}</td>' for value in values
            )
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        table(["field", *labels], rows)
        if rows
        else '<p class="hint" style="margin:0">None: the runs have the same config.</p>'
    )
