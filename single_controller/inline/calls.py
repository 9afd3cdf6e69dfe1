"""One call in an inline group: it has run, rank by rank, when it is sent. What is kept is what each
rank returned or raised; only `async def` methods may still be waiting.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from single_controller.base.method import Pending
from single_controller.base.plan import Call
from single_controller.base.progress import waiting
from single_controller.base.rank import NO_BATCH, checked_output
from single_controller.base.recorder import CallRecord
from single_controller.base.rows import is_future
from single_controller.errors import CallTimeoutError, WorkerDiedError, WorkerError
from single_controller.inline.hosts import InlineHosts, InlineRank
from single_controller.inline.privacy import Handle, Package
from single_controller.inline.tracing import UNTRACED, Noted, traced

__all__ = ["Arguments", "InlinePending", "InlineReference", "LocalBatch", "send"]


class InlineReference(Handle):
    """What one rank returns from a call, for whoever asks: each gets a copy of its own."""

    def __init__(self, hosts: InlineHosts, rank: InlineRank, role: str, method: str) -> None:
        self.hosts, self.rank, self.role, self.method = hosts, rank, role, method
        self._package: Package | None = None
        self.error: Exception | None = None
        self._run = UNTRACED

    def done(self) -> bool:
        """Whether the method has returned or raised."""
        return self._package is not None or self.error is not None

    def result(self, timeout: float | None = None) -> Any:
        """What the method returned. Waits, at most `timeout` seconds, for an async one.

        Raises:
            WorkerError: the method raised. CallTimeoutError: it was not done in time.
        """
        InlinePending(self.hosts, [self], [], None).wait(timeout)
        assert self._package is not None
        return self._package.open()

    def run(
        self,
        args: Sequence[Package],
        names: Sequence[str],
        arguments: Arguments,
        keep: bool,
        noted: Noted,
    ) -> None:
        """Run the method on its rank, an async one up to where it first waits."""
        output: Any = None
        with self.rank.here():
            try:
                function = getattr(self.rank.workers[self.role], self.method)
                values = arguments.read(args)
                self.rank.turns.take(self.role)
                split = len(values) - len(names)
                named = dict(zip(names, values[split:], strict=True))
                self._run = noted(self.rank)
                with self._run.context():
                    output = function(*values[:split], **named)
                wait = inspect.iscoroutinefunction(function) or self.hosts.loop is not None
                if not (wait and inspect.isawaitable(output)):
                    self._finish(output, keep)
            except (Exception, SystemExit) as error:
                self._fail(error)
        if not self.done():
            assert self.hosts.loop is not None
            self.rank.waiting[self] = waiting = self._await(output, keep)
            with self._run.context():
                self.hosts.loop.start(self.rank.here, waiting)

    async def _await(self, output: Any, keep: bool) -> None:
        try:
            self._finish(await output, keep)
        except (Exception, SystemExit) as error:
            self._fail(error)
        except BaseException:
            self.error = CancelledError(f"{self.role}.{self.method}: its group was closed")
            raise
        finally:
            self.rank.waiting.pop(self, None)

    def _finish(self, output: Any, keep: bool) -> None:
        self._run.ended()
        self._package = Package(checked_output(output) if keep else None)

    def _fail(self, error: BaseException) -> None:
        self._run.ended()
        self.error = self.rank.failure(self.role, self.method, error)
        if isinstance(error, SystemExit) and isinstance(self.error, WorkerDiedError):
            self.hosts.died(self.error)


@dataclass(frozen=True)
class Arguments:
    """How a method takes its arguments.

    `materialize`: the batch for a future. `reads_only`: in memory that ranks share. It is a copy
    all the same: a worker that keeps it must not see what its sender writes later.
    """

    materialize: bool
    reads_only: bool

    def read(self, packages: Sequence[Package]) -> list[Any]:
        """The arguments as one rank's method gets them."""
        if not self.reads_only or "protocol.wire" not in sys.modules:
            return [self._arrived(package) for package in packages]
        from protocol.wire import read_as

        with read_as("view"):
            return [self._arrived(package) for package in packages]

    def _arrived(self, package: Package) -> Any:
        opened = package.open()
        if isinstance(opened, InlineReference):
            return opened.result()
        return opened.get() if self.materialize and is_future(opened) else opened


def send(
    hosts: InlineHosts,
    role: str,
    method: str,
    calls: Sequence[Call | None],
    answers: Sequence[int],
    arguments: Arguments,
    timeout_s: float | None,
) -> InlinePending:
    """The call, to be run on its ranks, one after another.

    Raises:
        TypeError, pickle.PicklingError: an argument cannot be sent.
    """
    values = [call.values() if call else () for call in calls]
    receivers: dict[int, int] = {}
    for value in chain.from_iterable(values):
        receivers[id(value)] = receivers.get(id(value), 0) + 1
    packages: dict[int, Package] = {}
    references: dict[int, InlineReference] = {}
    starts = []
    for rank, call in enumerate(calls):
        if call is None:
            continue
        for value in values[rank]:
            if id(value) not in packages:
                packages[id(value)] = Package(value, receivers[id(value)])
        references[rank] = InlineReference(hosts, hosts.ranks[rank], role, method)
        args = [packages[id(v)] for v in values[rank]]
        keep = rank in answers
        starts.append(partial(references[rank].run, args, tuple(call.kwargs), arguments, keep))
    return InlinePending(
        hosts, list(references.values()), [references[rank] for rank in answers], timeout_s, starts
    )


class InlinePending(Pending):
    """A call that has run once it is sent, but for what `async def` methods still wait for.

    A deadline counts only for those: what has returned came in time.
    """

    def __init__(
        self,
        hosts: InlineHosts,
        references: Sequence[InlineReference],
        answers: Sequence[InlineReference],
        timeout_s: float | None,
        starts: Sequence[Callable[[Noted], None]] = (),
    ) -> None:
        self._hosts, self._references, self._answers = hosts, references, answers
        self._timeout_s, self._starts = timeout_s, starts

    def run_here(self, record: CallRecord) -> None:
        starts, self._starts = self._starts, ()  # which hold the arguments
        with record.span("wait"):
            noted = traced(self._hosts, record)
            for start in starts:
                start(noted)

    def wait(self, timeout_s: float | None) -> list[Any]:
        self._hosts.check_current()
        limit = self._limit(timeout_s)
        if not self.done():
            assert self._hosts.loop is not None
            with waiting(self._standing):
                self._hosts.loop.turn(self.done, limit)
        self._check_time(limit, given_up=timeout_s is None)
        errors = [r.error for r in self._references if r.error is not None]
        if errors:
            first = min(errors, key=_order)
            if isinstance(first, WorkerError):
                first.failed_ranks = len(errors)
            raise first
        return [reference.result() for reference in self._answers]

    async def arrive(self) -> bool:
        self._hosts.check_current()
        limit = self._limit(None)
        if not self.done():
            assert self._hosts.loop is not None
            with waiting(self._standing):
                await self._hosts.loop.turned(self.done, limit)
        self._check_time(limit, given_up=True)
        return True

    def _standing(self) -> str:
        late = [r.rank.context.rank for r in self._references if not r.done()]
        first = self._references[0]
        return f"{first.role}.{first.method}: waiting for ranks {late}"

    def _limit(self, timeout_s: float | None) -> float | None:
        limit = self._timeout_s if timeout_s is None else timeout_s
        return None if limit is None or math.isinf(limit) else limit

    def _check_time(self, limit: float | None, given_up: bool) -> None:
        """Raise CallTimeoutError where ranks have not finished."""
        late = [r for r in self._references if not r.done()]
        if not late:
            return
        stacks = {r.rank.context.rank: r.rank.stack() for r in late}
        ranks = list(stacks)
        if given_up:
            self._hosts.give_up({r.rank.context.rank: r.done for r in late}, limit or 0)
        raise CallTimeoutError(
            f"{late[0].role}.{late[0].method}: ranks {ranks} of {len(self._hosts.ranks)} had "
            f"not finished after {limit:g} s",
            ranks,
            stacks,
        )

    def done(self) -> bool:
        return all(reference.done() for reference in self._references)

    def cancel(self) -> bool:
        return False

    def handles(self, batched: bool) -> list[Any]:
        if not batched:
            return list(self._answers)
        return [LocalBatch(reference, tuple(self._references)) for reference in self._answers]


def _order(error: Exception) -> tuple[bool, float]:
    """A death first, then by time: others may have failed because of it."""
    return not isinstance(error, WorkerDiedError), getattr(error, "when", math.inf)


@dataclass(frozen=True)
class LocalBatch(Handle):
    """A batch that a rank returned: a `protocol.future.Source`. It counts only if its `peers`,
    which ran the same call, succeed.
    """

    reference: InlineReference
    peers: tuple[InlineReference, ...]

    @property
    def title(self) -> str:
        """The method that makes it, for messages."""
        return f"{self.reference.role}.{self.reference.method}"

    def rows(self, timeout: float | None = None) -> int:
        """How many rows the batch has. Waits, at most `timeout` seconds, for an async method."""
        from protocol.batches import batch_rows
        from protocol.wire import read_as

        with read_as("view"):
            return batch_rows(self._batch(timeout))

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        """Rows `start` to `stop` of the batch."""
        from protocol.batches import lend_rows
        from protocol.wire import read_as, reading

        if start <= 0 and stop >= self.rows(timeout):
            return self._batch(timeout)
        how = reading()
        with read_as("join" if how == "own" else how):
            batch = self._batch(timeout)
        return lend_rows(batch, start, stop)

    async def arrive(self, whole: bool) -> bool:
        """Wait on the running event loop for an async method."""
        return await InlinePending(self.reference.hosts, self.peers, [], None).arrive()

    def _batch(self, timeout: float | None) -> Any:
        from protocol.batches import is_batch

        reference = self.reference
        InlinePending(reference.hosts, self.peers, [], None).wait(timeout)
        output = reference.result()
        if not is_batch(output):
            raise reference.rank.failure(
                reference.role,
                reference.method,
                TypeError(NO_BATCH.format(role=reference.role, method=reference.method)),
            )
        return output
