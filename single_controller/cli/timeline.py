"""`timeline TRACE.json`: a trace summed up, from the file alone, whoever recorded it."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from single_controller.base.explain import aligned

__all__ = ["summed_up", "timeline"]

_PARTS = ("dispatch", "queue", "deserialise", "prepare", "run", "serialise", "wait", "collect")
_HEAD = ("method", "calls", *(f"{part} ms" for part in _PARTS), "out MB", "in MB", "slowest")


def timeline(file: str) -> int:
    """Print a trace's summary."""
    sys.stdout.write(f"{summed_up(file)}\n")
    return 0


def summed_up(path: str | Path) -> str:
    """Of each method its calls, the mean ms of each part (over ranks, too), the MB that moved and
    the process in which it ran longest on average; of each span of the user's its mean and total;
    what is missing, and which clock was furthest from the driver's.

    Raises:
        OSError: the file cannot be read. ValueError: it is no trace.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        events = [event for event in content["traceEvents"] if "part" in event]
        named = [e for e in content["traceEvents"] if e["name"] == "process_name"]
        notes = [f"missing: {what}" for what in content["otherData"]["missing"]]
        clocks = content["otherData"]["clocks_ahead_ms"]
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no trace of single_controller.trace: {why}") from None
    processes = {e["pid"]: e["args"]["name"].partition(" on ")[0] for e in named}
    titles = {e["args"]["call"]: e["name"] for e in events if e["part"] == "call"}
    methods, spans = defaultdict(list), defaultdict(list)
    for event in events:
        if event["part"] == "user":
            spans[event["name"]].append(event["dur"] / 1e3)
        elif event["part"] != "call":
            methods[titles[event["args"]["call"]]].append(event)
    heaviest = sorted(methods.items(), key=lambda item: -sum(_ran(item[1])))
    lines = [aligned([_HEAD, *(_row(title, found, processes) for title, found in heaviest)])]
    if spans:
        rows: list[Sequence[object]] = [("span", "times", "mean ms", "total ms")]
        for name, took in sorted(spans.items(), key=lambda item: -sum(item[1])):
            rows.append((name, len(took), f"{statistics.mean(took):.2f}", f"{sum(took):.2f}"))
        lines += ["", aligned(rows)]
    far = max(clocks, key=lambda name: abs(clocks[name]), default="")
    if clocks.get(far):
        notes.append(f"the clock of {far} was {clocks[far]:+.3f} ms ahead: set right")
    return "\n".join([*lines, *notes])


def _row(title: str, events: Sequence[Any], processes: dict[int, str]) -> tuple[object, ...]:
    took: dict[str, dict[Any, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        took[event["part"]][event["args"]["call"], event["pid"]] += event["dur"] / 1e3
    parts = [f"{statistics.mean(took[p].values()):.2f}" if p in took else "-" for p in _PARTS]
    moved = [sum(e["args"].get(f"bytes_{way}", 0) for e in events) / 1e6 for way in ("out", "in")]
    means = {pid: statistics.mean(_ran(events, pid)) for _, pid in took["run"]}
    slowest = processes[max(means, key=lambda pid: means[pid])] if means else ""
    calls = len({event["args"]["call"] for event in events})
    return title, calls, *parts, *(f"{mb:.2f}" for mb in moved), slowest


def _ran(events: Sequence[Any], pid: int | None = None) -> list[float]:
    return [e["dur"] for e in events if e["part"] == "run" and pid in (None, e["pid"])]
