"""The actor process: it holds one instance of every role of its rank, and takes their calls.

What to start is decided by the driver in `start`, and whom to call in `remote_batch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from single_controller.base.dispatch import AUTO_PADDING
from single_controller.base.message import Message, checked_output
from single_controller.base.plan import loaded
from single_controller.base.roles import ClassWithInitArgs, build_roles, restore_hooks
from single_controller.base.trace import Event, harvest, note, now_ns, running
from single_controller.base.worker import (
    AGENT_STORE,
    Rendezvous,
    WorkerContext,
    exit_code,
    own_traceback,
)
from single_controller.device import DeviceKind, Turns, get_torch_device
from single_controller.errors import WorkerDiedError, WorkerError
from single_controller.ray.failure import CallDroppedError
from single_controller.ray.message import Answer, Head, opened, packed_value, read
from single_controller.ray.process import DeviceIdentity, ProcessInfo, arrive, identify, log_tail
from single_controller.ray.shelf import Home, Kept, Untouched, check_lent, in_thread
from single_controller.ray.stream import Offer, made, reading_pairs

__all__ = ["AsyncHost", "Host", "HostInfo"]

_UNTRACED = contextlib.nullcontext()
_NO_PAIRS: Any = contextlib.nullcontext([])
_TOLD_S = 1.0  # how long the answer to a call that asks for the end of a process may take
_OURS = (os.path.dirname(__file__), os.path.dirname(ray.__file__))


@dataclass(frozen=True)
class HostInfo:
    """What a host found out about itself. `address`: where its group meets; `ordered`: whether Ray
    keeps the order of its calls.
    """

    rank: int
    process: ProcessInfo
    device: str
    roles: tuple[str, ...]
    identity: DeviceIdentity | None = None
    address: tuple[str, int] = ("", 0)
    ordered: bool = True

    @property
    def node_ip(self) -> str:
        return self.process.node_ip

    @property
    def pid(self) -> int:
        return self.process.pid


class AsyncHost:
    """One rank's process, with `async def` methods: those interleave, the others run in order on
    its loop.

    Constructing it does nothing, so that all hosts of a group start at once; after `arrive`,
    `bind` on rank 0 gives the address that `build` then takes everywhere.
    """

    ordered = False  # whether Ray starts its tasks in their order

    def __init__(self) -> None:
        # Ray warns of a `ray.get` that would block the loop; the ones here wait in threads.
        ray._private.worker.blocking_get_inside_async_warned = True  # pyright: ignore[reportAttributeAccessIssue]
        self._shelf: dict[Home, Kept] = {}
        self._order = _Order()
        self._rendezvous: Rendezvous | None = None  # of rank 0
        self._padding = os.environ.get(AUTO_PADDING)
        self._ending: WorkerDiedError | None = None  # why this process is about to end
        self._awaiting: set[Any] = set()  # what its calls wait for
        self._index = 0  # of its device

    def arrive(self) -> tuple[ProcessInfo, Mapping[str, str]]:
        """Say where this process is, and what versions it has found; let others see its stacks."""
        node_id = ray.get_runtime_context().get_node_id()
        self._process, found = arrive(node_id, _node_ip(), self._awaiting)
        return self._process, found

    def bind(self, port: int, port_range: Sequence[int] | None, address: str) -> tuple[str, int]:
        """Bind the rendezvous of the group to this node (or the given address)."""
        self._rendezvous = Rendezvous(address or _node_ip(), port, port_range)
        return self._rendezvous.address, self._rendezvous.port

    def build(
        self,
        context: WorkerContext,
        kind: DeviceKind,
        roles: Mapping[str, ClassWithInitArgs],
        padding: str | None,
    ) -> HostInfo:
        """Set the environment, as far as the driver knows it, have this rank's device be the
        current one, and build the roles, in their order.
        """
        index = _device_index(kind) if kind.visible else context.node_rank
        self._context = replace(context, local_rank=index, node_ip=self._process.node_ip)
        os.environ.pop(AGENT_STORE, None)  # where torchrun has started Ray
        os.environ.update(self._context.environment())
        if self._rendezvous is not None:
            self._rendezvous.hand_over()
        identity = identify(kind, index, self._process.node_id)
        if identity is not None and index:
            # Device 0 is current anyway, and setting it takes memory of the device.
            self._index = index
            get_torch_device().set_device(index)
        self._pad(padding)
        for stream in (sys.stdout, sys.stderr):  # by this, Ray says whose the lines below are
            stream.write(f":actor_name:{'+'.join(roles)} rank {context.rank}\n")
            stream.flush()
        self._turns = Turns()

        def not_built(role: str, error: BaseException) -> BaseException:
            return self._failure(role, "__init__", error)

        self._workers = dict(build_roles(self._context, roles, self._turns, not_built))
        given = ray.get_runtime_context().get_accelerator_ids().get(kind.resource, [])
        which = f"{kind.resource} {','.join(given)}{f', {identity.uuid[:8]}' if identity else ''}"
        self._info = HostInfo(
            rank=context.rank,
            process=self._process,
            device=f"{kind.name}:{index} ({which})" if given else kind.name,
            roles=tuple(self._workers),
            identity=identity,
            address=(context.master_addr, context.master_port),
            ordered=self.ordered,
        )
        return self._info

    async def restore(self) -> None:
        """Call the workers' optional `restore()`: this process replaces one that ended."""
        for role, hook in restore_hooks(self._workers):
            try:
                self._turns.take(role)
                done = hook()
                if not self.ordered and inspect.isawaitable(done):
                    await done
            except (Exception, SystemExit) as error:
                raise self._failure(role, "restore", error) from None

    def whoami(self) -> HostInfo:
        """For a driver that attaches."""
        return self._info

    async def call(self, arrived: Any = None) -> Any:
        """Run one method of one role."""
        head, message, parts = self._opened(arrived)
        place = self._shelf.setdefault(head.keeps, Kept()) if head.keeps is not None else None
        on_loop = in_turn = not self.ordered
        try:
            if on_loop:
                await self._order.begin(head.turn)
            began = now_ns()
            # As the shelf is now: the release of what is to be read may have the next turn.
            kept = {**self._shelf} if parts else {}
            method = getattr(self._workers[head.role], head.method)
            interleaves = on_loop and inspect.iscoroutinefunction(method)
            there = head.own and all(self._kept(home).made.is_set() for home in head.own)
            if interleaves and not there:  # what makes it may wait for later calls
                in_turn = False
                self._order.end(head.turn)
            with reading_pairs() if parts else _NO_PAIRS as pairs:
                reading = head, message, parts, kept, self._process, pairs
                if on_loop and (parts or not isinstance(message, Message) or message.held):
                    args, kwargs = await _seen(self._awaiting, in_thread(self._read, *reading))
                else:
                    args, kwargs = read(*reading)
                kept.clear()
                if interleaves and in_turn:
                    in_turn = False
                    self._order.end(head.turn)
                read_ns = began, now_ns()
                if self._turns.any:
                    self._turns.take(head.role)
                untouched = Untouched(args, kwargs) if head.reads_only else None
                with running(head.mark, head.title, read_ns) if head.mark else _UNTRACED:
                    output = method(*args, **kwargs)
                    if on_loop and inspect.isawaitable(output):
                        output = await _seen(self._awaiting, output)
            if head.lent:
                check_lent(self._shelf, head.lent, head.title)
            return self._apart(_outgoing(head, output, place, untouched))
        except BaseException as error:
            if place is not None:
                place.fail()
            raise self._failure(head.role, head.method, error) from None
        finally:
            if in_turn:
                self._order.end(head.turn)
            _settle()

    def _read(self, *call: Any) -> Any:
        """Read a call's arguments in a thread, in which another device is the current one."""
        if self._index:
            get_torch_device().set_device(self._index)
        return read(*call)

    def _apart(self, sent: Any) -> Any:
        """Ray copies what a task on a loop returns while the next one may be writing into it."""
        message = sent.message if isinstance(sent, Answer) else sent
        if isinstance(message, Message) and not self.ordered:
            message.copied()
        return sent

    def _kept(self, home: Home) -> Kept:
        """A result that is there or will be, or an empty one of a call that was never begun."""
        if (kept := self._shelf.get(home)) is None:
            kept = Kept()
            kept.fail()
        return kept

    @ray.method(num_returns=2)
    async def publish(
        self, home: Home, columns: Any, lends: bool, wanted: list[Any] | None, turn: Any
    ) -> tuple[Message | None, int]:
        """The batch of a call, or some columns of it, for shared memory, and how many bytes that
        takes. `wanted` refers to whether anyone needs it, `None` says so. `lends`: memory on a
        device is lent instead, until the release.
        """
        await self._order.begin(turn)
        self._order.end(turn)
        kept = self._kept(home)
        await kept.made.wait()
        needed = wanted is None or await _aside(self.ordered, _is_needed, wanted)
        message, size = kept.published(columns, lends) if needed else (None, 0)
        return self._apart(message), size

    async def stream(self, home: Home, offer: Offer, turn: Any) -> None:
        """Make what a method yields, for those that read it now."""
        reply, title = None, ""
        try:
            await self._order.begin(turn)
            kept = self._kept(home)
            await kept.made.wait()
            pairs, title = kept.pairs()
            self._turns.take(title.rpartition(".")[0])
            steps = made(pairs, title, offer)
            while True:
                given = steps.send(reply)[1]
                reply = ray.get(given) if self.ordered else await given
        except StopIteration:
            return
        except BaseException as error:
            role, _, method = title.rpartition(".")
            raise self._failure(role, method, error) from None
        finally:
            self._order.end(turn)

    async def sort_out(self, message: Message) -> Any:
        """Who reads what, for all ranks of a call: see `remote_batch`."""
        return await _aside(self.ordered, _sorted_out, message)

    async def release(self, home: Home, turn: Any) -> None:
        """Let go of a result. What was sent before this has it."""
        await self._order.begin(turn)
        self._order.end(turn)
        self._shelf.pop(home, None)

    def drop(self, turn: tuple[str, int]) -> None:
        """Do not run a call whose turn has not come."""
        self._order.drop(turn)

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

    def _failure(self, role: str, method: str, error: BaseException) -> BaseException:
        """What to raise for `error`; one that another worker raised passes as it is, and so do
        Ray's own requests to end, such as for SIGTERM.
        """
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, WorkerError | CallDroppedError) or hasattr(cause, "ray_terminate_msg"):
            error.with_traceback(None)  # else the cause, raised in its place, keeps all its frames
            return cause
        where: dict[str, Any] = {
            "role": role,
            "method": method,
            "rank": self._context.rank,
            "node_ip": self._process.node_ip,
            "pid": self._process.pid,
            "remote_traceback": own_traceback(error, _OURS),
            "when": time.time(),
            "log_tail": log_tail(self._process),
        }
        if not isinstance(error, SystemExit):
            pickles: Any = ray.cloudpickle.dumps  # pyright: ignore[reportAttributeAccessIssue]
            return WorkerError.wrap(error, pickles, **where)
        # The process ends as the worker asked, once the caller has been told: Ray would lose what
        # was said.
        code = exit_code(error)
        self._ending = WorkerDiedError(
            "{role}.{method}: rank {rank} (node {node_ip}, pid {pid}) died: it exited with code "
            "{code}, by sys.exit({asked!r})".format(**where, code=code, asked=error.code),
            **where,
            exit_code=code,
        )
        this = ray.get_runtime_context().current_actor  # kept: in ray 2.41 a method does not
        this.leave.remote(code)
        return self._ending

    def trace_harvest(self) -> tuple[int, Sequence[Event]]:
        """The time of this process, and what it noted for a trace."""
        return harvest()

    async def leave(self, code: int) -> None:
        """End this process."""
        await asyncio.sleep(_TOLD_S)  # tasks interleave, and the answer is to leave before this
        os._exit(code)  # sys.exit would end the loop and leave the process


class _Order:
    """Starts calls in the order in which their caller sent them, which Ray does not keep for actors
    on a loop.

    A turn ends when an async method has started and when another has finished. While a turn waits
    for arguments the loop runs on, so that an async method of this very host can produce them: a
    turn waits only for calls sent before it.
    """

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._waiting: dict[tuple[str, int], asyncio.Event] = {}
        self._dropped: set[tuple[str, int]] = set()

    async def begin(self, turn: tuple[str, int] | None) -> None:
        """Wait for the turn, if there are any. Raises CallDroppedError."""
        if turn is not None:
            caller, number = turn
            if self._next.setdefault(caller, 0) != number:
                event = self._waiting[turn] = asyncio.Event()
                await event.wait()
            if turn in self._dropped:
                raise CallDroppedError

    def end(self, turn: tuple[str, int] | None) -> None:
        """Let the next call begin, once the loop has passed on what this one returns."""
        if turn is not None:
            asyncio.get_running_loop().call_soon(self._after, turn)

    def drop(self, turn: tuple[str, int]) -> None:
        if self._next.get(turn[0], 0) <= turn[1]:
            self._dropped.add(turn)

    def _after(self, turn: tuple[str, int]) -> None:
        caller, number = turn
        self._next[caller] = number + 1
        self._dropped.discard(turn)
        event = self._waiting.pop((caller, number + 1), None)
        if event is not None:
            event.set()


def _at_once(task: Any) -> Any:
    """The task as a plain function, for processes in which all that it awaits is there. Ray takes
    an actor with any `async def` method for one on a loop.
    """

    @functools.wraps(task)
    def run(self: Host, *args: Any) -> Any:
        try:
            task(self, *args).send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError(f"{task.__name__} waits, and nothing else runs in this process")

    return run


class Host(AsyncHost):
    """One rank's process whose roles have no `async def` methods: calls run one after another on
    its main thread. They come in order, so that what one reads is there.
    """

    ordered = True
    restore = _at_once(AsyncHost.restore)
    call = _at_once(AsyncHost.call)
    publish = _at_once(AsyncHost.publish)
    stream = _at_once(AsyncHost.stream)
    sort_out = _at_once(AsyncHost.sort_out)
    release = _at_once(AsyncHost.release)

    def leave(self, code: int) -> None:  # type: ignore[override]
        sys.exit(code)


async def _seen(awaiting: set[Any], awaitable: Any) -> Any:
    """Await it, for all to see."""
    awaiting.add(awaitable)
    try:
        return await awaitable
    finally:
        awaiting.discard(awaitable)


async def _aside(here: bool, function: Callable[..., Any], *args: Any) -> Any:
    """What may wait: in a thread, or `here`, where there is no loop to keep up."""
    return function(*args) if here else await in_thread(function, *args)


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
    memory = loaded("protocol.device_memory")
    if memory is not None:
        memory.settle()


def _is_needed(wanted: list[Any]) -> bool:
    """Whether it turns out to be; if that cannot be told, whoever reads it runs into the same, and
    says so.
    """
    with contextlib.suppress(Exception):
        return bool(ray.get(wanted[0]))
    return False


def _sorted_out(message: Message) -> Any:
    found = message.read()()
    return found if len(found) > 1 else found[0]  # as Ray wants what a task returns one by one


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _device_index(kind: DeviceKind) -> int:
    """Where the device that Ray gave this process stands among those that it sees."""
    given = ray.get_runtime_context().get_accelerator_ids().get(kind.resource, [])
    visible = os.environ.get(kind.visible, "").split(",")
    return visible.index(given[0]) if given and given[0] in visible else 0
