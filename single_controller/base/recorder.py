"""What calls cost, noted in one place: named spans of time and counts of bytes, per method.

Whoever sends and collects calls notes; while a trace is on, `spans` gets the same.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from single_controller.base.spans import now_ns, recording
from single_controller.base.table import Printed, aligned

__all__ = ["CallRecord", "MethodStats", "Recorder", "StatsTable"]


_FEW = 16


class Recorder:
    """Sums up what is noted about the calls of one group."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, dict[str, float]] = {}
        self._awaited: list[tuple[str, str, Callable[[], int | None]]] = []
        self._most = _FEW  # as many may be awaited before those that are known are let go

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process a group begins to count anew."""
        return Recorder, ()

    def call(self, role: str, method: str) -> CallRecord:
        """Note that a method is called; the record takes what it costs."""
        self.add(method, "calls", 1)
        return CallRecord(self, role, method)

    def add(self, method: str, name: str, amount: float) -> None:
        with self._lock:
            totals = self._totals.setdefault(method, {})
            totals[name] = totals.get(name, 0) + amount

    def add_later(self, method: str, name: str, amount: Callable[[], int | None]) -> None:
        """Note an amount that is known once `amount` returns one.

        It is asked when read, and before: what it holds may be a task and its arguments. But only
        where twice as many wait as then did, or each would be asked over and over.
        """
        with self._lock:
            self._awaited.append((method, name, amount))
            full = len(self._awaited) > self._most
        if full:
            self._settle()

    def _settle(self) -> None:
        with self._lock:
            awaited, self._awaited = self._awaited, []
        for method, name, amount in awaited:
            known = amount()
            if known is None:
                with self._lock:
                    self._awaited.append((method, name, amount))
            else:
                self.add(method, name, known)
        with self._lock:
            self._most = 2 * len(self._awaited) + _FEW

    def stats(self) -> StatsTable:
        """The sums so far, by method."""
        self._settle()
        names = {field.name for field in fields(MethodStats)}
        with self._lock:
            rows = [
                MethodStats(method, **{k: v for k, v in totals.items() if k in names})  # type: ignore[arg-type]
                for method, totals in self._totals.items()
            ]
        return StatsTable(tuple(rows))


class CallRecord:
    """Takes what one call costs: `with record.span("wait"): …`, `record.count("bytes_out", n)`."""

    __slots__ = ("method", "number", "recorder", "role")

    def __init__(self, recorder: Recorder, role: str, method: str) -> None:
        self.recorder, self.role, self.method = recorder, role, method
        self.number = next(_numbers) if recording() is not None else 0  # of a traced call

    def span(self, name: str) -> _Timer:
        return _Timer(self, name)

    def count(self, name: str, amount: int) -> None:
        self.recorder.add(self.method, name, amount)
        if self.number:
            at = now_ns()
            self.note(name, "bytes", at, at, {"bytes": amount})

    def note(
        self, name: str, category: str, start: int, end: int, details: Mapping[str, Any] | None
    ) -> None:
        """Let the trace, if it is still on, have a span of this call."""
        if (buffer := recording()) is not None:
            buffer.add(name, category, start, end, self.number, details)

    def count_later(self, name: str, amount: Callable[[], int | None]) -> None:
        self.recorder.add_later(self.method, name, amount)


class _Timer:
    __slots__ = ("name", "record", "start")

    def __init__(self, record: CallRecord, name: str) -> None:
        self.record, self.name = record, name

    def __enter__(self) -> None:
        self.start = now_ns()

    def __exit__(self, *_: Any) -> None:
        end, record = now_ns(), self.record
        record.recorder.add(record.method, f"{self.name}_s", (end - self.start) / 1e9)
        if record.number:
            record.note(f"{record.role}.{record.method}", self.name, self.start, end, None)


_numbers = itertools.count(1)


@dataclass(frozen=True)
class MethodStats:
    """What the calls of one method cost, seen from the driver.

    Bytes are those of pickled values and their buffers: `bytes_out` left the driver as arguments
    (large ones once, however many ranks read them), `bytes_in` came to it as results,
    `bytes_between` were published by workers for others to read. What stays in a process counts
    nowhere.
    """

    method: str
    calls: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    bytes_between: int = 0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    collect_s: float = 0.0


@dataclass(frozen=True)
class StatsTable(Printed):
    """One row per method that was called; prints as a table."""

    rows: tuple[MethodStats, ...]

    def __getitem__(self, method: str) -> MethodStats:
        return next((row for row in self.rows if row.method == method), MethodStats(method))

    def __iter__(self) -> Iterator[MethodStats]:
        return iter(self.rows)

    @property
    def driver_bytes(self) -> int:
        """Bytes that left the driver or came to it."""
        return sum(row.bytes_out + row.bytes_in for row in self.rows)

    @property
    def moved_bytes(self) -> int:
        """These, and bytes that went from worker to worker."""
        return self.driver_bytes + sum(row.bytes_between for row in self.rows)

    def __str__(self) -> str:
        names = [field.name for field in fields(MethodStats)]
        cells = [names, *([_cell(getattr(row, name)) for name in names] for row in self.rows)]
        return aligned(cells)


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else value
