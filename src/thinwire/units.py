"""Numbers for people: bytes, counts, ratios, times."""

from __future__ import annotations

import math
from collections.abc import Sequence


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < (999.5 if unit == "B" else 999.95):  # what rounds to 1000 belongs to the next unit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: float) -> str:
    """A count for people: 26.9 k, 134.5 M."""
    for unit in ("", " k", " M"):
        if count < 999.95:
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f} G"


def share(part: float, whole: float) -> str:
    """part/whole where a part is most often far smaller: 1/8,231, 1/3.9, 1/1, 2.0/1."""
    if not part or not whole:
        return "-"
    times = whole / part
    if times < 0.95:
        return f"{1 / times:,.1f}/1"
    return f"1/{times:,.0f}" if times < 1.05 or times >= 9.95 else f"1/{times:.1f}"


def span(seconds: float) -> str:
    """A time for people: 0.4 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def bars(values: Sequence[float]) -> str:
    """A curve for people, a block a value: the lowest is the shortest; a value that is no number leaves a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / 7 or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / step)] if math.isfinite(value) else " " for value in values)
