"""What each rank of an inline group would have of its own in a process of its own: environment
variables, `torch.distributed`, and coroutines. One rank of this process runs at a time.

Groups of one rank are real. Groups of several know their ranks, so that meshes can be built, and
refuse to communicate: ranks run one after another, and would wait for each other for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import os
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from types import SimpleNamespace
from typing import Any, NoReturn

from single_controller.errors import CollectiveError

__all__ = ["RankWorld", "in_event_loop", "one_at_a_time", "wait_for_first_step", "wait_until"]

_BACKEND = "inline"
_COLLECTIVE = re.compile("gather|reduce|all_?to_?all|barrier|broadcast|scatter|send|recv")
_RECORDS = "pg_map pg_names pg_group_ranks pg_backend_config tags_to_pg pg_to_tag pg_coalesce_state"
_labels = itertools.count()

# Those of the rank whose code runs, which what that starts must inherit.
_tasks: ContextVar[weakref.WeakSet[asyncio.Task[Any]]] = ContextVar("_tasks")
# What is swapped belongs to the process. Who waits lets go of it, and is told when a rank is done.
one_at_a_time = threading.Condition()


class _Inside(threading.local):
    """By thread, the ranks whose code it runs, the innermost last, and what each has replaced."""

    def __init__(self) -> None:
        self.stays: list[tuple[RankWorld, Any]] = []


_inside = _Inside()


def wait_until(done: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Let other ranks run until `done()`; whether it is, after at most `timeout_s` seconds. Who
    runs meanwhile finds the process as it was before this thread was any rank.
    """
    limit = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
    with one_at_a_time:
        ranks = [rank for rank, _ in _inside.stays]
        for rank in reversed(ranks):
            rank.leave()
        try:
            return one_at_a_time.wait_for(done, limit)
        finally:
            for rank in ranks:
                rank.enter()


class RankWorld:
    """What is one rank's own, and the process's while `here`. `env` is there from the start."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env: dict[bytes, bytes | None] = {
            os.fsencode(key): os.fsencode(value) for key, value in env.items()
        }
        self._label = f"{_BACKEND}{next(_labels)}"
        self._tasks = weakref.WeakSet[asyncio.Task[Any]]()
        self._asked: Any = None  # the backend that the worker wanted
        records: dict[str, Any] = {name: {} for name in _RECORDS.split()}
        self._groups = SimpleNamespace(default_pg=None, group_count=0, comms=[], **records)

    @contextlib.contextmanager
    def here(self) -> Generator[None]:
        """Be this rank, and let nobody else's code run meanwhile, but while this waits."""
        with one_at_a_time:
            self.enter()
            try:
                yield
            finally:
                self.leave()
                one_at_a_time.notify_all()

    def enter(self) -> None:
        """Put what is this rank's own in the place of the process's."""
        c10d, _ = _torch()
        current = os.environb._data  # type: ignore[attr-defined]
        outside, hook = dict(current), sys.excepthook
        torchs = c10d._world, c10d.rendezvous, c10d._new_process_group_helper
        _apply(self._env)
        c10d._world, c10d.rendezvous = self._groups, _rendezvous
        c10d._new_process_group_helper = self._new_group
        _inside.stays.append((self, (outside, dict(current), hook, torchs)))

    def leave(self) -> None:
        """Put it back, and keep what has become of this rank's."""
        c10d, _ = _torch()
        _, (outside, entered, hook, torchs) = _inside.stays.pop()
        current = os.environb._data  # type: ignore[attr-defined]
        c10d._world, c10d.rendezvous, c10d._new_process_group_helper = torchs
        sys.excepthook = hook  # which torch replaces
        if current != entered:
            changed = {key for key, _ in current.items() ^ outside.items()}
            self._env = {key: current.get(key) for key in {*self._env, *changed}}
        _apply({key: outside.get(key) for key in self._env})

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Let a coroutine go by itself, each step as this rank."""

        async def steps() -> None:
            await self._steps(coroutine)

        context = copy_context()
        context.run(_tasks.set, self._tasks)
        return context.run(asyncio.run_coroutine_threadsafe, steps(), _event_loop()[0])

    @types.coroutine
    def _steps(self, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        step = functools.partial(coroutine.send, None)
        while True:
            with self.here():
                try:
                    awaited = step()
                except StopIteration:
                    return
            try:
                step = functools.partial(coroutine.send, (yield awaited))
            except BaseException as error:
                step = functools.partial(coroutine.throw, error)

    def close(self) -> None:
        """End what the rank has left running, and its process groups."""
        for task in [*self._tasks]:
            task.get_loop().call_soon_threadsafe(task.cancel)
        if self._groups.default_pg is not None:
            with self.here():
                _torch()[0].destroy_process_group()

    def _new_group(
        self,
        size: int,
        rank: int,
        ranks: list[int],
        backend: Any,
        store: Any,
        group_name: str,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """As torch's own function of that name; its registry of names is one for all ranks."""
        if size > 1:
            self._asked = self._asked or backend
            backend, rest = _refusing_backend(), ()
            kept = ("timeout", "pg_tag", "group_desc")
            options = {key: value for key, value in options.items() if key in kept}
        elif backend == _BACKEND:  # taken over from the group of all ranks
            backend = self._asked
        name = f"{self._label}/{group_name}"
        return _torch()[1](size, rank, ranks, backend, store, name, *rest, **options)


@functools.cache
def _torch() -> tuple[Any, Any]:
    """What torch keeps process groups in, and how it makes one where nothing is swapped."""
    from torch.distributed import distributed_c10d

    return distributed_c10d, distributed_c10d._new_process_group_helper


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


def _rendezvous(
    url: str, rank: int = -1, world_size: int = -1, **_: Any
) -> Iterator[tuple[Any, int, int]]:
    """Meet nobody: there is no other process, and other ranks cannot answer."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    env = os.environ
    rank = rank if rank >= 0 else int(env["RANK"])
    yield HashStore(), rank, world_size if world_size >= 0 else int(env["WORLD_SIZE"])


@functools.cache
def _refusing_backend() -> Any:
    """The backend of groups that cannot communicate, made known to torch on first use."""
    from torch import distributed as dist

    names = filter(_COLLECTIVE.search, dir(dist.ProcessGroup))
    members: dict[str, Any] = {name: _refusal(name) for name in names}
    members["getBackendName"] = lambda group: _BACKEND
    members["group_name"] = property(lambda group: _torch()[0]._world.pg_names[group])
    members["group_desc"] = property(lambda group: "ranks of an inline group")
    refusing: Any = type("InlineProcessGroup", (dist.ProcessGroup,), members)

    def create(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return refusing(rank, size)

    dist.Backend.register_backend(_BACKEND, create, devices=["cpu", "cuda"])
    return dist.Backend(_BACKEND)


def _refusal(name: str) -> Any:
    def refuse(group: Any, *_: Any, **__: Any) -> NoReturn:
        raise CollectiveError(
            f"{name.strip('_')} needs {group.size()} ranks at once, and ranks of an inline group "
            "run one after another in this process: test it with one rank, or run it on Ray"
        )

    return refuse


def _noted(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """A task, which ends with the rank whose code has made it."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    _tasks.get().add(task)
    return task


@functools.cache
def _event_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """The loop of all `async def` methods of this process, in a thread of its own."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(_noted)
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="inline-loop")
    thread.start()
    return loop, thread


def wait_for_first_step(coroutine: Coroutine[Any, Any, None]) -> None:
    """Wait until it has come to where it first waits, unless it is the event loop that asks."""
    if not in_event_loop():
        wait_until(lambda: inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED)


def in_event_loop() -> bool:
    """Whether it is an `async def` method that asks."""
    return threading.current_thread() is _event_loop()[1]
