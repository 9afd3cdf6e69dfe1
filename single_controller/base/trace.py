"""Where the time goes and what calls cost: `span` names a part of a time, `trace` records the spans
of all processes, and each group sums up its calls. How spans come here is left to the backends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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
_logger = logging.getLogger(__name__)

now_ns = time.time_ns  # the clock that processes of several machines share, more or less


class CallMark(NamedTuple):
    """What a traced call carries to its ranks. `capacity`: the spans that each process keeps."""

    number: int
    sent_ns: int
    capacity: int


class Event(NamedTuple):
    """A `part` of call number `call`, which `name`s its method; or with the part "user" a span of
    the user's. `flow`: the thread or task that it ran in, 0 where that is the call's own.
    """

    part: str
    name: str
    start_ns: int
    end_ns: int
    call: int = 0
    details: Mapping[str, Any] | None = None
    flow: int = 0


_buffer: deque[Event] | None = None  # of this process, while a trace is on
# The buffer, the number and the flow of the traced call that runs here: user code stands between
# the call and its spans, and hands nothing on.
_here: ContextVar[tuple[deque[Event], int, int] | None] = ContextVar("_here", default=None)


def note(event: Event) -> None:
    """Note an event of this process, if a trace is on; the oldest one goes where it is full."""
    if (buffer := _buffer) is not None:
        buffer.append(event)


def harvest() -> tuple[int, Sequence[Event]]:
    """The time of this process, and what it noted; it notes no more until the next traced call."""
    global _buffer
    buffer, _buffer = _buffer, None
    return now_ns(), tuple(buffer or ())


def _flow() -> int:
    """The task or else the thread that runs here: within one, spans nest."""
    with contextlib.suppress(RuntimeError):
        if (task := asyncio.current_task()) is not None:
            return id(task)
    return threading.get_ident()


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
        buffer, call, own = _here.get() or (_buffer, 0, 0)
        if buffer is not None:
            flow = _flow()
            flow = 0 if flow == own else flow
            buffer.append(Event("user", name, start, now_ns(), call, details, flow))


@contextmanager
def running(
    mark: CallMark | None,
    title: str,
    read_ns: tuple[int, int] | None = None,
    buffer: deque[Event] | None = None,
) -> Generator[None]:
    """Note, of a traced call, that it waited, was read (from, to) and runs within this context.

    `buffer` is that of a rank which has no process of its own.
    """
    global _buffer
    if mark is None:
        yield
        return
    if buffer is None:
        buffer = _buffer = deque(maxlen=mark.capacity) if _buffer is None else _buffer
    began, number = now_ns(), mark.number
    read, ready = read_ns or (began, began)
    buffer.append(Event("queue", title, mark.sent_ns, read, number))  # the caller's clock, and this
    if read_ns is not None:
        buffer.append(Event("deserialise", title, read, ready, number))
        buffer.append(Event("prepare", title, ready, began, number))  # its turn, or what it reads
    token = _here.set((buffer, number, _flow()))
    try:
        yield
    finally:
        _here.reset(token)
        buffer.append(Event("run", title, began, now_ns(), number))


class trace:  # noqa: N801 — used as a function, as contextlib's are
    """Record what driver and workers do within this context, and write it to a file.

    Perfetto (ui.perfetto.dev) and chrome://tracing open it;
    `python -m single_controller timeline trace.json` sums it up. Times are by the driver's clock: a
    process whose own one would have it read a call before that was sent, or end it after it was
    collected, is set right, and the file says by how much. Spans stay in their workers, the last
    `capacity` in each, until the context or the worker's group ends; the file names those that were
    full, and those that are missing: a worker that dies takes its spans with it.

    Args:
        path: of the file, JSON.
        capacity: spans kept per process.

    Raises:
        ValueError: a trace is being recorded already.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, *, capacity: int = 200_000) -> None:
        os.fspath(path)  # a number would be a file that is open already
        if not (isinstance(capacity, int) and capacity >= 1):
            raise ValueError(f"capacity must be a whole number, at least 1; got {capacity!r}")
        self.path, self.capacity = Path(path), capacity
        self.content: dict[str, Any] = {}
        self._hosts: dict[int, Any] = {}
        # Of each process what its clock is ahead, in ns, at least and at most, and what it noted.
        self._found: dict[str, tuple[int, int, Sequence[Event]]] = {}
        self._missing: list[str] = []

    def __enter__(self) -> Self:
        global _buffer, _current
        with _starting:
            if _current is not None:
                raise ValueError(f"a trace is being recorded already, to {_current.path}")
            self.path.touch()
            _buffer, _current = deque(maxlen=self.capacity), self
        return self

    def _take(self, hosts: Any) -> None:
        if self._hosts.pop(id(hosts), None) is not None:
            asked = now_ns()
            found, missing = hosts.harvest()
            answered = now_ns()
            for name, (told, events) in found.items():
                *_, before = self._found.get(name, ((),))
                self._found[name] = told - answered, told - asked, [*before, *events]
            self._missing += missing
            for what in missing:
                _logger.warning("the trace lacks %s", what)

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        noted = harvest()[1]
        for hosts in list(self._hosts.values()):
            self._take(hosts)
        processes, clocks = {f"driver, pid {os.getpid()}": noted}, dict[str, float]()
        collected = {event.call: event.start_ns for event in noted if event.part == "collect"}
        for name, (least, most, events) in self._found.items():
            processes[name], ahead = _by_driver(events, least, most, collected)
            clocks[name] = ahead / 1e6
        full = [name for name, events in processes.items() if len(events) >= self.capacity]
        self.content = {
            "traceEvents": list(_chrome_events(processes)),
            "displayTimeUnit": "ms",
            "otherData": {"missing": self._missing, "full": full, "clocks_ahead_ms": clocks},
        }
        self.path.write_text(json.dumps(self.content, default=str), encoding="utf-8")


_starting = threading.Lock()
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
    return CallMark(call, now_ns(), trace.capacity)


def left(hosts: Any) -> None:
    """Ask hosts for their spans now, because they are about to end."""
    if (trace := _current) is not None:
        trace._take(hosts)


def _by_driver(
    noted: Sequence[Event], least: int, most: int, collected: Mapping[int, int]
) -> tuple[Sequence[Event], int]:
    """A process's events by the driver's clock, and how far ahead its own is: a call was sent
    before it was read, and had ended when it was `collected`. 0 where that may be.
    """
    for event in noted:
        if event.part == "queue":
            most = min(most, event.end_ns - event.start_ns)
        elif event.part in ("run", "serialise") and event.call in collected:
            least = max(least, event.end_ns - collected[event.call])
    if least <= 0 <= most:
        return noted, 0
    ahead, moved = (least + most) // 2, list[Event]()
    for event in noted:
        start, end = event.start_ns, event.end_ns - ahead
        start -= ahead if event.part != "queue" else 0  # that began by the driver's
        moved.append(event._replace(start_ns=min(start, end), end_ns=end))
    return moved, ahead


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
        rows = defaultdict[tuple[int, int], list[Event]](list)
        for event in noted:
            rows[event.call, event.flow].append(event)
        for (call, flow), events in rows.items():
            if call and not flow:
                start, end = min(e.start_ns for e in events), max(e.end_ns for e in events)
                events.insert(0, Event("call", titles.get(call, "call"), start, end, call))
            row = {"cat": "span", "id": f"{pid}.{call}.{flow}", "pid": pid, "tid": 0}
            yield from _nested(row, events, zero)


def _nested(row: dict[str, Any], events: Iterable[Event], zero: int) -> Iterator[dict[str, Any]]:
    """Where each event of a row begins and ends, in an order in which they nest. Viewers ignore
    "part" and "dur", by which others read the file.
    """
    inside: list[tuple[int, str]] = []
    last = Event("", "", 2**63, 0)
    for event in (*sorted(events, key=lambda e: (e.start_ns, -e.end_ns)), last):
        while inside and inside[-1][0] <= event.start_ns:
            end, name = inside.pop()
            yield {**row, "ph": "e", "name": name, "ts": (end - zero) / 1_000}
        if event is not last:
            name = event.name if event.part in ("user", "call") else event.part
            args = {**(event.details or {}), **({"call": event.call} if event.call else {})}
            end = min(event.end_ns, inside[-1][0]) if inside else event.end_ns
            end = max(event.start_ns, end)  # a clock may be set back
            times = {"ts": (event.start_ns - zero) / 1_000, "dur": (end - event.start_ns) / 1_000}
            yield {**row, "ph": "b", "name": name, "part": event.part, **times, "args": args}
            inside.append((end, name))


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
