"""A curve as text."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"


def draw(values: Sequence[float], *, height: int, labels: tuple[str, str], below: tuple[str, str]) -> str:
    """Columns of block characters, eight levels a row, from zero to the largest value.

    Args:
        values: finite and at least 0, one a column.
        height: rows.
        labels: beside the top and the bottom row.
        below: under the first and the last column.

    Returns:
        `height` + 2 lines: the columns, an axis, and what is below it.
    """
    top = max(values) or 1.0
    # A value above zero shows: an eighth of a row at least.
    eighths = [max(round(8 * height * value / top), 1 if value > 0 else 0) for value in values]
    margin = max(map(len, labels))
    lines = []
    for row in range(height - 1, -1, -1):
        label = labels[0] if row == height - 1 else labels[1] if row == 0 else ""
        columns = "".join(_BLOCKS[min(max(level - 8 * row, 0), 8)] for level in eighths)
        lines.append(f"{label:>{margin}} │{columns}".rstrip())
    lines.append(" " * margin + " └" + "─" * len(values))
    gap = max(len(values) - len(below[0]) - len(below[1]), 1)
    lines.append(" " * (margin + 2) + below[0] + " " * gap + below[1])
    return "\n".join(lines)
