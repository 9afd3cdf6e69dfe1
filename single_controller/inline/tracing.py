"""What ranks of an inline group note of traced calls, each by itself, as if it were a process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from single_controller.base import spans
from single_controller.base.recorder import CallRecord
from single_controller.base.spans import Buffer
from single_controller.base.trace import current
from single_controller.base.trace_file import ProcessTrace
from single_controller.inline.hosts import InlineHosts, InlineRank

__all__ = ["UNTRACED", "Noted", "Run", "traced"]

_OFF = nullcontext()


class Run:
    """One rank's part of a call; with a number and a buffer, of a traced one."""

    def __init__(self, title: str = "", call: int = 0, buffer: Buffer | None = None) -> None:
        self._title, self._call, self._buffer = title, call, buffer
        self._began = spans.now_ns()

    def context(self) -> AbstractContextManager[None]:
        """Where the user's spans belong to it."""
        return _OFF if self._buffer is None else spans.noting(self._buffer, self._call)

    def ended(self) -> None:
        """Note it: its method has returned or raised."""
        if self._buffer is not None:
            self._buffer.add(self._title, "run", self._began, spans.now_ns(), self._call)
            self._buffer = None


Noted = Callable[[InlineRank], Run]
"""What makes, of each rank that a call runs on, its part of the trace."""

UNTRACED = Run()


def traced(hosts: InlineHosts, record: CallRecord) -> Noted:
    """How a call's parts are noted, if it is traced."""
    trace = current() if record.number else None
    if trace is None:
        return lambda _: UNTRACED
    capacity = trace.capacity
    trace.include(id(hosts.ranks), lambda: _Source(hosts, capacity))
    return lambda rank: Run(f"{record.role}.{record.method}", record.number, rank.noted)


class _Source:
    """The ranks of one group. It holds their list, by which the trace knows them."""

    def __init__(self, hosts: InlineHosts, capacity: int) -> None:
        self._roles, self._infos, self._ranks = "+".join(hosts.roles), hosts.infos, hosts.ranks
        for rank in self._ranks:
            rank.noted = Buffer(capacity)

    def harvest(self) -> tuple[list[ProcessTrace], list[str]]:
        found = [
            ProcessTrace(f"{self._roles} rank {at.rank} on {at.node_ip}", rank.noted.harvest())
            for at, rank in zip(self._infos, self._ranks, strict=True)
        ]
        return found, []
