"""Numbers for people: durations, counts and losses as the console and the report write them."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """0.05 s, 6.1 s, 45 s, 2 min 31 s, 3 h 12 min, 4 d 3 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def count(number: float, space: str = " ") -> str:
    """512, 1.2 k, 12.3 M, 124 M, 1.5 B, 15 T."""
    if not math.isfinite(number):
        return str(number)
    if abs(number) < 999.5:
        return f"{number:.0f}" if number == int(number) or abs(number) >= 99.95 else f"{number:.1f}"
    for size, suffix in ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        value = number / size
        if abs(value) < 999.5 or suffix == "T":
            digits = 0 if abs(value) >= 99.95 or abs(value - round(value)) < 0.005 else 1
            return f"{value:.{digits}f}{space}{suffix}"
    raise AssertionError("unreachable")


def percent(share: float, digits: int = 1) -> str:
    """0.314 -> 31.4 %."""
    return f"{100 * share:.{digits}f} %"


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, in powers of ten only where it must: 3.412, 0.0001, 2.5e-07."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = f"{value:.{digits}g}"
    if "e" in text and 1 <= abs(value) < 1e9:
        text = f"{float(text):.0f}"
    return text


def three_decimals(value: float) -> str:
    """A loss, or bits per byte: 2.310, 1.898."""
    return f"{value:.3f}" if math.isfinite(value) else significant(value)


def three_digits(value: float) -> str:
    """A learning rate: 0.000913, 6e-05."""
    return significant(value, 3)
