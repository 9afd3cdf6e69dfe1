"""How the futures among a call's arguments reach its ranks: what must be published for whom, as far
as the driver knows the rows. Publishing itself is left to `remote_batch`, with the argument why no
order of calls can dead-lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from single_controller.base.plan import Call
from single_controller.base.rows import is_future
from single_controller.ray.hosts import Hosts
from single_controller.ray.lease import Lease
from single_controller.ray.remote_batch import RemoteBatch
from single_controller.ray.shelf import needed_tokens

__all__ = ["Routes", "route"]


class Routes:
    """How the futures among a call's values reach its ranks."""

    def __init__(self) -> None:
        self.offers: dict[str, Any] = {}  # by token: a reference to where it is published
        self.claims: dict[int, tuple[str, ...]] = {}  # by rank: what is in its own process
        self.loans: list[tuple[Lease, list[int]]] = []  # to which ranks

    def sent(self, refs: Mapping[int, Any]) -> None:
        """Note the calls, by rank, that read what is lent to them."""
        for lease, ranks in self.loans:
            lease.lent_to(refs[rank] for rank in ranks)


def route(calls: Sequence[Call | None], hosts: Hosts, materialize: bool, wait_s: float) -> Routes:
    """Send what must be published before these calls can be sent, and nothing else.

    Where a future itself is the argument (`materialize=False`), the worker may keep it for later:
    then all of it is published. If it depends on the rows who reads what, these are waited for,
    `wait_s` at most; what is not known then, the publication itself finds out.
    """
    routes = Routes()
    batches: dict[str, RemoteBatch] = {}
    readers: dict[str, list[tuple[int, Any]]] = {}
    for rank, call in enumerate(calls):
        for value in call.values() if call else ():
            if is_future(value):
                for origin in value.origins():
                    if isinstance(origin, RemoteBatch):
                        batches[origin.token] = origin
                        readers.setdefault(origin.token, []).append((rank, value))
    needs = _Needs(batches.values(), wait_s)  # asked only where it depends on the rows
    for batch in batches.values():
        if batch.lease is not None:
            batch.lease.hosts.check_current()
    for token, batch in batches.items():
        own = batch.lease is not None and batch.lease.hosts is hosts
        at = batch.site.rank if own else None
        here = [rank for rank, _ in readers[token] if rank == at]
        elsewhere = [(rank, future) for rank, future in readers[token] if rank != at]
        for rank in here:
            routes.claims[rank] = (*routes.claims.get(rank, ()), token)
        routes.offers[token] = batch.offer
        depends = materialize and here and elsewhere
        if depends and needs.known:
            elsewhere = [(rank, future) for rank, future in elsewhere if needs.reads(future, token)]
        if batch.lease is None or (materialize and not elsewhere):
            continue
        rank = batch.site.rank
        others = list(dict.fromkeys(rank for rank, _ in elsewhere))
        lends = materialize and batch.lease.can_lend(rank, hosts, others)
        if lends:
            routes.loans.append((batch.lease, others))
        if depends and not needs.known:
            wanted = [future for _, future in elsewhere]
            routes.offers[token] = batch.lease.publish_for(rank, wanted, lends)
        else:
            routes.offers[token] = batch.lease.publish(rank, lends)
    return routes


class _Needs:
    """Which futures read which batches, as far as that is known on the driver."""

    def __init__(self, batches: Iterable[RemoteBatch], wait_s: float) -> None:
        self._calls = {batch.call.token: batch for batch in batches}
        self._wait_s = wait_s
        self._read: dict[int, set[str]] = {}

    @cached_property
    def known(self) -> bool:
        """Whether the rows of all these batches are known.

        Raises what went wrong with their calls to a caller who waits, and would run into it. To
        others nothing: it is for the readers to run into.
        """
        deadline = time.monotonic() + self._wait_s
        for batch in self._calls.values():
            if not batch.call.done(max(0.0, deadline - time.monotonic())):
                return False
        try:
            for batch in self._calls.values():
                batch.call.rows(0, batch.lease)
        except Exception:
            if self._wait_s:
                raise
            return False
        return True

    def reads(self, future: Any, token: str) -> bool:
        """Whether a future reads rows of the batch of this token."""
        if id(future) not in self._read:
            self._read[id(future)] = needed_tokens(future)
        return token in self._read[id(future)]
