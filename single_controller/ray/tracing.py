"""What hosts note of traced calls, and how it comes to the driver, with the distance of clocks."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import ray

from single_controller.base import spans
from single_controller.base.recorder import CallRecord
from single_controller.base.spans import CallMark, Harvest
from single_controller.base.trace import current
from single_controller.base.trace_file import ProcessTrace
from single_controller.ray.envelope import Envelope
from single_controller.ray.parcel import ArrivedParcel
from single_controller.ray.patience import session

__all__ = ["HostTracing", "left", "mark", "running"]

_PATIENCE_S = 10.0
_PINGS = 8
_WORTH_NOTING_NS = 20_000
_OFF = nullcontext()


class HostTracing:
    """A host's side: tasks that a trace asks of it."""

    def trace_harvest(self) -> Harvest:
        """What this process noted; it notes no more until the next traced call."""
        return spans.harvest()

    def trace_clock(self) -> int:
        """This process's clock."""
        return spans.now_ns()


def running(envelope: Envelope, parcels: Sequence[ArrivedParcel]) -> AbstractContextManager[None]:
    """Note, of a traced call, that it waited, was read, and runs within this context."""
    return _OFF if envelope.mark is None else _running(envelope, envelope.mark, parcels)


@contextmanager
def _running(
    envelope: Envelope, mark: CallMark, parcels: Sequence[ArrivedParcel]
) -> Generator[None]:
    buffer = spans.record(mark.capacity)
    began = spans.now_ns()
    title = f"{envelope.role}.{envelope.method}"
    read = min((parcel.read_ns[0] for parcel in parcels), default=began)
    ready = max((parcel.read_ns[1] for parcel in parcels), default=began)
    buffer.add(title, "queue", mark.sent_ns, read, mark.number)
    if read < ready:
        buffer.add(title, "deserialise", read, ready, mark.number)
    if began - ready > _WORTH_NOTING_NS:  # its turn, or what other workers make for it
        buffer.add(title, "prepare", ready, began, mark.number)
    token = spans.within.set(mark.number)
    try:
        yield
    finally:
        spans.within.reset(token)
        buffer.add(title, "run", began, spans.now_ns(), mark.number)


class _Hosts(Protocol):
    """What a trace needs of hosts."""

    handles: list[Any]

    @property
    def infos(self) -> Sequence[Any]: ...

    @property
    def roles(self) -> tuple[str, ...]: ...


def mark(record: CallRecord, hosts: _Hosts) -> CallMark | None:
    """What a call carries to these hosts if it is traced."""
    trace = current() if record.number else None
    if trace is None:
        return None
    trace.include(id(hosts), lambda: _Source(hosts))
    return CallMark(record.number, spans.now_ns(), trace.capacity)


def left(hosts: _Hosts) -> None:
    """Fetch what hosts noted before they end."""
    trace = current()
    if trace is not None:
        trace.leave(id(hosts))


class _Source:
    """The hosts of one group."""

    def __init__(self, hosts: _Hosts) -> None:
        self._roles, self._infos = "+".join(hosts.roles), list(hosts.infos)
        self._handles = list(hosts.handles)
        self._session = session()

    def harvest(self) -> tuple[list[ProcessTrace], list[str]]:
        if session() != self._session:
            return [], [f"{self._roles}: Ray was shut down before its spans were asked for"]
        refs = [handle.trace_harvest.remote() for handle in self._handles]
        ray.wait(refs, num_returns=len(refs), timeout=_PATIENCE_S)
        found, missing = [], []
        for rank, (ref, handle) in enumerate(zip(refs, self._handles, strict=True)):
            name = f"{self._roles} rank {rank} on {self._infos[rank].node_ip}"
            try:
                harvest: Any = ray.get(ref, timeout=0)
                offset, uncertainty = 0, 0
                if harvest.clock != spans.clock_id():
                    offset, uncertainty = _distance(handle)
                found.append(ProcessTrace(name, harvest, offset, uncertainty))
            except Exception as error:
                missing.append(f"{name}: {type(error).__name__} when asked for its spans")
        return found, missing


def _distance(handle: Any) -> tuple[int, int]:
    """How many ns a host's clock is ahead of this one, and how far off that may be, from the
    quickest of several questions.
    """
    best: tuple[int, int] | None = None
    deadline = time.monotonic() + _PATIENCE_S
    for _ in range(_PINGS):
        asked = spans.now_ns()
        left_s = max(0.1, deadline - time.monotonic())
        there: Any = ray.get(handle.trace_clock.remote(), timeout=left_s)
        answered = spans.now_ns()
        found = (answered - asked) // 2, there - (asked + answered) // 2
        best = min(best or found, found)
    assert best is not None
    return best[1], best[0]
