"""The actor process: it holds one instance of every role of its rank, and takes their calls.

What to start and whom to call is decided by the driver, in `worker_group`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from single_controller.base.rank import (
    build_roles,
    checked_output,
    coroutine_stacks,
    exit_code,
    own_traceback,
    restore_hooks,
)
from single_controller.base.rendezvous import Rendezvous
from single_controller.base.residency import Turns
from single_controller.base.roles import RoleSpec
from single_controller.base.rows import AUTO_PADDING
from single_controller.base.worker import AGENT_STORE, WorkerContext
from single_controller.device import DeviceKind, get_torch_device
from single_controller.errors import WorkerDiedError, WorkerError
from single_controller.ray.devices import DeviceIdentity, identify
from single_controller.ray.envelope import Envelope, Late, arguments, fetched, opened, waits
from single_controller.ray.parcel import ArrivedParcel, Result
from single_controller.ray.process import ProcessInfo, arrive, log_tail
from single_controller.ray.reads import Reads, checks_reads
from single_controller.ray.shelf import (
    AsyncShelfTasks,
    Kept,
    Shelf,
    ShelfTasks,
    claimed,
    in_thread,
)
from single_controller.ray.tracing import HostTracing, running

__all__ = [
    "AsyncHost",
    "CallDroppedError",
    "Host",
    "HostInfo",
    "HostPlace",
]

_TOLD_S = 1.0  # how long the answer to a call that asks for the end of a process may take
_OURS = (os.path.dirname(__file__), os.path.dirname(ray.__file__))


@dataclass(frozen=True)
class HostPlace:
    """Which rank a host is, as the driver knows it before the process looks around."""

    rank: int
    world_size: int
    node_rank: int
    local_world_size: int
    prefix: str


@dataclass(frozen=True)
class HostInfo:
    """What a host found out about itself."""

    rank: int
    process: ProcessInfo
    device: str
    roles: tuple[str, ...]
    identity: DeviceIdentity | None = None

    @property
    def node_ip(self) -> str:
        return self.process.node_ip

    @property
    def pid(self) -> int:
        return self.process.pid


class CallDroppedError(Exception):
    """The caller cancelled a call before its turn came."""


class Host(ShelfTasks, HostTracing):
    """One rank's process. Calls run one after another on its main thread.

    Constructing it does nothing, so that all hosts of a group start at once; after `arrive`,
    `bind` on rank 0 gives the address that `setup` then takes everywhere; `build` comes last.
    """

    def __init__(self) -> None:
        self._shelf = Shelf()
        self._rendezvous: Rendezvous | None = None  # of rank 0
        self._padding = os.environ.get(AUTO_PADDING)
        self._ending: WorkerDiedError | None = None  # why this process is about to end

    def arrive(self) -> ProcessInfo:
        """Say where this process is, and let others see its stacks from now on."""
        self._process = arrive(ray.get_runtime_context().get_node_id(), _node_ip())
        return self._process

    def bind(self, port: int, port_range: Sequence[int] | None, address: str) -> tuple[str, int]:
        """Bind the rendezvous of the group to this node (or the given address)."""
        self._rendezvous = Rendezvous(address or _node_ip(), port, port_range)
        return self._rendezvous.address, self._rendezvous.port

    def setup(
        self,
        place: HostPlace,
        kind: DeviceKind,
        address: tuple[str, int],
    ) -> DeviceIdentity | None:
        """Set the environment, and find this rank's device, which becomes the current one."""
        self._context = WorkerContext(
            rank=place.rank,
            world_size=place.world_size,
            local_rank=_device_index(kind) if kind.visible else place.node_rank,
            local_world_size=place.local_world_size,
            node_rank=place.node_rank,
            master_addr=address[0],
            master_port=address[1],
            device_name=kind.name,
            prefix=place.prefix,
            backend="ray",
        )
        os.environ.pop(AGENT_STORE, None)  # where torchrun has started Ray
        os.environ.update(self._context.environment())
        if self._rendezvous is not None:
            self._rendezvous.serve()
        self._kind = kind
        self._identity = identify(kind, self._context.local_rank, self._process.node_id)
        if self._identity is not None and self._context.local_rank:
            # Device 0 is current anyway, and setting it takes memory of the device.
            get_torch_device().set_device(self._context.local_rank)
        return self._identity

    def build(self, roles: Mapping[str, RoleSpec], padding: str | None) -> HostInfo:
        """Build the roles, in their order."""
        self._pad(padding)
        for stream in (sys.stdout, sys.stderr):  # by this, Ray says whose the lines below are
            stream.write(f":actor_name:{'+'.join(roles)} rank {self._context.rank}\n")
            stream.flush()
        self._turns = Turns()
        self._workers = dict(build_roles(self._context, roles, self._turns, self._not_built))
        return self._info()

    def restore(self) -> None:
        """Call the workers' optional `restore()`: this process replaces one that ended."""
        for role, hook in restore_hooks(self._workers):
            try:
                self._turns.take(role)
                hook()
            except (Exception, SystemExit) as error:
                raise self._failure(role, "restore", error) from None

    def whoami(self) -> tuple[HostInfo, tuple[str, int], bool]:
        """For a driver that attaches: who this is, where the group meets, whether Ray keeps the
        order of calls.
        """
        address = self._context.master_addr, self._context.master_port
        return self._info(), address, not isinstance(self, AsyncHost)

    def _info(self) -> HostInfo:
        kind = self._kind
        context = ray.get_runtime_context()
        given = context.get_accelerator_ids().get(kind.resource, [])
        names = f"{kind.name}:{self._context.local_rank} ({kind.resource} {','.join(given)})"
        if self._identity is not None:
            names = f"{names[:-1]}, {self._identity.uuid[:8]})"
        return HostInfo(
            rank=self._context.rank,
            process=self._process,
            device=names if given else kind.name,
            roles=tuple(self._workers),
            identity=self._identity,
        )

    def call(self, arrived: Envelope | bytes | None = None, *parcels: ArrivedParcel) -> Any:
        """Run one method of one role."""
        envelope = self._opened(arrived)
        place = self._place(envelope)
        try:
            with (
                claimed(self._shelf.claim(envelope.claims))
                if envelope.claims
                else contextlib.nullcontext()
            ):
                args, kwargs = arguments(envelope, parcels)
            self._turns.take(envelope.role)
            reads = _reads(envelope, args, kwargs)
            with running(envelope, parcels):
                output = checked_output(self._method(envelope)(*args, **kwargs))
            _check_reads(reads, envelope)
            return _outgoing(envelope, output, place)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if place is not None:
                place.fail()
            raise self._failure(envelope.role, envelope.method, error) from None

    def _opened(self, arrived: Envelope | bytes | None) -> Envelope:
        if self._ending is not None:
            raise self._ending
        envelope = opened(arrived)
        self._pad(envelope.padding)
        return envelope

    def _pad(self, padding: str | None) -> None:
        """Do as the caller with batches whose rows do not divide; None: as this process would."""
        padding = self._padding if padding is None else padding
        if padding is None:
            os.environ.pop(AUTO_PADDING, None)
        elif padding != os.environ.get(AUTO_PADDING):
            os.environ[AUTO_PADDING] = padding

    def _place(self, envelope: Envelope) -> Kept | None:
        """Where the output stays, if it does. A release may empty the place before it is there."""
        return self._shelf.open(envelope.keeps) if envelope.keeps is not None else None

    def _method(self, envelope: Envelope) -> Callable[..., Any]:
        return getattr(self._workers[envelope.role], envelope.method)  # type: ignore[no-any-return]

    def _not_built(self, role: str, error: BaseException) -> BaseException:
        return self._failure(role, "__init__", error)

    def _failure(self, role: str, method: str, error: BaseException) -> BaseException:
        """What to raise for `error`; one that another worker raised passes as it is."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, WorkerError):
            return cause
        shown = own_traceback(error, _OURS)
        where: dict[str, Any] = {
            "role": role,
            "method": method,
            "rank": self._context.rank,
            "node_ip": self._process.node_ip,
            "pid": self._process.pid,
            "remote_traceback": shown,
            "when": time.time(),
        }
        if isinstance(error, SystemExit):
            return self._ends(error, where)
        return WorkerError.wrap(
            error,
            ray.cloudpickle.dumps,  # pyright: ignore[reportAttributeAccessIssue]
            log_tail=log_tail(self._process),
            **where,
        )

    def _ends(self, request: SystemExit, where: Mapping[str, Any]) -> BaseException:
        """End this process as a worker asked, once the caller has been told: Ray would lose what
        was said. Ray's own requests, such as for SIGTERM, are left to it.
        """
        if hasattr(request, "ray_terminate_msg"):
            return request
        with contextlib.suppress(OSError):
            os.write(2, where["remote_traceback"].encode())
        code = exit_code(request)
        self._ending = WorkerDiedError(
            "{role}.{method}: rank {rank} (node {node_ip}, pid {pid}) died: it exited with code "
            "{code}, by sys.exit({asked!r})".format(**where, code=code, asked=request.code),
            **where,
            exit_code=code,
            log_tail=log_tail(self._process),
        )
        this = ray.get_runtime_context().current_actor  # kept: in ray 2.41 a method does not
        this.leave.remote(code)
        return self._ending

    def leave(self, code: int) -> None:
        """End this process."""
        sys.exit(code)


class AsyncHost(AsyncShelfTasks, Host):
    """A host with `async def` methods: those interleave, the others run in order on its loop.

    Ray starts an async actor's tasks in any order, so each call waits for its turn: calls start
    in the order in which their caller sent them. A turn ends when an async method has started
    and when another has finished. While a turn waits for arguments the loop runs on, so that an
    async method of this very host can produce them: a turn waits only for calls sent before it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Ray warns of a `ray.get` that would block the loop; the ones here wait in threads.
        ray._private.worker.blocking_get_inside_async_warned = True  # pyright: ignore[reportAttributeAccessIssue]
        self._next: dict[str, int] = {}
        self._waiting: dict[tuple[str, int], asyncio.Event] = {}
        self._dropped: set[tuple[str, int]] = set()
        self._awaiting: set[Coroutine[Any, Any, Any]] = set()

    async def call(
        self, arrived: Envelope | bytes | None = None, *parcels: ArrivedParcel | Late
    ) -> Any:
        envelope, pending = self._opened(arrived), None
        place = self._place(envelope)
        try:
            await self._turn(envelope.turn)
            method = self._method(envelope)
            # What is here is claimed now: its release may have the next turn.
            kept = self._shelf.claim(envelope.claims)
            if inspect.iscoroutinefunction(method):
                pending = self._run_async(method, envelope, parcels, kept)
                self._awaiting.add(pending)
                self._end_turn(envelope.turn)
                output = checked_output(await pending)
            else:
                here = await self._fetched(parcels)
                args, kwargs = await self._resolve(envelope, here, kept)
                reads = _reads(envelope, args, kwargs)
                with running(envelope, here):
                    output = method(*args, **kwargs)
                    output = checked_output(await output if inspect.isawaitable(output) else output)
                _check_reads(reads, envelope)
            return _outgoing(envelope, output, place)
        except BaseException as error:
            if place is not None:
                place.fail()
            if isinstance(error, CallDroppedError):
                raise
            raise self._failure(envelope.role, envelope.method, error) from None
        finally:
            if pending is None:
                self._end_turn(envelope.turn)
            else:
                self._awaiting.discard(pending)

    async def _run_async(
        self, method: Callable[..., Any], envelope: Envelope, parcels: Any, kept: Any
    ) -> Any:
        here = await self._fetched(parcels)
        args, kwargs = await self._resolve(envelope, here, kept)
        reads = _reads(envelope, args, kwargs)
        with running(envelope, here):
            output = await method(*args, **kwargs)
        _check_reads(reads, envelope)
        return output

    async def _fetched(self, parcels: Sequence[ArrivedParcel | Late]) -> Sequence[ArrivedParcel]:
        """The parcels, now that the call has its turn: Ray can spill what waits for one."""
        if not any(isinstance(parcel, Late) for parcel in parcels):
            return parcels  # type: ignore[return-value]
        found: list[ArrivedParcel] = await in_thread(fetched, parcels)
        return found

    async def _resolve(
        self, envelope: Envelope, parcels: Sequence[ArrivedParcel], kept: Mapping[str, Kept]
    ) -> tuple[list[Any], dict[str, Any]]:
        if not waits(envelope):
            return arguments(envelope, parcels)
        with claimed(kept):
            found: tuple[list[Any], dict[str, Any]] = await in_thread(arguments, envelope, parcels)
            return found

    async def release(self, token: str, publications: int, turn: Any) -> None:  # type: ignore[override]
        await self._turn(turn)
        self._end_turn(turn)
        self._shelf.release(token, publications)

    async def restore(self) -> None:  # type: ignore[override]
        for role, hook in restore_hooks(self._workers):
            try:
                done = hook()
                if inspect.isawaitable(done):
                    await done
            except (Exception, SystemExit) as error:
                raise self._failure(role, "restore", error) from None

    async def leave(self, code: int) -> None:  # type: ignore[override]
        await asyncio.sleep(_TOLD_S)  # tasks interleave, and the answer is to leave before this
        os._exit(code)  # sys.exit would end the loop and leave the process

    async def coroutines(self) -> str:
        """What the calls in this process await, where its loop runs."""
        return coroutine_stacks(self._awaiting, _OURS)

    async def drop(self, turn: tuple[str, int]) -> None:
        """Do not run a call whose turn has not come."""
        if self._next.get(turn[0], 0) <= turn[1]:
            self._dropped.add(turn)

    async def _turn(self, turn: tuple[str, int] | None) -> None:
        if turn is not None:
            caller, number = turn
            if self._next.setdefault(caller, 0) != number:
                event = self._waiting[turn] = asyncio.Event()
                await event.wait()
            if turn in self._dropped:
                raise CallDroppedError

    def _end_turn(self, turn: tuple[str, int] | None) -> None:
        """Let the next call begin, once the loop has passed on what this one returns."""
        if turn is not None:
            asyncio.get_running_loop().call_soon(self._next_turn, turn)

    def _next_turn(self, turn: tuple[str, int]) -> None:
        caller, number = turn
        self._next[caller] = number + 1
        self._dropped.discard(turn)
        event = self._waiting.pop((caller, number + 1), None)
        if event is not None:
            event.set()


def _outgoing(envelope: Envelope, output: Any, place: Kept | None) -> Any:
    """What goes to the caller: the output, or its rows if it stays here; then what it publishes."""
    if place is not None:
        rows = place.keep(output, f"{envelope.role}.{envelope.method}")
        if envelope.publishes is None:
            return rows
        return rows, *place.published(envelope.publishes)
    number = envelope.mark.number if envelope.mark else 0
    return Result.wrap(output, number) if envelope.answers else None


def _reads(envelope: Envelope, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reads | None:
    return Reads(args, kwargs) if envelope.reads_only and checks_reads() else None


def _check_reads(reads: Reads | None, envelope: Envelope) -> None:
    if reads is not None:
        reads.check(f"{envelope.role}.{envelope.method}")


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _device_index(kind: DeviceKind) -> int:
    """Where the device that Ray gave this process stands among those that it sees."""
    given = ray.get_runtime_context().get_accelerator_ids().get(kind.resource, [])
    visible = os.environ.get(kind.visible, "").split(",")
    return visible.index(given[0]) if given and given[0] in visible else 0
