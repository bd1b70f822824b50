"""The page that reports are made of: frame, head, sections, tables, charts."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from maxpretrain.monitor import plots
from maxpretrain.monitor.plots import Chart

STATES = {"done": "good", "stopped": "warn", "unfinished": "warn", "diverged": "bad", "failed": "bad"}
RUN_COLORS = 6  # --run-0 … in report.css; beyond, the same again, dashed


def escape(value: Any) -> str:
    """Text as HTML: escaped, and control characters (a model may emit any) shown as the replacement character."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", html.escape(str(value)))


def unbroken(text: str) -> str:
    """Numbers stay on a line with their units."""
    return re.sub(r"(?<=\d) (?=(?:%|[kMBT]|s|min|h|d)(?!\w))", "\u00a0", text)


def page(title: str, body: str) -> str:
    css, js = (
        (resources.files("maxpretrain.monitor") / name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    # Only this script may run, and nothing may be fetched, whatever a model wrote into its samples.
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · maxpretrain</title>\n<style>\n{css}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{js}</script>\n</body>\n</html>\n"
    )


def header(title: str, state: str, sentence: str, remarks: Iterable[str]) -> str:
    badge = (
        f'<span class="badge" style="--state:var(--{STATES.get(state, "warn")})">{escape(state)}</span>'
        if state
        else ""
    )
    items = "".join(f"<li>{unbroken(escape(remark))}</li>" for remark in remarks)
    return (
        '<header><div class="top"><span class="brand">maxpretrain</span><button id="theme" type="button" hidden>Dark</button></div>'
        f'<h1>{escape(title)}{badge}</h1><p class="verdict">{unbroken(escape(sentence))}</p>'
        + (f'<ul class="notes">{items}</ul>' if items else "")
        + "</header>"
    )


def section(title: str, content: str, hint: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{hint}{content}</section>" if content else ""


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    titles = "".join(
        f'<th scope="col"{" class=number" if i else ""}>{escape(title)}</th>' for i, title in enumerate(head)
    )
    return (
        f'<div class="card scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def draw(charts: Iterable[Chart]) -> str:
    drawn = [plots.figure(chart, f"c{i}", wide=i == 0) for i, chart in enumerate(charts) if not chart.empty]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
