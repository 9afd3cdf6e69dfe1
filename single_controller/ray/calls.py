"""One call on its way: waited for, asked whether it is done, dropped, or left in the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from single_controller.base.method import Pending
from single_controller.base.recorder import CallRecord
from single_controller.errors import GroupBrokenError
from single_controller.ray import patience
from single_controller.ray.failure import CallSite
from single_controller.ray.hosts import Hosts
from single_controller.ray.lease import Lease, Limit, Publication
from single_controller.ray.parcel import counting
from single_controller.ray.remote_batch import RemoteBatch, RemoteCall

__all__ = ["RayPending"]


class RayPending(Pending):
    """A call sent to hosts: for each called rank, references to its output and its rows."""

    def __init__(
        self,
        hosts: Hosts,
        sites: Sequence[CallSite],
        refs: Sequence[Any],
        turns: Mapping[int, tuple[str, int]],
        answers: Sequence[int],
        limit: Limit,
        record: CallRecord,
        token: str,
        lends: bool,
        published: Mapping[int, Publication],
    ) -> None:
        self._hosts, self._sites, self._refs = hosts, list(sites), list(refs)
        self._turns, self._record, self._token, self._lends = turns, record, token, lends
        self._published = published
        at = {site.rank: i for i, site in enumerate(sites)}
        self._answers = [at[rank] for rank in answers]
        self._limit = limit

    def wait(self, timeout_s: float | None) -> list[Any]:
        self._hosts.check_current()
        left = self._limit.left(timeout_s)
        try:
            with counting(lambda size: self._record.count("bytes_in", size)):
                outputs = patience.get(self._refs, left, self._title, self._ranks)
            self._hosts.check_current()
        except GetTimeoutError:
            raise self._limit.expired(self._hosts, self._refs, self._sites, timeout_s) from None
        except GroupBrokenError:
            raise
        except Exception as error:
            raise self._hosts.failed(error, self._refs, self._sites) from None
        except BaseException:
            self._hosts.interrupted(self._refs, self._sites)
            raise
        return [outputs[i] for i in self._answers]

    async def arrive(self) -> bool:
        self._hosts.check_current()
        left = self._limit.left(None)
        return await patience.arrived(self._refs, left, self._title, self._ranks)

    @property
    def _title(self) -> str:
        return f"{self._sites[0].role}.{self._sites[0].method}"

    @property
    def _ranks(self) -> list[int]:
        return [site.rank for site in self._sites]

    def done(self) -> bool:
        if self._hosts.gone:
            return True
        ready, _ = ray.wait(self._refs, num_returns=len(self._refs), timeout=0, fetch_local=False)
        return len(ready) == len(self._refs)

    def cancel(self) -> bool:
        return self._hosts.cancel(self._turns)

    def handles(self, batched: bool) -> list[Any]:
        if not batched:
            return [self._refs[i] for i in self._answers]
        call = RemoteCall(self._token, self._refs, self._sites)
        method = self._sites[0].role, self._sites[0].method
        lease = Lease(self._hosts, self._token, self._record, method, self._limit, self._lends)
        batches = []
        for i in self._answers:
            rank = self._sites[i].rank
            lease.hold(rank, self._published.get(rank))
            batches.append(RemoteBatch(call, i, lease))
        return batches
