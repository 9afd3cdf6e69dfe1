"""Where the time goes and what calls cost: `span` names a part of a time, `trace` records the spans
of all processes, and each group sums up its calls. How spans come here is left to the backends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from single_controller.base.explain import Printed, aligned

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CallMark",
    "CallRecord",
    "Event",
    "MethodStats",
    "Recorder",
    "StatsTable",
    "harvest",
    "left",
    "mark",
    "note",
    "now_ns",
    "running",
    "span",
    "trace",
]

_OFF = contextlib.nullcontext()
_MOST = 200_000  # events that a process keeps

now_ns = time.time_ns  # the clock that processes of several machines share, more or less


class CallMark(NamedTuple):
    """What a traced call carries to its ranks."""

    number: int
    sent_ns: int


class Event(NamedTuple):
    """A `part` of call number `call`, which `name`s its method; or with the part "user" a span of
    the user's, which may be in no call: 0.
    """

    part: str
    name: str
    start_ns: int
    end_ns: int
    call: int = 0
    details: Mapping[str, Any] | None = None


_buffer: deque[Event] | None = None  # of this process, while a trace is on
# The number of the traced call that runs here: user code stands between it and its spans, and hands
# nothing on.
_here: ContextVar[int] = ContextVar("_here", default=0)


def note(event: Event) -> None:
    """Note an event of this process, if a trace is on; the oldest one goes where it is full."""
    if (buffer := _buffer) is not None:
        buffer.append(event)


def harvest() -> tuple[int, Sequence[Event]]:
    """The time of this process, and what it noted; it notes no more until the next traced call."""
    global _buffer
    buffer, _buffer = _buffer, None
    return now_ns(), tuple(buffer or ())


def span(name: str, **details: Any) -> AbstractContextManager[None]:
    """Name a part of a worker's or of the driver's time, for traces; without one it does nothing::

        with span("forward", tokens=tokens):
            ...

    Args:
        details: what a viewer shows beside the name; what is no JSON is shown as text.
    """
    return _OFF if _buffer is None else _span(name, details)


@contextmanager
def _span(name: str, details: Mapping[str, Any]) -> Generator[None]:
    start = now_ns()
    try:
        yield
    finally:
        note(Event("user", name, start, now_ns(), _here.get(), details))


@contextmanager
def running(mark: CallMark | None, title: str, read_ns: tuple[int, int]) -> Generator[None]:
    """Note, of a traced call, that it waited, was read (from, to) and runs within this context."""
    global _buffer
    if mark is None:
        yield
        return
    if _buffer is None:
        _buffer = deque(maxlen=_MOST)
    (read, ready), began, number = read_ns, now_ns(), mark.number
    note(Event("queue", title, mark.sent_ns, read, number))  # from the caller's clock to this one
    note(Event("deserialise", title, read, ready, number))
    note(Event("prepare", title, ready, began, number))  # its turn on the device
    token = _here.set(number)
    try:
        yield
    finally:
        _here.reset(token)
        note(Event("run", title, began, now_ns(), number))


class trace:  # noqa: N801 — used as a function, as contextlib's are
    """Record what driver and workers do within this context, and write it to a file.

    Perfetto (ui.perfetto.dev) and chrome://tracing open it;
    `python -m single_controller timeline trace.json` sums it up. Times are by the driver's clock: a
    process whose own is another is set right, and the file says by how much. Each process keeps the
    last 200,000 spans, until the context or the worker's group ends. The file names those that were
    full, and those that are missing: a worker that dies takes its spans with it.

    Args:
        path: of the file, JSON.

    Raises:
        ValueError: a trace is being recorded already.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.content: dict[str, Any] = {}
        self._hosts: dict[int, Any] = {}
        self._found: dict[str, list[Event]] = {f"driver, pid {os.getpid()}": []}
        self._clocks: dict[str, float] = {}
        self._missing: list[str] = []

    def __enter__(self) -> Self:
        global _buffer, _current
        if _current is not None:
            raise ValueError(f"a trace is being recorded already, to {_current.path}")
        self.path.touch()
        _buffer, _current = deque(maxlen=_MOST), self
        return self

    def _take(self, hosts: Any) -> None:
        if self._hosts.pop(id(hosts), None) is not None:
            asked = now_ns()
            found, missing = hosts.harvest()
            answered = now_ns()
            self._missing += missing
            for name, (told, events) in found.items():
                ahead = 0 if asked <= told <= answered else _ahead(events)
                self._clocks[name] = ahead / 1e6
                by_driver = [_moved(event, ahead) for event in events]
                self._found.setdefault(name, []).extend(by_driver)

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self._found[f"driver, pid {os.getpid()}"] += harvest()[1]
        for hosts in list(self._hosts.values()):
            self._take(hosts)
        self.content = {
            "traceEvents": list(_chrome_events(self._found)),
            "displayTimeUnit": "ms",
            "otherData": {
                "missing": self._missing,
                "full": [name for name, noted in self._found.items() if len(noted) >= _MOST],
                "clocks_ahead_ms": self._clocks,
            },
        }
        self.path.write_text(json.dumps(self.content, default=str), encoding="utf-8")


_current: trace | None = None
_numbers = itertools.count(1)  # of traced calls


def mark(call: int, hosts: Any) -> CallMark | None:
    """What call number `call` carries to these hosts.

    The trace will ask them for their spans: `hosts.harvest()` is to give by each process's name its
    time and those, and for each that does not answer what is missing, in words.
    """
    if not call or (trace := _current) is None:
        return None
    trace._hosts.setdefault(id(hosts), hosts)
    return CallMark(call, now_ns())


def left(hosts: Any) -> None:
    """Ask hosts for their spans now, because they are about to end."""
    if (trace := _current) is not None:
        trace._take(hosts)


def _ahead(events: Sequence[Event]) -> int:
    """How many ns a process's clock is ahead, if its quickest call was read when it was sent."""
    queued = (event.end_ns - event.start_ns for event in events if event.part == "queue")
    return min(queued, default=0)


def _moved(event: Event, ahead: int) -> Event:
    """An event by the driver's clock, by which a call is sent."""
    start, end = event.start_ns, event.end_ns - ahead
    start -= ahead if event.part != "queue" else 0
    return event._replace(start_ns=min(start, end), end_ns=end)


def _chrome_events(processes: Mapping[str, Sequence[Event]]) -> Iterator[dict[str, Any]]:
    """The events in Chrome's format, in µs since the first: for each process a row per call, in it
    the call's parts, and in those the user's spans. Rows are asynchronous slices, which viewers
    put side by side where they overlap.
    """
    every = [event for noted in processes.values() for event in noted]
    zero = min((event.start_ns for event in every), default=0)
    titles = {event.call: event.name for event in every if event.part != "user" and event.name}
    for pid, (name, noted) in enumerate(processes.items()):
        process = {"ph": "M", "pid": pid}
        yield {**process, "name": "process_name", "args": {"name": name}}
        yield {**process, "name": "process_sort_index", "args": {"sort_index": pid}}
        rows = defaultdict[int, list[Event]](list)
        for event in noted:
            rows[event.call].append(event)
        for call, events in rows.items():
            if call:
                start, end = min(e.start_ns for e in events), max(e.end_ns for e in events)
                events.insert(0, Event("call", titles.get(call, "call"), start, end, call))
            yield from _nested(f"{pid}.{call}", pid, events, zero)


def _nested(row: str, pid: int, events: list[Event], zero: int) -> Iterator[dict[str, Any]]:
    """Where each event of a row begins and ends, in an order in which they nest. One that would
    not, such as a span of another thread, has a row of its own. Viewers ignore "part" and "dur", by
    which others read the file.
    """
    inside: list[tuple[int, dict[str, Any]]] = []  # when they end, and what says so
    for number, event in enumerate(sorted(events, key=lambda e: (e.start_ns, -e.end_ns))):
        while inside and inside[-1][0] <= event.start_ns:
            yield inside.pop()[1]
        end_ns = max(event.start_ns, event.end_ns)  # a clock may be set back
        apart = bool(inside) and inside[-1][0] < end_ns
        name = event.name if event.part in ("user", "call") else event.part
        own = f"{row}.{number}" if apart else row
        at = {"cat": "span", "id": own, "pid": pid, "tid": 0, "name": name}
        args = {**(event.details or {}), **({"call": event.call} if event.call else {})}
        begins, took = (event.start_ns - zero) / 1_000, (end_ns - event.start_ns) / 1_000
        yield {**at, "ph": "b", "ts": begins, "dur": took, "part": event.part, "args": args}
        end = {**at, "ph": "e", "ts": (end_ns - zero) / 1_000}
        if apart:
            yield end
        else:
            inside.append((end_ns, end))
    while inside:
        yield inside.pop()[1]


@dataclass(frozen=True)
class MethodStats:
    """What the calls of one method cost, seen from the driver.

    Bytes are those of pickled values and their buffers: `bytes_out` left the driver as arguments
    (large ones once, however many ranks read them), `bytes_in` came to it as results,
    `bytes_between` were published by workers for others to read, counted when the worker says so:
    the driver may have the reader's result a moment before. What stays in a process counts nowhere.
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
        return {row.method: row for row in self.rows}.get(method, MethodStats(method))

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
        def cell(value: Any) -> str:
            style = {int: ",", float: ".3f"}.get(type(value), "")
            return format(value, style).replace(",", " ")

        rows = ([cell(value) for value in astuple(row)] for row in self.rows)
        return aligned([[*MethodStats.__annotations__], *rows])


class Recorder:
    """Sums up what is noted about the calls of one group."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, dict[str, Any]] = {}

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

    def stats(self) -> StatsTable:
        """The sums so far, by method."""
        with self._lock:
            return StatsTable(tuple(MethodStats(m, **sums) for m, sums in self._totals.items()))


class CallRecord:
    """Takes what one call costs: `with record.span("wait"): …`, `record.count("bytes_out", n)`.

    `number` is that of a traced call, else 0.
    """

    def __init__(self, recorder: Recorder, role: str, method: str) -> None:
        self._recorder, self._role, self._method = recorder, role, method
        self.number = next(_numbers) if _current else 0
        self._counted: dict[str, int] = {}

    @contextmanager
    def span(self, part: str) -> Generator[None]:
        """Note the time that this context takes, and for the trace what is counted in it."""
        start, began = now_ns(), time.perf_counter()
        try:
            yield
        finally:
            self._recorder.add(self._method, f"{part}_s", time.perf_counter() - began)
            if self.number:
                counted, self._counted = self._counted, {}
                title = f"{self._role}.{self._method}"
                note(Event(part, title, start, now_ns(), self.number, counted))

    def count(self, name: str, amount: int) -> None:
        self._recorder.add(self._method, name, amount)
        if self.number:
            self._counted[name] = self._counted.get(name, 0) + amount
