"""What one process notes of its time while a trace is on: named spans, in a bounded buffer.

When to note is decided by `trace` on the driver and by what calls carry; files are `trace_file`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "CAPACITY",
    "Buffer",
    "CallMark",
    "Event",
    "Harvest",
    "clock_id",
    "harvest",
    "noting",
    "now_ns",
    "record",
    "recording",
    "span",
    "within",
]

CAPACITY = 200_000

now_ns = time.perf_counter_ns


class CallMark(NamedTuple):
    """What a traced call carries to the ranks: its number, when it was sent by the driver's clock
    (`now_ns`), and how many spans each process keeps.
    """

    number: int
    sent_ns: int
    capacity: int


class Event(NamedTuple):
    """A span. `thread` is the number of the thread it ran in, `call` that of the call it belongs
    to, 0 for none.
    """

    name: str
    category: str
    start_ns: int
    duration_ns: int
    thread: int
    call: int
    details: Mapping[str, Any] | None


@dataclass(frozen=True)
class Harvest:
    """What a process noted. `dropped` spans, the oldest, did not fit into its buffer."""

    pid: int
    clock: str
    events: tuple[Event, ...]
    dropped: int
    threads: Mapping[int, str]


class Buffer:
    """Holds the last `capacity` events of this process."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._events: deque[tuple[Any, ...]] = deque(maxlen=capacity)  # of Event's fields
        self._added = itertools.count(1)
        self._last = 0

    def add(
        self,
        name: str,
        category: str,
        start_ns: int,
        end_ns: int,
        call: int = 0,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Note a span of this thread."""
        self._events.append(
            (name, category, start_ns, end_ns - start_ns, threading.get_ident(), call, details)
        )
        self._last = next(self._added)

    def harvest(self) -> Harvest:
        """All there is."""
        events = tuple(map(Event._make, tuple(self._events)))
        threads = {t.ident: t.name for t in threading.enumerate() if t.ident is not None}
        return Harvest(os.getpid(), clock_id(), events, max(0, self._last - len(events)), threads)


_buffer: Buffer | None = None
within: ContextVar[int] = ContextVar("within", default=0)  # the traced call that runs here
_of_rank: ContextVar[Buffer | None] = ContextVar("_of_rank", default=None)


def recording() -> Buffer | None:
    """This process's buffer while a trace is on."""
    return _buffer


def record(capacity: int = CAPACITY) -> Buffer:
    """Note spans in this process from now on."""
    global _buffer
    if _buffer is None:
        _buffer = Buffer(capacity)
    return _buffer


def harvest() -> Harvest:
    """What was noted since `record`; nothing is noted from now on."""
    global _buffer
    buffer, _buffer = _buffer, None
    return (buffer or Buffer(1)).harvest()


@contextlib.contextmanager
def noting(buffer: Buffer, call: int) -> Generator[None]:
    """Within this context, the user's spans belong to a call on a rank with a buffer of its own in
    this process.
    """
    tokens = within.set(call), _of_rank.set(buffer)
    try:
        yield
    finally:
        within.reset(tokens[0])
        _of_rank.reset(tokens[1])


class _Span:
    __slots__ = ("buffer", "details", "name", "start")

    def __init__(self, buffer: Buffer, name: str, details: Mapping[str, Any] | None) -> None:
        self.buffer, self.name, self.details = buffer, name, details

    def __enter__(self) -> None:
        self.start = now_ns()

    def __exit__(self, *_: object) -> None:
        self.buffer.add(self.name, "user", self.start, now_ns(), within.get(), self.details)


_OFF = contextlib.nullcontext()


def span(name: str, **details: Any) -> AbstractContextManager[None]:
    """Name a part of a worker's or of the driver's time, for traces; without one it does nothing::

        with span("forward", tokens=tokens):
            ...

    Args:
        details: what a viewer shows beside the name; they must be JSON.
    """
    return _OFF if _buffer is None else _Span(_of_rank.get() or _buffer, name, details or None)


def clock_id() -> str:
    """Which clock `now_ns` reads: processes of one machine share one, where that is certain."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return f"{platform.node()} {os.getpid()}"
