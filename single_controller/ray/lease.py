"""What the driver holds of batches in the workers: it publishes them, and lets go of them."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import ray

from single_controller.base.recorder import CallRecord
from single_controller.errors import CallTimeoutError, GroupBrokenError
from single_controller.ray.failure import CallSite
from single_controller.ray.hosts import Hosts, later
from single_controller.ray.offers import NO_OFFERS, Posted
from single_controller.ray.parcel import counting

__all__ = ["Lease", "Limit", "Publication"]


@dataclass(frozen=True)
class Limit:
    """How long a call may take, and until when by `time.monotonic()`; None for ever."""

    seconds: float | None
    deadline: float | None

    def left(self, asked: float | None) -> float | None:
        """What a wait has: the seconds `asked` for, or with None what is left of the call's own."""
        if asked is not None or self.deadline is None:
            return asked
        return max(0.0, self.deadline - time.monotonic())

    def expired(
        self, hosts: Hosts, refs: Sequence[Any], sites: Sequence[CallSite], asked: float | None
    ) -> CallTimeoutError:
        """The error for ranks still running; after the call's own time these are given up."""
        seconds = self.seconds if asked is None else asked
        return hosts.timed_out(refs, sites, seconds or 0, give_up=asked is None)


class Publication(NamedTuple):
    """References to a batch in shared memory, or to claims on it where device memory is lent, and
    to the bytes it takes.
    """

    batch: Any
    size: Any
    lends: bool


class Lease:
    """The driver's hold on the results of one call: without it, their hosts let go of them.

    A publication waits behind what its host was told before. So where a method's last result was
    read elsewhere, its next call publishes what it makes, until one of these is dropped unread.
    """

    def __init__(
        self,
        hosts: Hosts,
        token: str,
        record: CallRecord,
        method: tuple[str, str],
        limit: Limit,
        lends: bool = False,
    ) -> None:
        self.hosts, self._token, self._record = hosts, token, record
        self._method, self.limit, self._lends = method, limit, lends
        self._unread: set[tuple[str, str, int]] = set()
        self._borrowers: list[Any] = []
        self._published: dict[tuple[int, bool], Any] = {}
        self._publications: dict[int, int] = {}  # by rank: how many tasks were sent
        self._lock = threading.Lock()

    def hold(self, rank: int, published: Publication | None = None) -> None:
        """Include a rank's result, and release all once nobody holds this any more."""
        if not self._publications:
            gone = (self.hosts, self._token, self._publications, self._borrowers, self._unread)
            weakref.finalize(self, later, partial(_release, *gone)).atexit = False
        self._publications[rank] = 0
        if published is not None:
            self._unread.add((*self._method, rank))
            self._published[rank, published.lends] = self._noted(published)

    def can_lend(self, rank: int, hosts: Hosts, readers: Iterable[int]) -> bool:
        """Whether all these ranks of some hosts can map device memory of a rank's batch."""
        device = self.hosts.infos[rank].identity
        ids = [hosts.infos[reader].identity for reader in readers]
        return self._lends and device is not None and all(i and i.reads(device) for i in ids)

    def lent_to(self, refs: Iterable[Any]) -> None:
        """Keep the memory at least until these calls have ended."""
        held = list(dict.fromkeys([*self._borrowers, *refs]))
        _, self._borrowers[:] = ray.wait(held, num_returns=len(held), timeout=0, fetch_local=False)

    def publish(self, rank: int, lends: bool = False) -> Any:
        """A reference to a rank's batch in shared memory, or with `lends` to claims on it."""
        self.hosts.check_current()
        with self._lock:
            habit = (*self._method, rank)
            self._unread.discard(habit)
            self.hosts.read_elsewhere[habit] = lends
            if (rank, lends) not in self._published:
                self._published[rank, lends] = self._send(rank, None, lends)
            return self._published[rank, lends]

    def publish_for(self, rank: int, futures: Sequence[Any], lends: bool = False) -> Any:
        """The same; to None where it turns out that no row of these futures is in it."""
        self.hosts.check_current()
        with self._lock:
            if (rank, lends) in self._published:
                self._unread.discard((*self._method, rank))
                return self._published[rank, lends]
            wanted = [Posted(future, NO_OFFERS) for future in futures]
            return self._send(rank, wanted, lends)

    def _send(self, rank: int, wanted: Any, lends: bool) -> Any:
        hosts = self.hosts
        if hosts.closed:
            raise GroupBrokenError(
                f"{hosts.closed_because}: results that were still in its workers are gone. "
                "Fetch what you need of a future before the group closes"
            )
        self._publications[rank] += 1
        sent = hosts.handles[rank].publish.remote(f"{self._token}:{rank}", wanted, lends)
        return self._noted(Publication(sent[0], sent[1], lends))

    def _noted(self, published: Publication) -> Any:
        size, hosts = published.size, self.hosts
        self._record.count_later("bytes_between", lambda: 0 if hosts.gone else _if_ready(size))
        return published.batch

    def read(self) -> Any:
        """Count what arrives within this context as results that came to the driver."""
        return counting(lambda size: self._record.count("bytes_in", size))

    @contextmanager
    def current(self) -> Generator[None, None, None]:
        """Raises GroupBrokenError, whatever else goes wrong or does not, after a restart."""
        self.hosts.check_current()
        try:
            yield
        except Exception:
            self.hosts.check_current()
            raise
        self.hosts.check_current()


def _if_ready(ref: Any) -> int | None:
    ready, _ = ray.wait([ref], timeout=0)
    if not ready:
        return None
    try:
        return int(ray.get(ref))
    except Exception:
        return 0


def _release(
    hosts: Hosts,
    token: str,
    publications: dict[int, int],
    borrowers: list[Any],
    unread: set[tuple[str, str, int]],
) -> None:
    """Let hosts let go of a result, once nobody borrows it any more."""
    if hosts.gone:
        return
    for habit in unread:
        hosts.read_elsewhere.pop(habit, None)
    if borrowers:
        again = partial(_release, hosts, token, publications, [], set())
        threading.Thread(target=_wait_for, args=(borrowers, again), daemon=True).start()
        return
    with hosts.sending:
        for rank, count in publications.items() if not hosts.closed else ():
            turn = hosts.turn(rank)
            hosts.handles[rank].release.remote(f"{token}:{rank}", count, turn)


def _wait_for(borrowers: list[Any], again: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # the cluster is gone
        ray.wait(borrowers, num_returns=len(borrowers), timeout=None, fetch_local=False)
    later(again)
