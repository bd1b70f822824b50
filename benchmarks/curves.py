"""Small multiples of the training and validation loss of runs: the picture in RESULTS.md.

python benchmarks/curves.py docs/objectives.png RUN [RUN ...]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 4


def series(run: Path, key: str) -> tuple[list[int], list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]
    return [step for step, _ in found], [value for _, value in found]


def main(out: str, runs: list[str]) -> None:
    rows = math.ceil(len(runs) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 2.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, run in zip(axes.flat, map(Path, runs), strict=False):
        axis.plot(*series(run, "train/loss"), color="#9db7d5", linewidth=1)
        axis.plot(*series(run, "eval/loss"), color="#c2410c", marker="o", markersize=3, linewidth=1)
        axis.set_title(run.name, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("loss, nats (thin: training; dots: validation)", fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
