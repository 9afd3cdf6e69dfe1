"""InlineWorkerGroup: a role's ranks as objects of this process, called as on Ray.

What a rank would have of its own in a process of its own is left to `world`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import pickle
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from traceback import walk_stack
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from single_controller.base.explain import RankState
from single_controller.base.hosts import Generation, Hosts, allowed_restarts
from single_controller.base.message import (
    ONLY_PASSED,
    READ_BEFORE,
    Message,
    Outbox,
    Outgoing,
    Packing,
    checked_output,
    checked_pair,
    held,
    packed,
)
from single_controller.base.method import Pending, Request
from single_controller.base.plan import Call, Handle, ResourcePool, origins
from single_controller.base.roles import (
    ClassWithInitArgs,
    Colocate,
    ColocatedClasses,
    FusedWorker,
    W,
    build_roles,
    create_fused_worker_cls,
    has_async_method,
    restore_hooks,
)
from single_controller.base.trace import CallMark, Event, mark, now_ns, running
from single_controller.base.worker import (
    NO_BATCH,
    Rendezvous,
    Worker,
    WorkerContext,
    coroutine_stacks,
    exit_code,
    own_frames,
    own_traceback,
)
from single_controller.base.worker_group import WorkerGroup
from single_controller.device import CPU, DeviceKind, Turns, device_kind
from single_controller.errors import (
    CallTimeoutError,
    GroupBrokenError,
    RegistrationError,
    SendError,
    WorkerDiedError,
    WorkerError,
)
from single_controller.inline.world import RankLoop, RankWorld, one_at_a_time, wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

    from protocol import DataProtoFuture
    from protocol.batches import Batch

__all__ = [
    "InProcess",
    "InlinePending",
    "InlineReference",
    "InlineWorkerGroup",
    "LocalBatch",
    "LocalValue",
    "Packer",
    "PinnedBatch",
    "Rank",
    "Ranks",
    "colocate",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
    "pin",
]

_logger = logging.getLogger(__name__)

_ADDRESS = "127.0.0.1"
_HIDDEN = (os.path.dirname(__file__), threading.__file__, os.path.dirname(asyncio.__file__))
_NO_ATTACHING = (
    "worker_names, worker_handles and from_detached find running Ray actors; an inline group lives "
    "in this process alone, and has none to attach to"
)
_Read: TypeAlias = "Callable[[], tuple[Sequence[Any], Mapping[str, Any]]]"


class InProcess:
    """What stands for something in this process, and is passed to ranks as it is."""


class Packer(Packing, pickle.Pickler):
    kept = (type, FunctionType, ModuleType, InProcess)


def _copied(message: Message) -> Message:
    """Whoever sends it may write into its memory before it is read."""
    message.buffers = [memoryview(bytes(buffer.raw())) for buffer in message.buffers]
    return message


def _dumps(value: Any) -> bytes:
    """A pickle alone. Only what reads it at once finds the classes that are kept."""
    message = Message.of(value, Packer)
    if message.buffers:
        raise ValueError("it cannot be read without its buffers")
    held.set((message.held, ()))
    return message.data


class Rank:
    """One rank: its workers by role, and where they are."""

    node_ip = _ADDRESS

    def __init__(self, context: WorkerContext, env: Mapping[str, str]) -> None:
        self.context, self.rank, self.pid = context, context.rank, os.getpid()
        name = context.device_name
        self.device = name if name == CPU.name else f"{name}:{context.local_rank}"
        self.world = RankWorld({**env, **context.environment()})
        self.workers: dict[str, Worker] = {}
        self.turns = Turns()
        self.awaited: dict[InlineReference, Any] = {}  # coroutines, by their call
        self.noted: deque[Event] | None = None  # while a trace is on

    def stack(self) -> str:
        """What the rank's code is doing, the innermost frame first."""
        running = sys._current_frames().get(self.world.thread or 0)
        frames = () if running is None else (frame for frame, _ in walk_stack(running))
        waiting = coroutine_stacks([*self.awaited.values()], _HIDDEN) if self.awaited else ""
        return "\n".join(filter(None, [*own_frames(frames, _HIDDEN), waiting])) or "  in no call"

    def failure(self, role: str, error: BaseException, method: str = "__init__") -> Exception:
        """What to raise for `error`, which stays its cause with all its frames, for a debugger."""
        if isinstance(error, WorkerError):
            return error
        where: dict[str, Any] = {
            "role": role,
            "method": method,
            "rank": self.rank,
            "node_ip": self.node_ip,
            "pid": self.pid,
            "remote_traceback": own_traceback(error, _HIDDEN),
            "when": time.time(),
        }
        if isinstance(error, SystemExit):
            wrapped: WorkerError = WorkerDiedError(
                f"{role}.{method}: rank {self.rank} asked for the end of its process by "
                f"sys.exit({error.code!r}), which in an inline group is the driver's",
                **where,
                exit_code=exit_code(error),
            )
        else:
            wrapped = WorkerError.wrap(error, _dumps, **where)
        wrapped.__cause__ = error
        return wrapped

    def close(self) -> None:
        """Let go of the workers and their process groups."""
        self.world.close()
        self.workers.clear()
        self.context.peers.clear()


class Ranks(Generation, InProcess):
    """All ranks of a group, in this process: `infos` are they themselves.

    Raises:
        WorkerError: a role's constructor, or its `restore`, raised. ResourceError: the port is
            taken.
    """

    def __init__(
        self,
        pool: ResourcePool,
        roles: Mapping[str, ClassWithInitArgs],
        env: Mapping[str, str],
        prefix: str = "",
        device_name: str | None = None,
        master_port: int = 0,
        port_range: Sequence[int] | None = None,
        restored: bool = False,
    ) -> None:
        kind = _device(device_name)
        rendezvous = Rendezvous(_ADDRESS, master_port, port_range)  # no other group gets the port
        contexts = _contexts(pool, kind, rendezvous.port, prefix)
        ranks = [Rank(context, env) for context in contexts]
        super().__init__(ranks, tuple(roles), (_ADDRESS, rendezvous.port))
        self.loop = RankLoop() if has_async_method(roles) else None
        # Calls whose deadline has passed, which was so many seconds.
        self.given_up: list[tuple[InlineReference, float]] = []
        self._deaths: list[WorkerDiedError] = []
        self._drop = weakref.finalize(self, _dropped, rendezvous, self.loop)
        try:
            for rank in ranks:
                with rank.world.here():
                    built = build_roles(rank.context, roles, rank.turns, rank.failure)
                    rank.workers.update(built)
            for rank, role in [(r, role) for r in ranks for role, _ in restore_hooks(r.workers)]:
                if restored:
                    restoring = InlineReference(self, rank, role, "restore")
                    restoring.run(lambda: ([], {}))
                    restoring.get()
        except BaseException:
            self.end("the group did not start")
            raise

    def find_dead(self) -> WorkerDiedError | None:
        if not self._deaths:
            return None
        _logger.error("%s", self.broken)
        return self._deaths[0]

    def died(self, error: WorkerDiedError) -> None:
        """A rank asked for the end of its process: the group takes no more calls."""
        self._deaths.append(error)
        if self.broken is None:
            self.broken = f"the group lost a rank: {error.args[0]}"

    def look(self) -> None:
        self.given_up = [(call, after) for call, after in self.given_up if not call.done()]
        if self.given_up:
            ranks, after = sorted({c.rank.rank for c, _ in self.given_up}), self.given_up[0][1]
            raise GroupBrokenError(
                f"ranks {ranks} are still in a call that was given up after {after:g} s"
            )

    def states(self) -> list[RankState]:
        dead = {error.rank for error in self._deaths}
        lives: RankState = "broken" if self.broken else "alive"
        return ["dead" if self.ended or at.rank in dead else lives for at in self.infos]

    def stacks(self) -> dict[int, str]:
        return {rank.rank: rank.stack() for rank in self.infos}

    def harvest(self) -> tuple[dict[str, tuple[int, Sequence[Event]]], list[str]]:
        """What each rank noted for a trace, as if it were a process of its own."""
        roles, found = "+".join(self.roles), dict[str, tuple[int, Sequence[Event]]]()
        for at in self.infos:
            found[f"{roles} rank {at.rank} on {at.node_ip}"] = now_ns(), tuple(at.noted or ())
            at.noted = None
        return found, []

    def end(self, why: str) -> None:
        self.ended = self.ended or why
        if self.loop is not None:
            self.loop.close()
        with one_at_a_time:
            for rank in self.infos:
                for call in [*rank.awaited]:  # which do not heed that they are cancelled
                    call.raised(asyncio.CancelledError())
                rank.close()
        self._drop()


def _dropped(rendezvous: Rendezvous, loop: RankLoop | None) -> None:
    if loop is not None:
        loop.stop()
    rendezvous.close()


def _device(name: str | None) -> DeviceKind:
    """By default what torch sees, if it is there to be asked: it takes seconds to import."""
    return CPU if name is None and "torch" not in sys.modules else device_kind(name)


def _contexts(
    pool: ResourcePool, kind: DeviceKind, port: int, prefix: str
) -> Iterator[WorkerContext]:
    devices = 0
    if kind is not CPU:
        import torch

        devices = getattr(torch, kind.name).device_count()
    places = zip(pool.local_rank_list(), pool.local_world_size_list(), strict=True)
    for rank, (node_rank, on_node) in enumerate(places):
        yield WorkerContext(
            rank=rank,
            world_size=pool.world_size,
            local_rank=node_rank % devices if devices else node_rank,
            local_world_size=on_node,
            node_rank=node_rank,
            master_addr=_ADDRESS,
            master_port=port,
            device_name=kind.name,
            prefix=prefix,
            backend="inline",
        )


class InlineReference(InProcess):
    """What one rank returns from a call, for whoever asks: each gets a copy of its own."""

    def __init__(self, hosts: Ranks, rank: Rank, role: str, method: str) -> None:
        self.hosts, self.rank, self.role, self.method = hosts, rank, role, method
        self.title = f"{role}.{method}"
        self.output: Message | None = None
        self.error: Exception | None = None
        self.ends: Future[None] | None = None  # that of an async method
        self.pairs = self.passed = False  # whether it yields them, and a call has read those
        self._task: object = None  # which asyncio would forget

    def done(self) -> bool:
        """Whether the method has returned or raised."""
        return self.output is not None or self.error is not None

    def get(self, timeout: float | None = None) -> Any:
        """What the method returned. Waits, at most `timeout` seconds, for an async one.

        Raises:
            WorkerError: the method raised. CallTimeoutError: it was not done in time.
        """
        return InlinePending(self.hosts, [self], [self]).wait(timeout)[0]

    def run(self, read: _Read, keep: bool = False, mark: CallMark | None = None) -> None:
        """Run the method on its rank with the arguments that are read there, an async one to where
        it first waits. Without `keep`, what it returns does not count.
        """
        rank, loop, coroutine = self.rank, self.hosts.loop, None
        with rank.world.here():
            try:
                function, began = getattr(rank.workers[self.role], self.method), now_ns()
                args, kwargs = read()
                if mark is not None and rank.noted is None:
                    rank.noted = deque(maxlen=mark.capacity)
                noted = running(mark, self.title, (began, now_ns()), rank.noted)
                rank.turns.take(self.role)
                is_async = loop is not None and inspect.iscoroutinefunction(function)
                with nullcontext() if is_async else noted:
                    output = function(*args, **kwargs)
                if loop is not None and inspect.isawaitable(output):
                    coroutine = self._await(output, noted if is_async else nullcontext(), keep)
                    self.ends, rank.awaited[self] = Future(), coroutine
                    self.ends.set_running_or_notify_cancel()  # who waits no longer cancels nothing
                else:
                    self._returned(output, keep)
            except (Exception, SystemExit) as error:
                self.raised(error)
        if loop is not None and coroutine is not None:
            self._task = loop.start(rank.world, coroutine)

    async def _await(self, output: Any, noted: AbstractContextManager[None], keep: bool) -> None:
        try:
            with noted:
                output = await output
            self._returned(output, keep)
        except BaseException as error:
            self.raised(error)

    def _returned(self, output: Any, keep: bool) -> None:
        output = checked_output(output, self.pairs)
        if self.pairs:
            output = [(name, x.detach().clone()) for name, x in map(checked_pair, output)]
        self.output = _copied(Message.of(output if keep else None, Packer))
        self._end()

    def raised(self, error: BaseException) -> None:
        """Note why there is no output."""
        if isinstance(error, asyncio.CancelledError) and self.hosts.ended:
            self.error = GroupBrokenError(self.hosts.ended)
        else:
            self.error = self.rank.failure(self.role, error, self.method)
        if isinstance(error, SystemExit) and isinstance(self.error, WorkerDiedError):
            self.hosts.died(self.error)
        self._end()

    def _end(self) -> None:
        if self.ends is not None and not self.ends.done():
            del self.rank.awaited[self]
            self.ends.set_result(None)


class InlinePending(Pending):
    """A call that has run, but for what `async def` methods still wait for.

    A deadline counts only for those: what has returned came in time. `answers` are those of its
    `calls` whose outputs count.
    """

    def __init__(
        self,
        hosts: Ranks,
        calls: Sequence[InlineReference],
        answers: Sequence[InlineReference],
        request: Request | None = None,
    ) -> None:
        self._hosts, self.calls, self._answers = hosts, calls, answers
        self._timeout_s = None if request is None else request.timeout_s
        self._deferred = request is not None and request.deferred
        if request is not None:
            self.record = request.record

    def wait(self, timeout_s: float | None) -> list[Any]:
        limit = self._timeout_s if timeout_s is None else timeout_s
        if not self.done():
            if self._hosts.loop is not None and self._hosts.loop.runs_here:
                raise RuntimeError(
                    "an async method waits for an async method of its own inline group, which "
                    "cannot go on meanwhile: await the other worker's method itself"
                )
            wait_until(self.done, limit)
        self._check(limit, given_up=timeout_s is None)
        return [call.output.read() for call in self._answers if call.output is not None]

    async def arrive(self) -> bool:
        if not self.done():
            ends = [asyncio.wrap_future(call.ends) for call in self.calls if call.ends is not None]
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*ends), self._timeout_s)
        self._check(self._timeout_s, given_up=True)
        return True

    def _check(self, limit: float | None, given_up: bool) -> None:
        """Raise what went wrong: ranks are late, or one failed."""
        self._hosts.check_current()
        if late := [call for call in self.calls if not call.done()]:
            stacks = {call.rank.rank: call.rank.stack() for call in late}
            if given_up:
                self._hosts.given_up += [(call, limit or 0) for call in late]
            raise CallTimeoutError(
                f"{late[0].title}: ranks {[*stacks]} of {len(self._hosts.infos)} had not finished "
                f"after {limit:g} s",
                [*stacks],
                stacks,
            )
        errors = [call.error for call in self.calls if call.error is not None]
        if errors:
            first = min(errors, key=_order)
            if isinstance(first, WorkerError):
                first.failed_ranks = len(errors)
            raise first

    def done(self) -> bool:
        return all(call.done() for call in self.calls)

    def cancel(self) -> bool:
        return False

    def handles(self, batched: bool) -> list[Any]:
        if not self._deferred:
            return [*self._answers]
        if batched:
            return [LocalBatch(self, reference) for reference in self._answers]
        return [Handle(LocalValue(self, reference)) for reference in self._answers]


def _order(error: Exception) -> tuple[bool, float]:
    """A death first, then by time: others may have failed because of it."""
    return not isinstance(error, WorkerDiedError), getattr(error, "when", math.inf)


class _Rows(InProcess):
    """A batch that stays here: a `protocol.future.Source`."""

    def _batch(self, timeout: float | None) -> Any:
        """The batch, as the reader asked (`protocol.wire.read_as`)."""
        raise NotImplementedError

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


@dataclass(frozen=True)
class LocalBatch(_Rows):
    """A batch that a rank returned. It counts only if the others of its call succeed."""

    pending: InlinePending
    reference: InlineReference

    @property
    def title(self) -> str:
        """The method that makes it, for messages."""
        return self.reference.title

    @property
    def rank(self) -> int:
        return self.reference.rank.rank

    def done(self) -> bool:
        """Whether its rank has finished."""
        return self.reference.done()

    async def arrive(self, whole: bool) -> bool:
        """Wait on the running event loop for an async method."""
        return await self.pending.arrive()

    def _output(self, timeout: float | None) -> Any:
        made = self.reference
        return InlinePending(made.hosts, self.pending.calls, [made]).wait(timeout)[0]

    def _batch(self, timeout: float | None) -> Any:
        from protocol.batches import is_batch

        made, output = self.reference, self._output(timeout)
        if not is_batch(output):
            error = TypeError(NO_BATCH.format(role=made.role, method=made.method))
            raise made.rank.failure(made.role, error, made.method)
        return output


class LocalValue(LocalBatch):
    """What a rank returned, of any kind."""

    def rows(self, timeout: float | None = None) -> int:
        InlinePending(self.reference.hosts, self.pending.calls, []).wait(timeout)
        return 1

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        made, output = self.reference, self._output(timeout)
        if made.pairs and not made.passed:
            raise TypeError(ONLY_PASSED.format(made.title))
        return iter(output) if made.pairs else output


@dataclass(frozen=True)
class PinnedBatch(_Rows):
    """A batch in memory of its own."""

    message: Message

    def _batch(self, timeout: float | None) -> Any:
        return self.message.read()


def pin(data: Batch) -> DataProtoFuture:
    """The batch as it is now, as a future that is done: what is written into `data` later does not
    show, and methods that are `reads_only` share its memory.

    Raises:
        BatchTypeError: neither a DataProto nor a TensorDict.
    """
    from protocol import BatchTypeError, DataProto, DataProtoFuture
    from protocol.batches import is_batch

    if not is_batch(data):
        raise BatchTypeError(f"data must be a DataProto or TensorDict; got {type(data).__name__}")
    pinned = PinnedBatch(_copied(packed(data, Packer)))
    return DataProtoFuture([pinned], isinstance(data, DataProto) and data.is_padding_enabled())


class InlineWorkerGroup(WorkerGroup[W]):
    """A role's ranks in the driver's own process, for debuggers and unit tests.

    It takes what `RayWorkerGroup` takes and does what that does, without Ray: ranks run one after
    another, in the thread that calls, so `breakpoint()` in a worker's method works; coroutines of
    `async def` methods go on in a thread beside it. What a rank gets and returns is copied as
    between processes; classes and functions are passed as they are. `torch.distributed` works with
    one rank; with more, meshes can be built, and a collective raises CollectiveError. Ctrl-C
    interrupts the driver.

    Args:
        resource_pool: how many ranks on how many nodes, which all are this one; None: one rank.
        ray_cls_with_init: what they hold.
        name_prefix: the workers' WG_PREFIX.
        use_gpu: False is `device_name="cpu"`.
        device_name: "cuda", "cpu", …: by default what torch sees, where torch is loaded already.
        worker_env: environment variables for all ranks, there while their code runs.
        master_port, master_port_range: the workers' MASTER_PORT; nobody listens there.
        call_timeout_s: how long an `async def` method may take; others end when they end.
        on_failure, max_restarts: as on Ray; what breaks a group is a rank that exits.
        bin_pack, detached, ray_wait_register_center_timeout, master_addr, startup_timeout_s:
            without meaning here, and taken so that a program can be switched.
        worker_names, worker_handles: refused, there being nothing to attach to.

    Raises:
        RegistrationError: a class cannot be used as a worker, or not with these arguments.
        WorkerError: a constructor raised; it names role and rank.
        ResourceError: `master_port` is taken.
    """

    _packer = Packer
    _pending: type[InlinePending] = InlinePending

    def __init__(
        self,
        resource_pool: ResourcePool | None = None,
        ray_cls_with_init: ClassWithInitArgs[W] | None = None,
        bin_pack: bool = True,
        name_prefix: str | None = None,
        detached: bool = False,
        worker_names: Sequence[str] | None = None,
        worker_handles: Sequence[Any] | None = None,
        ray_wait_register_center_timeout: float | None = None,
        *,
        use_gpu: bool | None = None,
        device_name: str | None = None,
        worker_env: Mapping[str, str] | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        master_port_range: Sequence[int] | None = None,
        startup_timeout_s: float = 600,
        call_timeout_s: float | None = None,
        on_failure: str = "raise",
        max_restarts: int = 3,
    ) -> None:
        super().__init__(resource_pool)
        startup_timeout_s = ray_wait_register_center_timeout or startup_timeout_s
        self._check_options(name_prefix, worker_env, startup_timeout_s, call_timeout_s)
        allowed = allowed_restarts(on_failure, max_restarts)
        if worker_names or worker_handles:
            raise ValueError(_NO_ATTACHING)
        if not isinstance(ray_cls_with_init, ClassWithInitArgs):
            raise RegistrationError(
                "ray_cls_with_init must say what to start, as ClassWithInitArgs(cls, ...) or "
                f"create_colocated_worker_cls(...); got {ray_cls_with_init!r}"
            )
        pool = ResourcePool([1]) if resource_pool is None else resource_pool
        if not isinstance(pool, ResourcePool):
            raise TypeError(f"resource_pool must be a ResourcePool, or None; got {pool!r}")
        if not pool.world_size:
            raise ValueError("process_on_nodes must name the processes of at least one node")
        roles = ray_cls_with_init.roles()
        start = partial(
            Ranks,
            pool,
            roles,
            dict(worker_env or {}),
            name_prefix or "",
            CPU.name if use_gpu is False else device_name,
            master_port or 0,
            master_port_range,
        )
        self._take(Hosts(start(), partial(start, restored=True), allowed), ray_cls_with_init)

    @classmethod
    def from_detached(cls, *_: Any, **__: Any) -> Self:
        """Refused: an inline group ends with its driver.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_ATTACHING)

    @property
    def workers(self) -> list[W]:
        """The role's workers by rank: the very objects, to look at. For the hosts of several
        roles, a dict of them by role.
        """
        ranks = self._hosts.now.infos
        workers: list[Any] = [r.workers[self.role] if self.role else {**r.workers} for r in ranks]
        return workers

    @property
    def worker_names(self) -> list[str]:
        """As on Ray, a name for each rank."""
        hosts = self._hosts.now
        return [f"{at.context.prefix}{'_'.join(hosts.roles)}_0:{at.rank}" for at in hosts.infos]

    def _submit(self, hosts: Ranks, request: Request, calls: Sequence[Call | None]) -> Pending:
        hosts.check_current()
        by_rank = Outbox(calls, Packer, lambda message, ranks: _copied(message)).by_rank
        different = {id(out): out for out in by_rank if out is not None}
        for one in origins([late for out in different.values() for late in out.futures]):
            if isinstance(one, LocalValue) and one.reference.pairs:
                if one.reference.passed:
                    raise SendError(READ_BEFORE.format(one.title, one.rank))
                one.reference.passed = True
        sent = {key: _reader(out, request) for key, out in different.items()}
        made = {
            rank: InlineReference(hosts, hosts.infos[rank], request.role, request.method)
            for rank, out in enumerate(by_rank)
            if out is not None
        }
        for reference in made.values():
            reference.pairs = request.bucket_bytes is not None and request.deferred
        marked = mark(request.record.number, hosts)
        with request.record.span("wait"):
            for rank, call in made.items():
                call.run(sent[id(by_rank[rank])], rank in request.answers, marked)
        answers = [made[rank] for rank in request.answers]
        return self._pending(hosts, [*made.values()], answers, request)


def _reader(out: Outgoing, request: Request) -> _Read:
    """What reads a call's arguments, for each rank that is called so."""
    message = _copied(out.message)
    futures = packed(out.futures, Packer) if out.futures else None
    shared: Callable[[], AbstractContextManager[None]] = nullcontext
    if request.reads_only:
        from protocol.wire import read_as

        shared = partial(read_as, "view")

    def fetched(value: Any) -> Any:
        return value.get() if isinstance(value, InlineReference) else value

    def read() -> tuple[Sequence[Any], Mapping[str, Any]]:
        with shared():
            parts = [part.read() for part in out.parts]
            late: list[Any] = [] if futures is None else futures.read()
            values = [one.get() for one in late] if request.materialize else late
            args, kwargs = message.read(values, parts)
            return [*map(fetched, args)], {name: fetched(value) for name, value in kwargs.items()}

    return read


def create_colocated_worker_cls(class_dict: Mapping[str, ClassWithInitArgs]) -> ColocatedClasses:
    """What to start so that each rank holds all roles; `spawn` gives their groups.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    return ColocatedClasses(class_dict)


def create_colocated_worker_raw_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    return create_fused_worker_cls(ColocatedClasses(class_dict))


def create_colocated_worker_cls_fused(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> ClassWithInitArgs:
    """As `create_colocated_worker_cls`, with a `FusedWorker` beside the roles.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    return ClassWithInitArgs(create_colocated_worker_raw_cls(class_dict))


colocate = Colocate(InlineWorkerGroup, create_colocated_worker_cls)
"""Every role on each rank of the pool, by default on one rank, in this process: see `Colocate`."""
