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
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from single_controller.base.dispatch import AUTO_PADDING
from single_controller.base.message import Message, checked_output
from single_controller.base.plan import origins
from single_controller.base.roles import RoleSpec, build_roles, restore_hooks
from single_controller.base.trace import Event, harvest, note, now_ns, running
from single_controller.base.worker import (
    AGENT_STORE,
    Rendezvous,
    WorkerContext,
    coroutine_stacks,
    exit_code,
    own_traceback,
)
from single_controller.device import DeviceKind, Turns, get_torch_device
from single_controller.errors import WorkerDiedError, WorkerError
from single_controller.ray.failure import CallDroppedError
from single_controller.ray.message import Head, Packer, opened, packed_value, read
from single_controller.ray.process import DeviceIdentity, ProcessInfo, arrive, identify, log_tail
from single_controller.ray.shelf import Kept, Shelf, Untouched, in_thread
from single_controller.ray.stream import Offer, made, reading_pairs

__all__ = ["AsyncHost", "Host", "HostInfo", "HostPlace"]

_UNTRACED = contextlib.nullcontext()
_NO_PAIRS: Any = contextlib.nullcontext([])
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


class Host:
    """One rank's process. Calls run one after another on its main thread.

    Constructing it does nothing, so that all hosts of a group start at once; after `arrive`,
    `bind` on rank 0 gives the address that `setup` then takes everywhere; `build` comes last.
    """

    def __init__(self) -> None:
        self._shelf = Shelf()
        self._rendezvous: Rendezvous | None = None  # of rank 0
        self._padding = os.environ.get(AUTO_PADDING)
        self._ending: WorkerDiedError | None = None  # why this process is about to end

    def arrive(self) -> tuple[ProcessInfo, Mapping[str, str]]:
        """Say where this process is, and what versions it has found; let others see its stacks."""
        self._process, found = arrive(ray.get_runtime_context().get_node_id(), _node_ip())
        return self._process, found

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
            node_ip=self._process.node_ip,
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

    def call(self, arrived: Any = None) -> Any:
        """Run one method of one role."""
        head, message, parts = self._opened(arrived)
        place = self._shelf.open(head.keeps) if head.keeps is not None else None
        try:
            began = now_ns()
            kept, rank = self._claimed(head), self._context.rank
            with reading_pairs() if parts else _NO_PAIRS as opened:
                args, kwargs = read(head, message, parts, kept, rank, opened)
                read_ns = began, now_ns()
                if self._turns.any:
                    self._turns.take(head.role)
                untouched = Untouched(args, kwargs) if head.reads_only else None
                with running(head.mark, head.title, read_ns) if head.mark else _UNTRACED:
                    output = getattr(self._workers[head.role], head.method)(*args, **kwargs)
            if head.lent:
                self._shelf.check_lent(head.lent, head.title)
            return _outgoing(head, output, place, untouched)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if place is not None:
                place.fail()
            raise self._failure(head.role, head.method, error) from None
        finally:
            _settle()

    def _claimed(self, head: Head) -> Mapping[tuple[str, int], Kept]:
        return self._shelf.claim(head.claims) if head.claims else {}

    @ray.method(num_returns=2)
    def publish(
        self, token: str, columns: Any, lends: bool, wanted: list[Any] | None = None
    ) -> tuple[Message | None, int]:
        """The batch of a call, or some columns of it, for shared memory, and how many bytes that
        takes. `wanted` refers to whether anyone needs it, `None` says so. `lends`: memory on a
        device is lent instead, until the release.
        """
        kept = self._shelf.publication(token)
        return kept.published(columns, lends) if _is_needed(wanted) else (None, 0)

    def stream(self, token: str, offer: Offer, turn: Any) -> int:
        """Make what a method yields, for those that read it now; the bytes that moved."""
        kept, reply, title = self._shelf.publication(token), None, ""
        try:
            pairs, title = kept.pairs()
            if self._turns.any:
                self._turns.take(title.rpartition(".")[0])
            steps = made(pairs, title, offer)
            while True:
                reply = ray.get(steps.send(reply)[1])
        except StopIteration as end:
            return int(end.value)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            role, _, method = title.rpartition(".")
            raise self._failure(role, method, error) from None

    def weigh(self, message: Message) -> Any:
        """By batch, whether any rank but the one that made it reads rows of it."""
        return _each(_read_elsewhere(message))

    def resolve(self, message: Message) -> Any:
        """By list of futures, the same made of nothing that is not read."""
        return _each(_resolved(message))

    def release(self, token: str, publications: int, turn: Any) -> None:
        """Let go of a result; calls that were sent before this have read it."""
        self._shelf.release(token, publications)

    def _opened(self, arrived: Any) -> tuple[Head, Any, Sequence[Any]]:
        if self._ending is not None:
            raise self._ending
        head, message, parts = opened(arrived)
        self._pad(head.padding)
        return head, message, parts

    def _pad(self, padding: str | None) -> None:
        """Do as the caller with batches whose rows do not divide; None: as this process would."""
        padding = self._padding if padding is None else padding
        if padding is None:
            os.environ.pop(AUTO_PADDING, None)
        elif padding != os.environ.get(AUTO_PADDING):
            os.environ[AUTO_PADDING] = padding

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

    def trace_harvest(self) -> tuple[int, Sequence[Event]]:
        """The time of this process, and what it noted for a trace."""
        return harvest()

    def leave(self, code: int) -> None:
        """End this process."""
        sys.exit(code)


class AsyncHost(Host):
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

    async def call(self, arrived: Any = None) -> Any:
        head, message, parts = self._opened(arrived)
        place = self._shelf.open(head.keeps) if head.keeps is not None else None
        interleaves, run = False, None
        try:
            await self._turn(head.turn)
            # What is here is claimed now: its release may have the next turn.
            kept = self._claimed(head)
            method = getattr(self._workers[head.role], head.method)
            run = self._run(method, head, message, parts, kept, place)
            interleaves = inspect.iscoroutinefunction(method)
            if interleaves:
                self._awaiting.add(run)
                self._end_turn(head.turn)
            return await run
        except BaseException as error:
            if place is not None:
                place.fail()
            if isinstance(error, CallDroppedError):
                raise
            raise self._failure(head.role, head.method, error) from None
        finally:
            if not interleaves:
                self._end_turn(head.turn)
            elif run is not None:
                self._awaiting.discard(run)

    async def _run(
        self,
        method: Any,
        head: Head,
        message: Any,
        parts: Sequence[Any],
        kept: Mapping[tuple[str, int], Kept],
        place: Kept | None,
    ) -> Any:
        began, rank = now_ns(), self._context.rank
        try:
            with reading_pairs() if parts else _NO_PAIRS as opened:
                if parts or not isinstance(message, Message) or message.held:
                    args, kwargs = await in_thread(read, head, message, parts, kept, rank, opened)
                else:
                    args, kwargs = read(head, message, parts, kept, rank, opened)
                read_ns = began, now_ns()
                untouched = Untouched(args, kwargs) if head.reads_only else None
                with running(head.mark, head.title, read_ns):
                    output = method(*args, **kwargs)
                    output = await output if inspect.isawaitable(output) else output
            if head.lent:
                self._shelf.check_lent(head.lent, head.title)
            return _outgoing(head, output, place, untouched)
        finally:
            _settle()

    @ray.method(num_returns=2)
    async def publish(
        self, token: str, columns: Any, lends: bool, wanted: list[Any] | None = None
    ) -> tuple[Message | None, int]:
        kept = self._shelf.publication(token)
        await kept.made.wait()
        needed = wanted is None or await in_thread(_is_needed, wanted)
        return kept.published(columns, lends) if needed else (None, 0)

    async def stream(self, token: str, offer: Offer, turn: Any) -> int:  # type: ignore[override]
        kept, reply, title = self._shelf.publication(token), None, ""
        try:
            await self._turn(turn)
            await kept.made.wait()
            pairs, title = kept.pairs()
            steps = made(pairs, title, offer)
            while True:
                reply = await steps.send(reply)[1]
        except StopIteration as end:
            return int(end.value)
        except BaseException as error:
            role, _, method = title.rpartition(".")
            raise self._failure(role, method, error) from None
        finally:
            self._end_turn(turn)

    async def weigh(self, message: Message) -> Any:
        return _each(await in_thread(_read_elsewhere, message))

    async def resolve(self, message: Message) -> Any:
        return _each(await in_thread(_resolved, message))

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


def _outgoing(head: Head, output: Any, place: Kept | None, untouched: Untouched | None) -> Any:
    """What goes to the caller: the output, or its rows if it stays here."""
    output = checked_output(output, head.pairs)
    if untouched is not None:
        untouched.check(head.title)
    if place is not None:
        keep = place.keep_pairs if head.pairs else place.keep_value if head.opens else place.keep
        return keep(output, head.title)
    if not head.answers:
        return None
    began, sent = now_ns(), packed_value(output, head.title, head.opens)
    if head.mark is not None and isinstance(sent, Message):
        details = {"bytes": sent.size}
        note(Event("serialise", "", began, now_ns(), head.mark.number, details))
    return sent


def _settle() -> None:
    """Be done with what others have lent. Where nothing was borrowed, that was not imported."""
    memory = sys.modules.get("protocol.device_memory")
    if memory is not None:
        memory.settle()


def _is_needed(wanted: list[Any] | None) -> bool:
    """Whether it turns out to be; if that cannot be told, whoever reads it runs into the same, and
    says so.
    """
    with contextlib.suppress(Exception):
        return wanted is None or bool(ray.get(wanted[0]))
    return False


def _read_elsewhere(message: Message) -> list[bool]:
    readers, keys = message.read()
    needed = set()
    for ranks, futures in readers:
        for origin in origins([future.resolved() for future in futures]):
            key = getattr(origin, "key", None)
            if key is not None and ranks != [key[1]]:
                needed.add(key)
    return [key in needed for key in keys]


def _resolved(message: Message) -> list[Message]:
    lists = message.read()
    return [Message.of([future.resolved() for future in futures], Packer) for futures in lists]


def _each(found: list[Any]) -> Any:
    """As Ray wants what a task returns one by one."""
    return found if len(found) > 1 else found[0]


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _device_index(kind: DeviceKind) -> int:
    """Where the device that Ray gave this process stands among those that it sees."""
    given = ray.get_runtime_context().get_accelerator_ids().get(kind.resource, [])
    visible = os.environ.get(kind.visible, "").split(",")
    return visible.index(given[0]) if given and given[0] in visible else 0
