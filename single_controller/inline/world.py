"""What each rank of an inline group would have of its own in a process of its own: environment
variables, `torch.distributed`, an event loop. One rank of this process runs at a time.

Groups of one rank are real. Groups of several know their ranks, so that meshes can be built, and
refuse to communicate: ranks run one after another, and would wait for each other for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, NoReturn

from single_controller.base.worker import OnImport
from single_controller.errors import CollectiveError

__all__ = ["RankLoop", "RankWorld", "one_at_a_time", "wait_until"]

_C10D = "torch.distributed.distributed_c10d"
_BACKEND = "inline"
_COLLECTIVE = re.compile("gather|reduce|all_?to_?all|barrier|broadcast|scatter|send|recv")
_RECORDS = "pg_map pg_names pg_group_ranks pg_backend_config tags_to_pg pg_to_tag pg_coalesce_state"
_CANCEL_S = 5.0  # how long cancelled coroutines may take to end
_labels = itertools.count()

# What is swapped belongs to the process. Who waits lets go of it, and is told when a rank is done.
one_at_a_time = threading.Condition()


def wait_until(done: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Let other ranks run until `done()`; whether it is, after at most `timeout_s` seconds."""
    limit = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
    with one_at_a_time:
        return one_at_a_time.wait_for(done, limit)


class RankWorld:
    """What is one rank's own, and the process's while `here`. `env` is there from the start."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env: dict[bytes, bytes | None] = {
            os.fsencode(key): os.fsencode(value) for key, value in env.items()
        }
        self.thread: int | None = None  # that runs the rank's code
        self._label = f"{_BACKEND}{next(_labels)}"
        self._asked: Any = None  # the backend that the worker wanted
        self._groups: Any = None  # torch's record of process groups
        self._outside: list[tuple[Any, ...]] = []
        self._on_import = OnImport(_C10D, self._swap)

    @contextlib.contextmanager
    def here(self) -> Generator[None, None, None]:
        """Be this rank, and let nobody else's code run meanwhile."""
        with one_at_a_time:
            current = os.environb._data  # type: ignore[attr-defined]
            outside, swapped = dict(current), len(self._outside)
            _apply(self._env)
            entered = dict(current)
            if _C10D in sys.modules:
                self._swap(sys.modules[_C10D])
            else:
                sys.meta_path.insert(0, self._on_import)
            outer, self.thread = self.thread, threading.get_ident()
            try:
                yield
            finally:
                self.thread = outer
                if self._on_import in sys.meta_path:
                    sys.meta_path.remove(self._on_import)
                if len(self._outside) > swapped:
                    self._swap_back(sys.modules[_C10D])
                if current != entered:
                    changed = {key for key, _ in current.items() ^ outside.items()}
                    self._env = {key: current.get(key) for key in {*self._env, *changed}}
                _apply({key: outside.get(key) for key in self._env})
                one_at_a_time.notify_all()

    def close(self) -> None:
        """End the rank's process groups."""
        if self._groups is not None and self._groups.default_pg is not None:
            with self.here():
                sys.modules[_C10D].destroy_process_group()

    def _swap(self, c10d: Any) -> None:
        helper = c10d._new_process_group_helper
        self._outside.append((c10d._world, c10d.rendezvous, helper, sys.excepthook))
        if self._groups is None:
            records: dict[str, Any] = {name: {} for name in _RECORDS.split()}
            self._groups = SimpleNamespace(default_pg=None, group_count=0, comms=[], **records)
        c10d._world, c10d.rendezvous = self._groups, _rendezvous
        c10d._new_process_group_helper = functools.partial(self._new_group, helper)

    def _swap_back(self, c10d: Any) -> None:
        c10d._world, c10d.rendezvous, c10d._new_process_group_helper, sys.excepthook = (
            self._outside.pop()
        )

    def _new_group(
        self,
        helper: Any,
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
        return helper(size, rank, ranks, backend, store, name, *rest, **options)


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
    members["group_name"] = property(lambda group: sys.modules[_C10D]._world.pg_names[group])
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


class RankLoop:
    """The event loop of a group's `async def` methods, in a thread of its own. Each step of a
    coroutine is taken as its rank.
    """

    def __init__(self) -> None:
        self._ready, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True, name="inline-loop")
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())  # which cancels the coroutines that are left
        finally:
            with one_at_a_time:
                self._over = True
                one_at_a_time.notify_all()

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._ended.wait()

    @property
    def runs_here(self) -> bool:
        """Whether it is one of its coroutines that asks."""
        return threading.current_thread() is self._thread

    def start(self, world: RankWorld, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Take it to where it first waits; from there on it goes by itself."""
        steps = _Steps(world, coroutine)
        task = asyncio.run_coroutine_threadsafe(steps, self._loop)
        if not self.runs_here:
            wait_until(lambda: steps.begun or self._over)
        return task

    def stop(self) -> None:
        """Cancel what still runs."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._ended.set)

    def close(self) -> None:
        """Cancel what still runs, and wait until it has ended, for some seconds."""
        self.stop()
        if not self.runs_here:
            wait_until(lambda: self._over, _CANCEL_S)


class _Steps(Coroutine[Any, Any, None]):
    """A coroutine, each step of which is taken in a world."""

    def __init__(self, world: RankWorld, coroutine: Coroutine[Any, Any, None]) -> None:
        self._world, self._coroutine, self.begun = world, coroutine, False

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        with self._world.here():
            self.begun = True
            return step(*args)
