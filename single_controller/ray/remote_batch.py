"""Batches that are in the workers that made them: where they are, who reads them, when they go.

A result without blocking stays with its host (`shelf`), and the driver gets a `RemoteBatch` for it.
A call on the same process takes it there; before a call goes to other processes, and when the
driver itself or a pickler asks, the driver puts `publish` into the queue of the host that has it.
If readers are both here and elsewhere, it depends on the rows who reads what (`routes`): the driver
looks, if it knows them or learns them within a moment; else the task itself finds out whether
anyone elsewhere needs these rows, and otherwise publishes nothing.

No order of calls can dead-lock. Put all tasks (calls and publications) in the order in which the
driver sent them. A task waits for earlier tasks in its host's queue, for earlier calls whose rows
it needs to know, and for publications of their results. These were sent before it: a publication is
sent no later than the call that reads it, and after the call that makes the batch. So the first
unfinished task waits for nothing. A host on an event loop runs more than its first task at a time,
and waits for no more: a call's turn comes after earlier calls have started, reading arguments
happens in threads of their own, and a publication has no turn. A release waits for its turn only.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, TypeAlias

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError

from single_controller.base.rank import NO_BATCH
from single_controller.base.recorder import CallRecord
from single_controller.errors import CallTimeoutError, GroupBrokenError
from single_controller.ray import patience
from single_controller.ray.envelope import Enclosed
from single_controller.ray.failure import CallSite, diagnose, translate
from single_controller.ray.hosts import Hosts
from single_controller.ray.parcel import counting
from single_controller.ray.shelf import kept_here, known_rows, remember_rows

__all__ = ["Lease", "Posted", "RemoteBatch", "RemoteCall", "posted"]

_NO_OFFERS: Mapping[str, Any] = {}
_offering: ContextVar[Mapping[str, Any] | None] = ContextVar("_offering", default=None)


class RemoteCall:
    """A call that keeps its outputs: for each rank a reference to the rows it made.

    It counts only if all ranks succeed, also those whose output is not needed. Once they are known,
    the rows are what goes with it to other processes, and not the references.
    """

    def __init__(
        self,
        token: str,
        refs: Sequence[Any],
        sites: Sequence[CallSite],
        known: tuple[int | None, ...] | None = None,
    ) -> None:
        self.token, self.refs, self.sites = token, list(refs), tuple(sites)
        self._known = known

    def __reduce__(self) -> tuple[Any, ...]:
        refs = self.refs if self._known is None else ()
        return RemoteCall, (self.token, refs, self.sites, self._known)

    def rows(self, timeout: float | None) -> tuple[int | None, ...]:
        """Wait for all ranks; the rows of each, None where it kept no batch."""
        if self._known is None:
            self._known = known_rows(self.token)
        if self._known is None:
            self._known = tuple(self._get(timeout))
            remember_rows(self.token, self._known)
        return self._known

    @property
    def known(self) -> bool:
        """Whether the rows are, without waiting."""
        return self._known is not None

    def done(self) -> bool:
        """Whether all ranks have finished, well or not."""
        if self._known is not None:
            return True
        _, late = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        return not late

    def _get(self, timeout: float | None) -> list[int | None]:
        first = self.sites[0]
        ranks = [site.rank for site in self.sites]
        try:
            return patience.get(self.refs, timeout, f"{first.role}.{first.method}", ranks)
        except GetTimeoutError:
            _, late = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
            pairs = zip(self.sites, self.refs, strict=True)
            raise _timed_out([site for site, ref in pairs if ref in late], timeout) from None
        except Exception as error:
            raise diagnose(error, self.refs, self.sites, {}).error from None


class Lease:
    """The driver's hold on the results of one call: without it, their hosts let go of them."""

    def __init__(self, hosts: Hosts, token: str, record: CallRecord, lends: bool = False) -> None:
        self.hosts, self._token, self._record = hosts, token, record
        self._lends = lends
        self._borrowers: list[Any] = []
        self._published: dict[tuple[int, bool], Any] = {}
        self._publications: dict[int, int] = {}  # by rank: how many tasks were sent
        self._lock = threading.Lock()

    def hold(self, rank: int) -> None:
        """Include a rank's result, and release all once nobody holds this any more."""
        if not self._publications:
            gone = (self.hosts, self._token, self._publications, self._borrowers)
            weakref.finalize(self, _releaser().put, gone).atexit = False
        self._publications[rank] = 0

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
            if (rank, lends) not in self._published:
                self._published[rank, lends] = self._send(rank, None, lends)
            return self._published[rank, lends]

    def publish_for(self, rank: int, futures: Sequence[Any], lends: bool = False) -> Any:
        """The same; to None where it turns out that no row of these futures is in it."""
        self.hosts.check_current()
        with self._lock:
            if (rank, lends) in self._published:
                return self._published[rank, lends]
            wanted = [Posted(future, _NO_OFFERS) for future in futures]
            return self._send(rank, wanted, lends)

    def _send(self, rank: int, wanted: Any, lends: bool) -> Any:
        hosts = self.hosts
        if hosts.closed:
            raise GroupBrokenError(
                f"{hosts.closed_because}: results that were still in its workers are gone. "
                "Fetch what you need of a future before the group closes"
            )
        self._publications[rank] += 1
        ref, size = hosts.handles[rank].publish.remote(f"{self._token}:{rank}", wanted, lends)
        self._record.count_later("bytes_between", lambda: _value_if_ready(size))
        return ref

    def read(self) -> Any:
        """Count what arrives within this context as results that came to the driver."""
        return counting(lambda size: self._record.count("bytes_in", size))

    @contextmanager
    def current(self) -> Generator[None, None, None]:
        """Raises GroupBrokenError, whatever else goes wrong or does not, after a restart."""
        try:
            yield
        except Exception:
            self.hosts.check_current()
            raise
        self.hosts.check_current()


def _value_if_ready(ref: Any) -> int | None:
    ready, _ = ray.wait([ref], timeout=0)
    if not ready:
        return None
    try:
        return int(ray.get(ref))
    except Exception:
        return 0


class RemoteBatch:
    """One rank's batch of a call: a `protocol.future.Source`.

    On the driver it has a lease. Sent on, it has an offer instead: a reference to where the batch
    is published, unless no process that reads it needs that.
    """

    def __init__(
        self,
        call: RemoteCall,
        at: int,
        lease: Lease | None,
        offer: Any = None,
    ) -> None:
        self.call, self.at = call, at
        self.lease, self.offer = lease, offer

    @property
    def site(self) -> CallSite:
        return self.call.sites[self.at]

    @property
    def token(self) -> str:
        return f"{self.call.token}:{self.site.rank}"

    def rows(self, timeout: float | None = None) -> int:
        """Wait for the worker to finish, and its peers, without fetching the batch."""
        with self.lease.current() if self.lease else nullcontext():
            rows = self.call.rows(timeout)[self.at]
        if rows is None:
            site = self.site
            raise translate(
                TypeError(NO_BATCH.format(role=site.role, method=site.method)),
                site,
            )
        return rows

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        """Rows `start` to `stop` of the batch."""
        from protocol.batches import lend_rows

        kept = kept_here(self.token)
        if kept is not None:
            return lend_rows(kept.batch(), start, stop)
        if self.lease is not None:
            with self.lease.current(), self.lease.read():
                return self._read(self.lease.publish(self.site.rank), start, stop, timeout)
        batch = self._read(self.offer, start, stop, timeout)
        assert batch is not None, f"{self.token} is neither here nor published"
        return batch

    def _read(self, ref: Any, start: int, stop: int, timeout: float | None) -> Any:
        from protocol.batches import lend_rows
        from protocol.wire import read_as, reading

        how = reading()
        whole = start == 0 and stop == self.rows(timeout)
        try:
            with read_as("join" if how == "own" and not whole else how):
                batch: Any = ray.get(ref, timeout=timeout)
        except GetTimeoutError:
            raise _timed_out([self.site], timeout) from None
        except Exception as error:
            raise translate(error, self.site) from None
        return batch if whole or batch is None else lend_rows(batch, start, stop)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteBatch, (self.call, self.at, None, self._offered())

    def _offered(self) -> Any:
        offers = _offering.get()
        if offers is _NO_OFFERS:
            return None
        if offers is not None and self.token in offers:
            return offers[self.token]
        return self.offer if self.lease is None else self.lease.publish(self.site.rank)


def _timed_out(sites: Sequence[CallSite], timeout: float | None) -> CallTimeoutError:
    ranks = [site.rank for site in sites]
    return CallTimeoutError(
        f"{sites[0].role}.{sites[0].method}: ranks {ranks} had not finished after {timeout:g} s",
        ranks,
    )


@contextmanager
def _offer(offers: Mapping[str, Any]) -> Generator[None, None, None]:
    token = _offering.set(offers)
    try:
        yield
    finally:
        _offering.reset(token)


def posted(future: Any, offers: Mapping[str, Any]) -> Enclosed | Posted:
    """A future as an argument of a call: it arrives as itself, with these references to where its
    batches are published, by token.
    """
    for origin in future.origins():
        if not isinstance(origin, RemoteBatch) or not origin.call.known or offers.get(origin.token):
            return Posted(future, offers)
    with _offer(offers):
        return Enclosed(cloudpickle.dumps(future))


class Posted:
    """The same where references go with it, which Ray has to see. A future that is pickled in any
    other way has all of its batches published.
    """

    def __init__(self, future: Any, offers: Mapping[str, Any]) -> None:
        self._future, self._offers = future, offers

    def __reduce__(self) -> tuple[Any, ...]:
        with _offer(self._offers):
            return pickle.loads, (cloudpickle.dumps(self._future),)


_Gone: TypeAlias = tuple[Hosts, str, dict[int, int], list[Any]]

_queue: SimpleQueue[_Gone] = SimpleQueue()
_started = threading.Lock()


def _releaser() -> SimpleQueue[_Gone]:
    """Takes what is to be released: garbage may be collected at any moment, with any lock held,
    and a thread of its own can wait for its turn.
    """
    if _started.acquire(blocking=False):
        threading.Thread(target=_release_all, daemon=True, name="release-results").start()
    return _queue


def _release_all() -> None:
    while True:
        hosts, token, publications, borrowers = _queue.get()
        if borrowers:
            again: _Gone = (hosts, token, publications, [])
            threading.Thread(target=_wait_for, args=(borrowers, again), daemon=True).start()
            continue
        try:
            with hosts.sending:
                for rank, count in publications.items() if not hosts.closed else ():
                    turn = hosts.turn(rank)
                    hosts.handles[rank].release.remote(f"{token}:{rank}", count, turn)
                    hosts.sent(rank)
        except Exception:  # the cluster or the host is gone, and the results with it
            continue


def _wait_for(borrowers: list[Any], again: _Gone) -> None:
    with contextlib.suppress(Exception):  # the cluster is gone
        ray.wait(borrowers, num_returns=len(borrowers), timeout=None, fetch_local=False)
    _queue.put(again)
