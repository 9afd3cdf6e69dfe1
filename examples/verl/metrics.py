"""Two runs' metrics beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["compare"]

_TIMES = ("timing", "perf/", "time")  # metrics that no two runs have in common


def compare(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, float]]:
    """For each metric of each step that is no time: its name and how far the two are apart.

    A metric that only one has, and text that differs, are infinitely far apart.

    Raises:
        ValueError: one run has more steps.
    """
    for step, (a, b) in enumerate(zip(left, right, strict=True)):
        for name in sorted({*a, *b}):
            if any(word in name for word in _TIMES):
                continue
            x, y = a.get(name), b.get(name)
            numbers = isinstance(x, int | float) and isinstance(y, int | float)
            gap = abs(x - y) if numbers else math.nan
            same = x == y or (numbers and math.isnan(x) and math.isnan(y))
            yield f"{step}: {name}", 0.0 if same else math.inf if math.isnan(gap) else gap
