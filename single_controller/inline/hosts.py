"""The ranks of an inline group: each holds its roles, and an environment that is its own while its
code runs. One rank of this process runs at a time.

Calls and their outputs are left to `calls`.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_stack
from typing import Any

from single_controller.base.rank import (
    build_roles,
    checked_output,
    coroutine_stacks,
    exit_code,
    has_async_method,
    own_frames,
    own_traceback,
    restore_hooks,
)
from single_controller.base.rendezvous import Rendezvous
from single_controller.base.residency import Turns
from single_controller.base.resource_pool import ResourcePool
from single_controller.base.roles import RoleSpec
from single_controller.base.spans import Buffer
from single_controller.base.supervisor import tell
from single_controller.base.table import RankState
from single_controller.base.worker import Worker, WorkerContext
from single_controller.device import CPU, DeviceKind, device_kind
from single_controller.errors import GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.inline.distributed import RankWorld
from single_controller.inline.loop import RankLoop, one_at_a_time
from single_controller.inline.privacy import Handle, dumps

__all__ = ["InlineHosts", "InlineRank", "RankInfo"]

_logger = logging.getLogger(__name__)

_ADDRESS = "127.0.0.1"
_SETTLE_S = 0.01  # how long calls that were given up get to finish, whose loop stands still
_OURS = (os.path.dirname(__file__), os.path.dirname(threading.__file__) + "/asyncio")


@dataclass(frozen=True)
class RankInfo:
    """Where a rank is: here."""

    rank: int
    node_ip: str
    device: str
    pid: int


class InlineRank:
    """One rank: its workers by role, and what it would have of its own in a process of its own."""

    def __init__(self, context: WorkerContext, env: Mapping[str, str]) -> None:
        self.context = context
        self.workers: dict[str, Worker] = {}
        own = {**env, **context.environment()}
        self._env: dict[bytes, bytes | None] = {
            os.fsencode(key): os.fsencode(value) for key, value in own.items()
        }
        self._world = RankWorld()
        self.turns = Turns()
        self._thread: int | None = None  # that runs the rank's code
        self.waiting: dict[Any, Any] = {}  # coroutines of its async methods, by their call
        self.noted = Buffer(1)  # of the last trace

    def build(self, roles: Mapping[str, RoleSpec]) -> None:
        """Construct the workers, in their order.

        Raises:
            WorkerError: a constructor raised.
        """

        def failed(role: str, error: BaseException) -> BaseException:
            return self.failure(role, "__init__", error)

        with self.here():
            self.workers.update(build_roles(self.context, roles, self.turns, failed))

    @contextmanager
    def here(self) -> Generator[None, None, None]:
        """Be this rank: its environment, its process groups, and nobody else's code meanwhile."""
        with one_at_a_time:
            current = os.environb._data  # type: ignore[attr-defined]
            outside = dict(current)
            _apply(self._env)
            entered = dict(current)
            self._world.enter()
            outer, self._thread = self._thread, threading.get_ident()
            try:
                yield
            finally:
                self._thread = outer
                self._world.leave()
                if current != entered:
                    changed = {key for key, _ in current.items() ^ outside.items()}
                    self._env = {key: current.get(key) for key in {*self._env, *changed}}
                _apply({key: outside.get(key) for key in self._env})

    def restore(self, loop: RankLoop | None) -> None:
        """Call the workers' optional `restore()`: they replace others.

        Raises:
            WorkerError: one raised.
        """
        for role, hook in restore_hooks(self.workers):
            errors: list[BaseException] = []
            try:
                with self.here():
                    done = hook()
                if loop is not None and inspect.isawaitable(done):
                    loop.finish(self.here, done, errors)
                else:
                    checked_output(done)
            except (Exception, SystemExit) as error:
                errors.append(error)
            if errors:
                raise self.failure(role, "restore", errors[0])

    def stack(self) -> str:
        """What the rank's code is doing, the innermost frame first."""
        thread = self._thread
        running = None if thread is None else sys._current_frames().get(thread)
        lines = [] if running is None else own_frames((f for f, _ in walk_stack(running)), _OURS)
        waiting = coroutine_stacks([*self.waiting.values()], _OURS) if self.waiting else ""
        return "\n".join(filter(None, [*lines, waiting])) or "  in no call"

    def failure(self, role: str, method: str, error: BaseException) -> Exception:
        """What to raise for `error`, which stays its cause with all its frames, for a debugger."""
        if isinstance(error, WorkerError):
            return error
        where: dict[str, Any] = {
            "role": role,
            "method": method,
            "rank": self.context.rank,
            "node_ip": _ADDRESS,
            "pid": os.getpid(),
            "remote_traceback": own_traceback(error, _OURS),
            "when": time.time(),
        }
        if isinstance(error, SystemExit):
            wrapped: WorkerError = WorkerDiedError(
                f"{role}.{method}: rank {self.context.rank} asked for the end of its process by "
                f"sys.exit({error.code!r}), which in an inline group is the driver's",
                **where,
                exit_code=exit_code(error),
            )
        else:
            wrapped = WorkerError.wrap(error, dumps, **where)
        wrapped.__cause__ = error
        return wrapped

    def close(self) -> None:
        """Let go of the workers and their process groups."""
        with one_at_a_time:
            self._world.close()
        self.workers.clear()
        self.context.peers.clear()


def _apply(values: Mapping[bytes, bytes | None]) -> None:
    """Set the process's variables. `os.environb` itself takes longer for them than a small call."""
    current = os.environb._data  # type: ignore[attr-defined]
    put: Any = os.putenv
    unset: Any = os.unsetenv
    for key, value in values.items():
        if value is not None:
            put(key, value)
            current[key] = value
        elif key in current:
            unset(key)
            del current[key]


class InlineHosts(Handle):
    """All ranks of a group, in this process, and whether calls may still go to them.

    Raises:
        WorkerError: a role's constructor raised. ResourceError: the port is taken.
    """

    def __init__(
        self,
        pool: ResourcePool,
        roles: Mapping[str, RoleSpec],
        env: Mapping[str, str],
        prefix: str = "",
        device_name: str | None = None,
        master_port: int = 0,
        port_range: Sequence[int] | None = None,
        restored: bool = False,
    ) -> None:
        kind = _device(device_name)
        rendezvous = Rendezvous(_ADDRESS, master_port, port_range)  # no other group gets the port
        self.address = (_ADDRESS, rendezvous.port)
        self.roles = tuple(roles)
        self.broken: str | None = None
        self._dead: set[int] = set()
        self.closed_because: str | None = None
        self.retired = False
        self._running: list[tuple[int, Callable[[], bool], str]] = []  # rank, whether done, why
        self.on_death: list[Callable[[WorkerDiedError], object]] = []
        self.loop = RankLoop() if has_async_method(roles) else None
        self.ranks: list[InlineRank] = []
        self._end = weakref.finalize(self, _end, rendezvous, self.loop, self.ranks)
        try:
            for context in _contexts(pool, kind, self.address, prefix):
                self.ranks.append(InlineRank(context, env))
                self.ranks[-1].build(roles)
            if restored:
                for rank in self.ranks:
                    rank.restore(self.loop)
        except BaseException:
            self.close()
            raise
        self.infos = [
            RankInfo(rank.context.rank, _ADDRESS, _device_name(rank.context), os.getpid())
            for rank in self.ranks
        ]

    def states(self) -> list[RankState]:
        """How each rank is; one whose group takes no calls is broken, or has asked for its end."""
        dead = [not self._end.alive or info.rank in self._dead for info in self.infos]
        return ["dead" if gone else "broken" if self.broken else "alive" for gone in dead]

    def check_usable(self) -> None:
        """Raise GroupBrokenError where the group takes no more calls."""
        if self.closed_because is not None:
            raise GroupBrokenError(self.closed_because)
        if self.broken is None and not self._settled():
            ranks = sorted({rank for rank, *_ in self._running})
            raise GroupBrokenError(f"ranks {ranks} are still in a call that {self._running[0][2]}")
        if self.broken is not None:
            raise GroupBrokenError(f"{self.broken}. restart() the group, or close() it")

    def _settled(self) -> bool:
        """Whether the ranks have finished that were still busy when a call was given up."""
        if self._running and self.loop is not None:
            self.loop.turn(lambda: all(done() for _, done, _ in self._running), _SETTLE_S)
            self._running = [(rank, done, why) for rank, done, why in self._running if not done()]
        return not self._running

    def give_up(self, running: Mapping[int, Callable[[], bool]], timeout_s: float) -> None:
        """Note ranks whose deadline has passed, each with what says whether it is done: until they
        are, no call may follow.
        """
        why = f"was given up after {timeout_s:g} s"
        self._running += [(rank, done, why) for rank, done in running.items()]

    def check_current(self) -> None:
        """Raise GroupBrokenError where other hosts have taken over."""
        if self.retired:
            raise GroupBrokenError(self.closed_because)

    def died(self, error: WorkerDiedError) -> None:
        """A rank asked for the end of its process: the group takes no more calls."""
        self._dead.add(error.rank)
        if self.broken is None:
            self.broken = f"the group lost a rank: {error.args[0]}"
            for told in self.on_death:
                _logger.error("%s", error.args[0])
                tell(told, error)

    def close(self, why: str = "the group is closed") -> None:
        """Let go of all workers; calls then raise GroupBrokenError."""
        self.closed_because = self.closed_because or why
        self._end()

    def retire(self) -> None:
        """Close for others to take over: from then on, no result of these hosts counts."""
        self.retired = True
        self.close("the group was restarted, and this call was sent to its former workers")


def _end(rendezvous: Rendezvous, loop: RankLoop | None, ranks: Sequence[InlineRank]) -> None:
    if loop is not None:
        loop.close()
    for rank in ranks:
        rank.close()
    rendezvous.close()


def _device(name: str | None) -> DeviceKind:
    """By default what torch sees, if it is there to be asked: it takes seconds to import."""
    return CPU if name is None and "torch" not in sys.modules else device_kind(name)


def _contexts(
    pool: ResourcePool, kind: DeviceKind, address: tuple[str, int], prefix: str
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
            master_addr=address[0],
            master_port=address[1],
            device_name=kind.name,
            prefix=prefix,
            backend="inline",
        )


def _device_name(context: WorkerContext) -> str:
    name = context.device_name
    return name if name == CPU.name else f"{name}:{context.local_rank}"
