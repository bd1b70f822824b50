"""Charts as inline SVG, drawn by matplotlib and then made part of the page: colours become CSS variables, so that one drawing
serves light and dark; text stays text, in the page's font; nothing points outside the document."""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maxpretrain.monitor.units import count, percent, significant

# Points of a curve that are drawn, and that the pointer can read.
_DRAWN, _READ = 500, 120
_FONT = 11.0


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x, y: float64 [n], finite.
        color: the name of a CSS variable, without its dashes.
        faint: a background curve: thin, pale, neither in the legend nor read by the pointer.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: str
    faint: bool = False
    markers: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: a title, curves over steps, and horizontal lines (label, value)."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    levels: Sequence[tuple[str, float]] = ()
    format: Callable[[float], str] = field(default=significant)
    zero: bool = False  # the axis begins at 0
    steps: float = 0.0  # the horizontal axis reaches at least so far, so that charts of a page line up
    note: str = ""

    @property
    def empty(self) -> bool:
        return not any(len(line.x) for line in self.lines)


def thin(x: np.ndarray, y: np.ndarray, points: int, extremes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` points of a curve: every so manieth, or with `extremes` the least and greatest of each stretch (so that no
    spike is lost). The last point always stays."""
    if len(x) <= points:
        return x, y
    if not extremes:
        index = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
        return x[index], y[index]
    edges = np.linspace(0, len(x), points // 2 + 1).round().astype(int)
    index = {len(x) - 1}
    for low, high in itertools.pairwise(edges):
        index |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
    kept = np.array(sorted(index))
    return x[kept], y[kept]


def _limits(chart: Chart) -> tuple[float, float]:
    """The vertical range: everything but rare spikes of the faint curves."""
    clear = [line.y for line in chart.lines if len(line.y) and not line.faint]
    values = np.concatenate(clear or [line.y for line in chart.lines if len(line.y)])
    low, high = float(values.min()), float(values.max())
    # A run that blew up: the chart shows what came before, the curve leaves it at the top.
    start, usual = max(float(line[0]) for line in (clear or [values])), float(np.percentile(values, 95))
    high = min(high, 1.5 * max(start, usual, low)) if high > 0 else high
    for faint in (line.y for line in chart.lines if line.faint and len(line.y)):
        low, high = (
            min(low, float(np.percentile(faint, 1))),
            max(high, min(float(np.percentile(faint, 99)), high * 1.5)),
        )
    for _, level in chart.levels:
        low, high = min(low, level), max(high, level)
    if chart.zero:
        low = min(low, 0.0)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    room = (
        0.1 * (high - low) if any(level > high - pad for _, level in chart.levels) else 0.0
    )  # for the label above the line
    return (low if chart.zero and low == 0 else low - pad), high + pad + room


class _Colors:
    """Stand-ins that matplotlib understands for CSS variables that it does not."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def __call__(self, name: str) -> str:
        if name not in self._names:
            self._names.append(name)
        return f"#0badf{self._names.index(name):x}"

    def resolve(self, style: str) -> str:
        return re.sub(r"#0badf([0-9a-f])", lambda match: f"var(--{self._names[int(match[1], 16)]})", style)


def _ticks(form: Callable[[float], str], step: float) -> Callable[[float, int], str]:
    """Labels of an axis with ticks `step` apart: all with as many digits as the step needs."""
    if form is percent:
        return lambda value, _: percent(value, max(0, -math.floor(math.log10(step * 100) + 1e-9)))
    if form is count:
        return lambda value, _: count(value)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    # 0.25 apart needs two digits, though its logarithm says one.
    digits += any(abs(round(step * n, digits) - step * n) > 1e-9 * step for n in (1, 2, 3))
    return lambda value, _: significant(value, 3) if digits > 4 else f"{value:,.{digits if value else 0}f}"


def _draw(chart: Chart, width: float, height: float, colors: _Colors) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((46 / width, 26 / height, 1 - 56 / width, 1 - 36 / height))
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors("axis"))
    axes.grid(axis="y", color=colors("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelsize=_FONT, labelcolor=colors("muted"))
    axes.xaxis.set_major_locator(MaxNLocator(7 if width > 600 else 4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6 if height >= 300 else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    for line in sorted(chart.lines, key=lambda line: not line.faint):
        x, y = thin(line.x, line.y, _DRAWN, extremes=line.faint)
        single = len(x) == 1
        axes.plot(
            x,
            y,
            color=colors(line.color),
            linewidth=0.9 if line.faint else 1.8,
            alpha=0.45 if line.faint else 1.0,
            linestyle=(0, (5, 2.5)) if line.dashed else "-",
            marker="o" if single or (line.markers and len(x) <= 60) else None,
            markersize=5 if single else 4,
            markeredgewidth=0,
            solid_joinstyle="round",
        )
    low, high = _limits(chart)
    axes.set_ylim(low, high)
    ticks = axes.get_yticks()
    axes.yaxis.set_major_formatter(
        FuncFormatter(_ticks(chart.format, float(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0))
    )
    last = max([chart.steps, *(float(line.x.max()) for line in chart.lines if len(line.x))])
    axes.set_xlim(0.0, last * 1.01 or 1.0)
    for label, level in chart.levels:
        axes.axhline(level, color=colors("level"), linewidth=1.1, linestyle=(0, (2, 2.5)))
        axes.annotate(
            label,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=_FONT,
            color=colors("level-text"),
        )
    return figure, axes


def _round(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _clean(svg: str, prefix: str, label: str, colors: _Colors) -> str:
    """The drawing without what belongs to a file of its own: metadata, links, global styles, ids that nothing uses."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            name = child.tag.rpartition("}")[2]
            # matplotlib's style element would apply to the whole page.
            if name in ("metadata", "style") or (name == "defs" and all(c.tag.endswith("style") for c in child)):
                parent.remove(child)
    text = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            name = name.rpartition("}")[2]
            if name == "id":
                if value not in used:
                    continue
                value = f"{prefix}-{value}"
            elif name == "href":
                value = f"#{prefix}-{value[1:]}"
            elif name == "clip-path":
                value = value.replace("url(#", f"url(#{prefix}-")
            elif name == "style":
                value = (
                    colors.resolve(re.sub(r"font(-size|-family)?: [^;]*(;\s*|$)", "", value))
                    .replace("; ", ";")
                    .replace(": ", ":")
                )
                if not value:
                    continue
            elif name in ("d", "x", "y", "transform", "width", "height"):
                value = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", _round, value)
                value = re.sub(r"\s*\n\s*", "", value) if name == "d" else value
            element.set(name, value)
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    # matplotlib writes sizes in points.
    root.attrib.pop("version", None)
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _reader(chart: Chart, axes: Any, width: float, height: float) -> str:
    """What the page's script needs to show the values under the pointer, as JSON."""
    box = axes.get_position()
    series = []
    for line in chart.lines:
        if line.faint or not len(line.x):
            continue
        x, y = thin(line.x, line.y, _READ)
        series.append(
            {"label": line.label, "color": line.color, "x": [int(v) for v in x], "y": [float(f"{v:.4g}") for v in y]}
        )
    data = {
        "box": [round(v, 1) for v in (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)],
        "x": [float(v) for v in axes.get_xlim()],
        "y": [float(v) for v in axes.get_ylim()],
        "series": series,
    }
    return json.dumps(data, separators=(",", ":"))


def describe(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    parts = []
    for line in chart.lines:
        if not line.faint and len(line.y):
            span = f"from {chart.format(line.y[0])} at step {int(line.x[0])} to {chart.format(line.y[-1])} at step {int(line.x[-1])}"
            parts.append(
                f"{line.label} {span}"
                if len(line.y) > 1
                else f"{line.label} {chart.format(line.y[0])} at step {int(line.x[0])}"
            )
    parts += [f"{label} at {chart.format(level)}" for label, level in chart.levels]
    return f"{chart.title}: " + "; ".join(parts)


def svg(chart: Chart, identity: str, width: float, height: float) -> tuple[str, str]:
    """The drawing and the JSON for the pointer.

    Args:
        identity: unique in the page.
        width, height: of the drawing, in its own units; on the page it stretches.
    """
    colors = _Colors()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": identity, "path.simplify": True, "font.family": "DejaVu Sans"}
    ):
        figure, axes = _draw(chart, width, height, colors)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _clean(buffer.getvalue(), identity, describe(chart), colors), _reader(chart, axes, width, height)


def figure(chart: Chart, identity: str, *, wide: bool = False) -> str:
    """The chart as an HTML figure, with title, legend and drawing; a wide one has a second drawing for narrow screens."""
    sizes = (("wide", 960, 340), ("narrow", 440, 300)) if wide else (("", 440, 200),)
    drawings = []
    for kind, width, height in sizes:
        drawing, reader = svg(chart, f"{identity}{kind[:1]}", width, height)
        drawings.append(f'<div class="plot {kind}" data-reader="{html.escape(reader)}">{drawing}</div>')
    legend = "".join(
        f'<li><span class="key{" dashed" if line.dashed else ""}" style="--key:var(--{line.color})"></span>{html.escape(line.label)}'
        f" <b>{html.escape(chart.format(line.y[-1]))}</b></li>"
        for line in chart.lines
        if not line.faint and len(line.y)
    )
    unit = f' <span class="unit">{html.escape(chart.unit)}</span>' if chart.unit else ""
    note = f'<p class="note">{html.escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart{" full" if wide else ""}"><figcaption><h3>{html.escape(chart.title)}{unit}</h3>'
        f'<ul class="legend">{legend}</ul></figcaption>{"".join(drawings)}{note}</figure>'
    )
