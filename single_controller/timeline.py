"""`python -m single_controller.timeline trace.json [--png out.png]`: a trace summed up, and drawn.

It reads the file alone, whoever recorded it, and needs matplotlib only to draw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MethodTimes", "Timeline", "UserTimes", "main"]

_PARTS = (
    "dispatch", "queue", "deserialise", "prepare", "run", "serialise", "wait", "collect",
)  # fmt: skip
_COLOURS = dict(
    zip(
        (*_PARTS, "user"),
        (
            "#4c78a8", "#d8d8d8", "#f2a65a", "#b8b8d1", "#54a24b", "#e4795b", "#bfd3e6", "#2f4b7c",
            "#9ad08f",
        ),
        strict=True,
    )
)  # fmt: skip
_OF_ROLES = (
    "#54a24b", "#e45756", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d", "#ff9da6", "#8c6d31",
)  # fmt: skip


@dataclass(frozen=True)
class MethodTimes:
    """One method: its calls, the mean ms of each part (over ranks, too), and MB that moved.

    `slowest` is the process in which it ran longest, on average.
    """

    title: str
    calls: int
    ms: dict[str, float]
    slowest: str
    out_mb: float
    in_mb: float


@dataclass(frozen=True)
class UserTimes:
    """A span of the user's: how often it ran, in ms on average and in all."""

    name: str
    times: int
    mean_ms: float
    total_ms: float


@dataclass(frozen=True)
class Timeline:
    """A trace file's contents. Times of events are µs since the first."""

    events: tuple[dict[str, Any], ...]
    processes: dict[int, str]
    missing: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> Timeline:
        """Read a file that `single_controller.trace` wrote.

        Raises:
            OSError: it cannot be read. ValueError: it is no trace.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            events = content["traceEvents"]
            names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
            spans = tuple(e for e in events if e["ph"] == "X")
            return cls(spans, names, tuple(content["otherData"]["missing"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no trace that single_controller.trace has written: "
                f"{type(error).__name__}: {error}"
            ) from None

    def methods(self) -> list[MethodTimes]:
        """Each role's methods, those with the most time in workers first."""
        titles = {
            e["args"]["call"]: e["name"] for e in self.events if e["cat"] in ("dispatch", "run")
        }
        of_method: dict[str, list[dict[str, Any]]] = {}
        for event in self.events:
            title = titles.get(event["args"].get("call"))
            if title is not None:
                of_method.setdefault(title, []).append(event)
        found = [self._method(title, events) for title, events in of_method.items()]
        return sorted(found, key=lambda m: -m.calls * m.ms.get("run", 0))

    def _method(self, title: str, events: Sequence[dict[str, Any]]) -> MethodTimes:
        durations: dict[str, dict[tuple[int, int], float]] = {}
        for event in events:
            of_part = durations.setdefault(event["cat"], {})
            where = event["args"]["call"], event["pid"]
            of_part[where] = of_part.get(where, 0) + event["dur"] / 1e3
        ms = {
            part: statistics.mean(durations[part].values()) for part in _PARTS if part in durations
        }
        runs: dict[int, list[float]] = {}
        for event in events:
            if event["cat"] == "run":
                runs.setdefault(event["pid"], []).append(event["dur"])
        slowest = max(runs, key=lambda pid: statistics.mean(runs[pid]), default=None)
        moved = [
            sum(e["args"].get(way, 0) for e in events) / 1e6 for way in ("bytes_out", "bytes_in")
        ]
        calls = len({e["args"]["call"] for e in events})
        name = "" if slowest is None else self.processes[slowest].partition(" on ")[0]
        return MethodTimes(title, calls, ms, name, moved[0], moved[1])

    def user_spans(self) -> list[UserTimes]:
        """The spans that programs named, the longest in all first."""
        of_name: dict[str, list[float]] = {}
        for event in self.events:
            if event["cat"] == "user":
                of_name.setdefault(event["name"], []).append(event["dur"] / 1e3)
        found = [UserTimes(n, len(d), statistics.mean(d), sum(d)) for n, d in of_name.items()]
        return sorted(found, key=lambda u: -u.total_ms)

    def __str__(self) -> str:
        methods, spans = self.methods(), self.user_spans()
        rows: list[Sequence[str]] = [
            ("method", "calls", *(f"{part} ms" for part in _PARTS), "out MB", "in MB", "slowest")
        ]
        for m in methods:
            parts = [f"{m.ms[part]:.2f}" if part in m.ms else "-" for part in _PARTS]
            moved = f"{m.out_mb:.2f}", f"{m.in_mb:.2f}"
            rows.append((m.title, str(m.calls), *parts, *moved, m.slowest))
        lines = list(_columns(rows))
        if spans:
            rows = [("span", "times", "mean ms", "total ms")]
            rows += [(u.name, str(u.times), f"{u.mean_ms:.2f}", f"{u.total_ms:.2f}") for u in spans]
            lines += ["", *_columns(rows)]
        lines += [f"missing: {what}" for what in self.missing]
        return "\n".join(lines)

    def _colours(self) -> dict[str, str]:
        """Of each kind of span, its colour; what runs has one of its role."""
        roles = sorted({_kind(event) for event in self.events if event["cat"] == "run"})
        parts = {part: colour for part, colour in _COLOURS.items() if part != "run"}
        return {**parts, **dict(zip(roles, itertools.cycle(_OF_ROLES), strict=False))}

    def draw(self, path: str | Path) -> None:
        """Draw the processes, one below the other, over time.

        Raises:
            ImportError: matplotlib is not installed. ValueError: there is nothing to draw.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("drawing a trace needs matplotlib: pip install matplotlib") from None
        if not self.events:
            raise ValueError("the trace holds no spans to draw")
        lanes = sorted({(e["pid"], e["tid"]) for e in self.events})
        figure = Figure(figsize=(12, 1.2 + 0.32 * len(lanes)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for kind, colour in self._colours().items():
            bars = [e for e in self.events if _kind(e) == kind]
            for event in bars:
                height = 0.4 if kind == "user" else 0.8
                row = lanes.index((event["pid"], event["tid"]))
                span = event["ts"] / 1e3, max(event["dur"] / 1e3, 1e-3)
                axes.broken_barh([span], (row - height / 2, height), fc=colour, ec="white", lw=0.3)
            if bars:
                axes.plot([], [], color=colour, linewidth=6, label=kind)
        firsts = [row for row, lane in enumerate(lanes) if lane[0] != lanes[row - 1][0] or not row]
        axes.set_yticks(firsts, [self.processes[lanes[row][0]] for row in firsts], fontsize=8)
        for row in firsts:
            axes.axhline(row - 0.5, color="#888888", linewidth=0.5)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_xlabel("ms")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=9, fontsize=8, frameon=False
        )
        figure.savefig(path, dpi=150)


def _kind(event: dict[str, Any]) -> str:
    """What a span is drawn as: its part of a call, and whose it is where a role runs."""
    part: str = event["cat"]
    return f"run {event['name'].rpartition('.')[0]}" if part == "run" else part


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (cell for cell in row)
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        yield "  ".join(cells).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a trace's summary, and draw it where asked; 1 if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m single_controller.timeline", description=__doc__
    )
    parser.add_argument("trace", type=Path, metavar="TRACE.json")
    parser.add_argument("--png", type=Path, metavar="OUT.png", help="draw it, too")
    options = parser.parse_args(arguments)
    try:
        timeline = Timeline.read(options.trace)
        sys.stdout.write(f"{timeline}\n")
        if options.png is not None:
            timeline.draw(options.png)
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
