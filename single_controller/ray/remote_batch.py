"""Batches that are in the workers that made them: where they are, who reads them, when they go.

A result without blocking stays with its host (`shelf`), and the driver gets a `RemoteBatch` for it.
A call on the same process takes it there; before a call goes to other processes, and when the
driver itself or a pickler asks, the driver puts `publish` into the queue of the host that has it.
If readers are both here and elsewhere, it depends on the rows who reads what (`routes`): the driver
looks, if it knows them or learns them within a moment; else the task itself finds out whether
anyone elsewhere needs these rows, and otherwise publishes nothing. A publication waits behind what
its host was told before, so a call whose last result was read elsewhere publishes by itself.

No order of calls can dead-lock. Put all tasks (calls and publications) in the order in which the
driver sent them. A task waits for earlier tasks in its host's queue, for earlier calls whose rows
it needs to know, and for publications of their results. These were sent before it: a publication is
sent no later than the call that reads it, and after the call that makes the batch. So the first
unfinished task waits for nothing. A host on an event loop runs more than its first task at a time,
and waits for no more: a call's turn comes after earlier calls have started, reading arguments
happens in threads of their own, and a publication has no turn. A release waits for its turn only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError

from single_controller.base.progress import shown_seconds
from single_controller.base.rank import NO_BATCH
from single_controller.errors import CallTimeoutError, GroupBrokenError
from single_controller.ray import patience
from single_controller.ray.envelope import Enclosed
from single_controller.ray.failure import CallSite, diagnose, translate
from single_controller.ray.lease import Lease
from single_controller.ray.offers import NO_OFFERS, Posted, offered, offering
from single_controller.ray.shelf import kept_here, known_rows, remember_rows

__all__ = ["RemoteBatch", "RemoteCall", "posted"]


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

    def rows(self, timeout: float | None, lease: Lease | None = None) -> tuple[int | None, ...]:
        """Wait for all ranks; the rows of each, None where it kept no batch.

        With the driver's `lease`, the call's own deadline counts where there is no `timeout`, and
        its group learns what went wrong.
        """
        if self._known is None:
            self._known = known_rows(self.token)
        if self._known is None:
            self._known = tuple(self._get(timeout, lease))
            remember_rows(self.token, self._known)
        return self._known

    @property
    def known(self) -> bool:
        """Whether the rows are, without waiting."""
        return self._known is not None

    def done(self, timeout_s: float = 0) -> bool:
        """Whether all ranks have finished, well or not, after at most so many seconds."""
        if self._known is not None:
            return True
        count = len(self.refs)
        _, late = ray.wait(self.refs, num_returns=count, timeout=timeout_s, fetch_local=False)
        return not late

    def _get(self, timeout: float | None, lease: Lease | None) -> list[int | None]:
        first = self.sites[0]
        ranks = [site.rank for site in self.sites]
        left = lease.limit.left(timeout) if lease else timeout
        try:
            return patience.get(self.refs, left, f"{first.role}.{first.method}", ranks)
        except GetTimeoutError:
            if lease is not None:
                raise lease.limit.expired(lease.hosts, self.refs, self.sites, timeout) from None
            _, late = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
            ranks = [s.rank for s, ref in zip(self.sites, self.refs, strict=True) if ref in late]
            raise CallTimeoutError(
                f"{first.role}.{first.method}: ranks {ranks} had not finished after "
                f"{shown_seconds(timeout)} s",
                ranks,
            ) from None
        except GroupBrokenError:
            raise
        except Exception as error:
            if lease is not None:
                raise lease.hosts.failed(error, self.refs, self.sites) from None
            raise diagnose(error, self.refs, self.sites, {}).error from None


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
    def reference(self) -> Any:
        """Ray's reference to what says that the rank has finished."""
        return self.call.refs[self.at]

    @property
    def token(self) -> str:
        return f"{self.call.token}:{self.site.rank}"

    @property
    def title(self) -> str:
        """The method that makes it, for messages."""
        return f"{self.site.role}.{self.site.method}"

    def rows(self, timeout: float | None = None) -> int:
        """Wait for the worker to finish, and its peers, without fetching the batch."""
        with self.lease.current() if self.lease else nullcontext():
            rows = self.call.rows(timeout, self.lease)[self.at]
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

    async def arrive(self, whole: bool) -> bool:
        """Wait on the running event loop for the rows of all ranks, or for the `whole` batch to be
        here; whether they came in time.
        """
        lease, refs, what = self.lease, self.call.refs, self.title
        ranks = [site.rank for site in self.call.sites]
        if lease is not None:
            lease.hosts.check_current()
        limit = lease.limit.left(None) if lease else None
        if whole and kept_here(self.token) is None:
            refs = [lease.publish(self.site.rank) if lease else self.offer]
            what, ranks = f"rows of {what}", [self.site.rank]
            limit = lease.limit.seconds if lease else None
        if not whole and self.call.known:
            return True
        return await patience.arrived(refs, limit, what, ranks)

    def _read(self, ref: Any, start: int, stop: int, timeout: float | None) -> Any:
        from protocol.batches import lend_rows
        from protocol.wire import read_as, reading

        how, lease, site = reading(), self.lease, self.site
        whole = start == 0 and stop == self.rows(timeout)
        limit = lease.limit.seconds if lease and timeout is None else timeout
        try:
            with read_as("join" if how == "own" and not whole else how):
                batch: Any
                [batch] = patience.get([ref], limit, f"rows of {self.title}", [site.rank])
        except GetTimeoutError:
            raise CallTimeoutError(
                f"{site.role}.{site.method}: rank {site.rank} has finished, and had not sent its "
                f"rows after {shown_seconds(limit)} s: a later call keeps it busy",
                [site.rank],
                lease.hosts.stacks([site.rank]) if lease else {},
            ) from None
        except GroupBrokenError:
            raise
        except Exception as error:
            raise (
                lease.hosts.failed(error, [ref], [site]) if lease else translate(error, site)
            ) from None
        return batch if whole or batch is None else lend_rows(batch, start, stop)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteBatch, (self.call, self.at, None, self._offered())

    def _offered(self) -> Any:
        offers = offered()
        if offers is NO_OFFERS:
            return None
        if offers is not None and self.token in offers:
            return offers[self.token]
        return self.offer if self.lease is None else self.lease.publish(self.site.rank)


def posted(future: Any, offers: Mapping[str, Any]) -> Enclosed | Posted:
    """A future as an argument of a call: it arrives as itself, with these references to where its
    batches are published, by token.
    """
    for origin in future.origins():
        if not isinstance(origin, RemoteBatch) or not origin.call.known or offers.get(origin.token):
            return Posted(future, offers)
    with offering(offers):
        return Enclosed(cloudpickle.dumps(future))
