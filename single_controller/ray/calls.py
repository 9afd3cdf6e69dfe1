"""One call on its way: arguments stored once, outputs waited for, batches left in the workers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from single_controller.base.dispatch import is_future
from single_controller.base.explain import Carrier, count_uses
from single_controller.base.method import Pending
from single_controller.base.plan import Call
from single_controller.base.rank import NO_BATCH
from single_controller.errors import CallTimeoutError, GroupBrokenError
from single_controller.ray.failure import CallSite, translate
from single_controller.ray.host import Late
from single_controller.ray.hosts import Hosts
from single_controller.ray.parcel import Parcel

__all__ = ["Outbox", "RayPending", "RemoteBatch"]

_INLINE = (int, float, bool, type(None))
_INLINE_LENGTH = 1_000


class Outbox(Carrier):
    """Stores an argument once, however many ranks get it."""

    def __init__(self, calls: Sequence[Call | None]) -> None:
        self._uses = count_uses(calls)
        self._stored: dict[int, Any] = {}

    def way(self, value: Any) -> str:
        if isinstance(value, ray.ObjectRef) or is_future(value):
            return "fetched by the rank"
        if _travels_inline(value):
            return "within the call"
        return "by value" if self._uses[id(value)] == 1 else "by reference, stored once"

    def size(self, value: Any) -> int | None:
        return None if isinstance(value, ray.ObjectRef) else Parcel(value).size()

    def values(self, call: Call) -> list[Any]:
        """A call's values as they travel."""
        return [self._outgoing(value) for value in (*call.args, *call.kwargs.values())]

    def _outgoing(self, value: Any) -> Any:
        if isinstance(value, ray.ObjectRef):
            return Late(value)
        if _travels_inline(value):
            return value
        key = id(value)
        if self._uses[key] == 1:
            return Parcel(value)
        if key not in self._stored:
            self._stored[key] = ray.put(Parcel(value))
        return self._stored[key]


def _travels_inline(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return len(value) < _INLINE_LENGTH
    return isinstance(value, _INLINE) or is_future(value)


@dataclass(frozen=True)
class RemoteBatch:
    """A batch in the worker that made it: a `protocol.future.Source`.

    `rows_ref` holds its number of rows, apart from the batch. `peers` are the references of
    ranks that ran the same call and keep their output: the batch counts only if they succeed.
    """

    rows_ref: Any
    batch_ref: Any
    site: CallSite
    peers: tuple[Any, ...] = ()

    def rows(self, timeout: float | None = None) -> int:
        """Wait for the worker to finish, and its peers, without fetching the batch."""
        rows = self._get([self.rows_ref, *self.peers], timeout)[0]
        if rows is None:
            site = self.site
            raise translate(
                TypeError(NO_BATCH.format(role=site.role, method=site.method)),
                site,
            )
        return int(rows)

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        """Rows `start` to `stop` of the batch."""
        from protocol.batches import batch_rows, slice_batch

        batch = self._get([self.batch_ref], timeout)[0]
        whole = start <= 0 and stop >= batch_rows(batch)
        return batch if whole else slice_batch(batch, start, stop)

    def _get(self, refs: list[Any], timeout: float | None) -> list[Any]:
        try:
            return ray.get(refs, timeout=timeout)
        except GetTimeoutError:
            site = self.site
            raise CallTimeoutError(
                f"{site.role}.{site.method}: rank {site.rank} had not finished after {timeout:g} s",
                [site.rank],
            ) from None
        except Exception as error:
            raise translate(error, self.site) from None


class RayPending(Pending):
    """A call sent to hosts: for each called rank, references to its output and its rows."""

    def __init__(
        self,
        hosts: Hosts,
        sites: Sequence[CallSite],
        refs: Sequence[Any],
        rows_refs: Sequence[Any],
        turns: Mapping[int, tuple[str, int]],
        answers: Sequence[int],
        timeout_s: float | None,
    ) -> None:
        self._hosts, self._sites, self._refs = hosts, list(sites), list(refs)
        self._rows_refs, self._turns = list(rows_refs), turns
        at = {site.rank: i for i, site in enumerate(sites)}
        self._answers = [at[rank] for rank in answers]
        self._timeout_s = timeout_s
        self._sent = time.monotonic()

    def wait(self, timeout_s: float | None) -> list[Any]:
        left = timeout_s
        if timeout_s is None and self._timeout_s is not None:
            left = max(0.0, self._sent + self._timeout_s - time.monotonic())
        try:
            outputs = ray.get(self._refs, timeout=left)
            self._hosts.check_current()
        except GetTimeoutError:
            limit = timeout_s if timeout_s is not None else self._timeout_s
            give_up = timeout_s is None
            raise self._hosts.timed_out(self._refs, self._sites, limit or 0, give_up) from None
        except GroupBrokenError:
            raise
        except Exception as error:
            raise self._hosts.failed(error, self._refs, self._sites) from None
        except BaseException:
            self._hosts.interrupted(self._refs, self._sites)
            raise
        return [outputs[i] for i in self._answers]

    def done(self) -> bool:
        ready, _ = ray.wait(self._refs, num_returns=len(self._refs), timeout=0, fetch_local=False)
        return len(ready) == len(self._refs)

    def cancel(self) -> bool:
        return self._hosts.cancel(self._turns)

    def handles(self, batched: bool) -> list[Any]:
        if not batched:
            return [self._refs[i] for i in self._answers]
        silent = [ref for i, ref in enumerate(self._refs) if i not in self._answers]
        return [
            RemoteBatch(self._rows_refs[i], self._refs[i], self._sites[i], tuple(silent))
            for i in self._answers
        ]
