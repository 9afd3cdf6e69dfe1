"""InlineWorkerGroup: a role's ranks as objects of this process, called as on Ray.

What a rank would have of its own in a process of its own is left to `world`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from single_controller.base.explain import RankState
from single_controller.base.hosts import Generation, Hosts, allowed_restarts
from single_controller.base.message import (
    RESULT_GONE,
    Message,
    Outbox,
    Outgoing,
    Packing,
    checked_output,
    checked_pair,
    held,
    packed,
    read_rows,
)
from single_controller.base.method import Pending, Request
from single_controller.base.plan import Call, Handle, ResourcePool
from single_controller.base.roles import (
    ClassWithInitArgs,
    Colocate,
    ColocatedClasses,
    FusedWorker,
    W,
    build_roles,
    create_fused_worker_cls,
    restore_hooks,
)
from single_controller.base.trace import Recorder
from single_controller.base.worker import (
    NO_BATCH,
    Rendezvous,
    Worker,
    WorkerContext,
    coroutine_stacks,
    exit_code,
    own_traceback,
)
from single_controller.base.worker_group import WorkerGroup
from single_controller.device import CPU, DeviceKind, Turns, device_kind
from single_controller.errors import (
    CallTimeoutError,
    GroupBrokenError,
    RegistrationError,
    WorkerDiedError,
    WorkerError,
)
from single_controller.inline.world import (
    RankWorld,
    in_event_loop,
    one_at_a_time,
    wait_for_first_step,
    wait_until,
)

if TYPE_CHECKING:
    from protocol import DataProtoFuture
    from protocol.batches import Batch

__all__ = [
    "InlinePending",
    "InlineReference",
    "InlineWorkerGroup",
    "Ranks",
    "colocate",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
    "pin",
]

_ADDRESS = "127.0.0.1"
_HIDDEN = (os.path.dirname(__file__), os.path.dirname(asyncio.__file__))
_POLL_S = 0.005
_Arguments: TypeAlias = "tuple[Sequence[Any], Mapping[str, Any]]"


class _InProcess:
    """What stands for something in this process, and is passed to ranks as it is."""


class _Packer(Packing, pickle.Pickler):
    kept = (type, FunctionType, ModuleType, _InProcess)


def _dumps(value: Any) -> bytes:
    """A pickle alone. Only what reads it at once finds the classes that are kept."""
    message = Message.of(value, _Packer)
    if message.buffers:
        raise ValueError("it cannot be read without its buffers")
    held.set((message.held, ()))
    return message.data


class _Rank(RankWorld):
    """One rank: its workers by role, and where they are."""

    node_ip = _ADDRESS

    def __init__(self, context: WorkerContext, env: Mapping[str, str]) -> None:
        super().__init__({**env, **context.environment()})
        self.context, self.rank, self.pid = context, context.rank, os.getpid()
        name = context.device_name
        self.device = name if name == CPU.name else f"{name}:{context.local_rank}"
        self.workers: dict[str, Worker] = {}
        self.turns = Turns()
        # What it awaits in calls, and by what that is cancelled.
        self.awaited: dict[InlinePending, tuple[Any, Future[None]]] = {}

    def stack(self) -> str:
        """What its `async def` methods wait for, the innermost frame first."""
        awaited = [coroutine for coroutine, _ in self.awaited.values()]
        return coroutine_stacks(awaited, _HIDDEN) or "  in no call"

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
        super().close()
        self.workers.clear()
        self.context.peers.clear()


class Ranks(Generation, _InProcess):
    """All ranks of a group, in this process: `infos` are they themselves.

    Raises:
        WorkerError: a role's constructor, or its `restore`, raised.
    """

    def __init__(
        self,
        contexts: Callable[[], Iterator[WorkerContext]],
        roles: Mapping[str, ClassWithInitArgs],
        env: Mapping[str, str],
        restored: bool = False,
    ) -> None:
        ranks = [_Rank(context, env) for context in contexts()]
        super().__init__(ranks, tuple(roles), (_ADDRESS, ranks[0].context.master_port))
        self._dead: dict[int, WorkerDiedError] = {}
        try:
            for rank in ranks:
                with rank.here():
                    built = build_roles(rank.context, roles, rank.turns, rank.failure)
                    rank.workers.update(built)
            hooks = [(rank, role) for rank in ranks for role, _ in restore_hooks(rank.workers)]
            for rank, role in hooks if restored else ():
                request = Request(role, "restore", (rank.rank,), Recorder().call(role, "restore"))
                restore = InlinePending(self, request)
                restore.run(rank, lambda: ([], {}))
                restore.wait(None)
        except BaseException:
            self.end("the group did not start")
            raise

    def find_dead(self) -> WorkerDiedError | None:
        return next(iter(self._dead.values()), None)

    def died(self, error: WorkerDiedError) -> None:
        """A rank asked for the end of its process: the group takes no more calls."""
        self._dead[error.rank] = error
        self.broken = self.broken or f"the group lost a rank: {error.args[0]}"

    def look(self) -> None:
        """A call that is late waits for something, and is in nobody's way."""

    def states(self) -> list[RankState]:
        lives: RankState = "broken" if self.broken else "alive"
        return ["dead" if self.ended or at.rank in self._dead else lives for at in self.infos]

    def stacks(self) -> dict[int, str]:
        return {rank.rank: rank.stack() for rank in self.infos}

    def end(self, why: str) -> None:
        self.ended = self.ended or why
        with one_at_a_time:
            for rank in self.infos:
                for call in [*rank.awaited]:
                    call.drop(rank, self.ended)
                rank.close()
            one_at_a_time.notify_all()


def _contexts(
    pool: ResourcePool, kind: DeviceKind, port: int, prefix: str
) -> Iterator[WorkerContext]:
    devices = pool.world_size
    if kind is not CPU:
        import torch

        devices = getattr(torch, kind.name).device_count() or devices
    places = zip(pool.local_rank_list(), pool.local_world_size_list(), strict=True)
    for rank, (node_rank, on_node) in enumerate(places):
        yield WorkerContext(
            rank=rank,
            world_size=pool.world_size,
            local_rank=node_rank % devices,
            local_world_size=on_node,
            node_rank=node_rank,
            master_addr=_ADDRESS,
            master_port=port,
            device_name=kind.name,
            prefix=prefix,
            backend="inline",
            node_ip=_ADDRESS,
        )


class InlinePending(Pending):
    """A call. It has run, but for what `async def` methods still wait for: a deadline counts for
    those alone.
    """

    def __init__(self, hosts: Ranks, request: Request) -> None:
        self.hosts, self.request, self.record = hosts, request, request.record
        self.pairs = request.bucket_bytes is not None and request.deferred
        self.running = set[int]()
        self.outputs: dict[int, Message] = {}
        self.errors: dict[int, Exception] = {}

    def run(self, rank: _Rank, arguments: Callable[[], _Arguments]) -> None:
        """Run the method on a rank with the arguments that are read there, an async one to where it
        first waits.
        """
        request = self.request
        self.running.add(rank.rank)
        with rank.here():
            try:
                args, kwargs = arguments()
                rank.turns.take(request.role)
                output = getattr(rank.workers[request.role], request.method)(*args, **kwargs)
                if inspect.isawaitable(output):
                    coroutine = self._await(rank, output)
                    rank.awaited[self] = coroutine, rank.start(coroutine)
                    wait_for_first_step(coroutine)
                else:
                    self._returned(rank, output)
            except (Exception, SystemExit) as error:
                self._raised(rank, error)

    async def _await(self, rank: _Rank, output: Any) -> None:
        try:
            self._returned(rank, await output)
        except BaseException as error:
            self._raised(rank, error)

    def _returned(self, rank: _Rank, output: Any) -> None:
        request, answers = self.request, rank.rank in self.request.answers
        output = checked_output(output, self.pairs)
        if self.pairs:
            with contextlib.closing(output):
                output = [(name, x.detach().clone()) for name, x in map(checked_pair, output)]
        elif request.deferred and not request.opens and answers:
            _check_batch(output, request)
        output = output if answers else None
        self.outputs[rank.rank] = Message.of(output, _Packer).copied()
        self._finished(rank)

    def _raised(self, rank: _Rank, error: BaseException) -> None:
        if rank.rank in self.running:  # or the group has ended
            request = self.request
            failure: Any = rank.failure(request.role, error, request.method)
            self.errors[rank.rank] = failure
            if isinstance(error, SystemExit):
                self.hosts.died(failure)
            self._finished(rank)

    def _finished(self, rank: _Rank) -> None:
        self.running.discard(rank.rank)
        rank.awaited.pop(self, None)

    def drop(self, rank: _Rank, why: str) -> None:
        """Cancel an async method, and wait for it no more: its group ends."""
        rank.awaited[self][1].cancel()
        self.errors[rank.rank] = GroupBrokenError(why)
        self._finished(rank)

    def wait(self, timeout_s: float | None) -> list[Any]:
        self.finish(timeout_s)
        return [self.outputs[rank].read() for rank in self.request.answers]

    def finish(self, limit: float | None) -> None:
        """Wait for all ranks, as long as the call may take unless told; raise what went wrong."""
        limit = self.request.timeout_s if limit is None else limit
        if not self.done():
            if in_event_loop():
                raise RuntimeError(
                    "an async method waits for an async method of an inline group, which cannot go "
                    "on meanwhile: await what `submit` returns"
                )
            wait_until(self.done, limit)
        self._check(limit)

    def _check(self, limit: float | None) -> None:
        self.hosts.check_current()
        if self.running:
            stacks = {rank: self.hosts.infos[rank].stack() for rank in sorted(self.running)}
            raise CallTimeoutError(
                f"{self.request.title}: ranks {[*stacks]} of {len(self.hosts.infos)} had not "
                f"finished after {limit:g} s",
                [*stacks],
                stacks,
            )
        if self.errors:
            first = min(self.errors.values(), key=lambda error: getattr(error, "when", math.inf))
            if isinstance(first, WorkerError):
                first.failed_ranks = len(self.errors)
            raise first

    async def arrive(self) -> bool:
        limit = math.inf if self.request.timeout_s is None else self.request.timeout_s
        end = time.monotonic() + limit
        while not self.done() and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        self._check(limit)
        return True

    def done(self) -> bool:
        return not self.running

    def cancel(self) -> bool:
        return False

    def handles(self, batched: bool) -> list[Any]:
        made = [InlineReference(self, rank, batched) for rank in self.request.answers]
        return [*map(Handle, made)] if self.request.deferred and not batched else made


@dataclass(frozen=True)
class InlineReference(_InProcess):
    """What one rank of a call returns, for whoever asks: each gets a copy of its own. It counts
    only if the other ranks succeed. As `batched` it is a `protocol.future.Source`.
    """

    pending: InlinePending
    rank: int
    batched: bool = False

    @property
    def title(self) -> str:
        """The method that makes it, for messages."""
        return self.pending.request.title

    def done(self) -> bool:
        """Whether all ranks of the call have returned or raised."""
        return self.pending.done()

    async def arrive(self, whole: bool) -> bool:
        """Wait on the running event loop for an async method."""
        return await self.pending.arrive()

    def get(self, timeout: float | None = None) -> Any:
        """What the method returned. Waits, at most `timeout` seconds, for an async one.

        Raises:
            WorkerError: the method raised. CallTimeoutError: it was not done in time.
        """
        return self.fetch(0, 1, timeout)

    def _finish(self, timeout: float | None) -> None:
        self.pending.finish(timeout)
        if self.pending.request.deferred and (why := self.pending.hosts.ended):
            raise GroupBrokenError(RESULT_GONE.format(self.title, why))

    def rows(self, timeout: float | None = None) -> int:
        """How many rows it has; a value of any kind has one."""
        self._finish(timeout)
        return _count(self.pending.outputs[self.rank]) if self.batched else 1

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        """Rows `start` to `stop`, or the value."""
        self._finish(timeout)
        output = self.pending.outputs[self.rank]
        if self.batched:
            return read_rows(output, start, stop)
        return iter(output.read()) if self.pending.pairs else output.read()


@dataclass(frozen=True)
class _Pinned(_InProcess):
    """A batch in memory of its own: a `protocol.future.Source`."""

    message: Message

    def rows(self, timeout: float | None = None) -> int:
        return _count(self.message)

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        return read_rows(self.message, start, stop)


def _check_batch(output: Any, request: Request) -> None:
    from protocol.batches import is_batch

    if not is_batch(output):
        raise TypeError(NO_BATCH.format(role=request.role, method=request.method))


def _count(batch: Message) -> int:
    from protocol.batches import batch_rows
    from protocol.wire import read_as

    with read_as("view"):
        return batch_rows(batch.read())


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
    pinned = _Pinned(packed(data, _Packer).copied())
    return DataProtoFuture([pinned], isinstance(data, DataProto) and data.is_padding_enabled())


class InlineWorkerGroup(WorkerGroup[W]):
    """A role's ranks in the driver's own process, for debuggers and unit tests.

    It takes what `RayWorkerGroup` takes and does what that does, without Ray: ranks run one after
    another, in the thread that calls, so `breakpoint()` in a worker's method works; `async def`
    methods run in a thread beside it. What a rank gets and returns is copied as between processes;
    classes and functions are passed as they are. `torch.distributed` works with one rank; with
    more, meshes can be built, and a collective raises CollectiveError.

    Args:
        resource_pool: how many ranks on how many nodes, which all are this one; None: one rank.
        ray_cls_with_init: what they hold.
        use_gpu, device_name: False is "cpu"; by default what torch sees.
        worker_env: environment variables for all ranks, there while their code runs.
        master_port, master_port_range: the workers' MASTER_PORT; nobody listens there.
        call_timeout_s: how long an `async def` method may take; others end when they end.
        on_failure, max_restarts: as on Ray; what breaks a group is a rank that exits.
        name_prefix: the workers' WG_PREFIX.
        worker_names, worker_handles: none: there is nothing to attach to. All other options have no
            meaning here, and are taken so that a program can be switched.

    Raises:
        RegistrationError: a class cannot be used as a worker.
        WorkerError: a constructor raised; it names role and rank.
        ResourceError: `master_port` is taken.
    """

    _packer = _Packer
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
        self._check_options(name_prefix, worker_env, startup_timeout_s, call_timeout_s)
        allowed = allowed_restarts(on_failure, max_restarts)
        if worker_names or worker_handles:
            raise ValueError("an inline group starts its ranks, and cannot attach to running ones")
        if not isinstance(ray_cls_with_init, ClassWithInitArgs):
            raise RegistrationError(
                "ray_cls_with_init must say what to start, as ClassWithInitArgs(cls, ...) or "
                f"create_colocated_worker_cls(...); got {ray_cls_with_init!r}"
            )
        pool = ResourcePool([1]) if resource_pool is None else resource_pool
        if not pool.world_size:
            raise ValueError("process_on_nodes must name the processes of at least one node")
        roles = ray_cls_with_init.roles()
        kind = device_kind(CPU.name if use_gpu is False else device_name)
        port = Rendezvous(_ADDRESS, master_port or 0, master_port_range)
        port.close()  # no rank meets another
        contexts = partial(_contexts, pool, kind, port.port, name_prefix or "")
        start = partial(Ranks, contexts, roles, dict(worker_env or {}))
        self._take(Hosts(start(), partial(start, restored=True), allowed), ray_cls_with_init)

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
        by_rank = Outbox(calls, _Packer, lambda message, ranks: message.copied()).by_rank
        reads: dict[int, Callable[[], _Arguments]] = {}  # by id of what ranks get
        for out in {id(out): out for out in by_rank if out is not None}.values():
            out.message.copied()
            futures = Message.of(out.futures, _Packer) if out.futures else None
            reads[id(out)] = partial(_arguments, out, futures, request)
        pending = self._pending(hosts, request)
        for rank, sent in enumerate(by_rank):
            if sent is not None:
                pending.run(hosts.infos[rank], reads[id(sent)])
        return pending


def _arguments(out: Outgoing, futures: Message | None, request: Request) -> _Arguments:
    """A rank's arguments, in memory of its own, or as views that all ranks share."""
    from protocol.wire import read_as

    def fetched(value: Any) -> Any:
        return value.get() if isinstance(value, InlineReference) else value

    with read_as("view" if request.reads_only else "own"):
        late = [] if futures is None else futures.read()
        values = [one.get() for one in late] if request.materialize else late
        args, kwargs = out.message.read(values, [part.read() for part in out.parts])
        return [*map(fetched, args)], {name: fetched(value) for name, value in kwargs.items()}


create_colocated_worker_cls = ColocatedClasses
"""What to start so that each rank holds all roles; `spawn` gives their groups."""


def create_colocated_worker_raw_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several."""
    return create_fused_worker_cls(ColocatedClasses(class_dict))


def create_colocated_worker_cls_fused(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> ClassWithInitArgs:
    """As `create_colocated_worker_cls`, with a `FusedWorker` beside the roles."""
    return ClassWithInitArgs(create_colocated_worker_raw_cls(class_dict))


colocate = Colocate(InlineWorkerGroup, ColocatedClasses)
"""Every role on each rank of the pool, by default on one rank, in this process: see `Colocate`."""
