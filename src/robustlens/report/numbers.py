"""How numbers are written: percentages for fractions, few digits, and nothing that pretends to be finite."""

from __future__ import annotations

import math


def number(value: float | None, unit: str = "") -> str:
    """``value`` as a reader wants it: ``0.932`` of unit "fraction" is ``93.2 %``; ``12345.6`` is ``1.235e+04``."""
    if value is None:
        return "—"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if unit == "fraction":
        return f"{_minus(_percent(value))} %"
    text = _minus(_digits(value))
    return f"{text} {unit}" if unit else text


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """``[91.8, 94.4]``; empty if there is none."""
    if low is None or high is None:
        return ""
    ends = (number(end, "fraction" if unit == "fraction" else "").removesuffix(" %") for end in (low, high))
    return f"[{', '.join(ends)}]"


def _percent(value: float) -> str:
    share = 100 * value
    if 0 < abs(share) < 0.05 or 99.95 <= share < 100:
        return f"{share:.3g}" if abs(share) < 1 else f"{share:.2f}"
    return f"{share:.1f}"


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value)}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2e}"


def _minus(text: str) -> str:
    return "−" + text[1:] if text.startswith("-") else text


def seconds(value: float) -> str:
    """A duration in words: ``41 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if not math.isfinite(value):
        return number(value)
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
