"""Where `async def` methods of an inline group run: a loop that turns while somebody waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager
from types import coroutine
from typing import Any, TypeVar

__all__ = ["RankLoop", "one_at_a_time"]

T = TypeVar("T")

# os.environ and torch.distributed belong to the process, so one rank has them at a time.
one_at_a_time = threading.RLock()
_freed = threading.Condition(one_at_a_time)
_CANCEL_S = 5.0  # how long cancelled methods may take to end
_LOOK_AGAIN_S = 0.01  # whether another thread has turned the loop to where this one waits for


class RankLoop:
    """An event loop for all ranks of a group. It turns in a thread that waits for a call."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turning = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, here: Callable[[], AbstractContextManager[Any]], run: Coroutine[Any, Any, None]
    ) -> None:
        """Take it to where it first waits. Each of its steps is taken within `here()`."""
        begun = threading.Event()

        def stepped() -> None:
            begun.set()
            self._loop.stop()

        def begin() -> None:
            task = self._loop.create_task(_stepwise(here, run, stepped))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

        self._loop.call_soon_threadsafe(begin)
        self.turn(begun.is_set, None)

    def finish(
        self,
        here: Callable[[], AbstractContextManager[Any]],
        awaited: Awaitable[Any],
        errors: list[BaseException],
    ) -> None:
        """Take it to its end, and note what it raised."""
        done = threading.Event()

        async def run() -> None:
            try:
                await awaited
            except Exception as error:
                errors.append(error)
            finally:
                done.set()

        self.start(here, run())
        self.turn(done.is_set, None)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._loop.stop()

    def turn(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Turn until `done()`, which only this loop's coroutines change; whether it is, after at
        most `timeout_s` seconds.

        Raises:
            RuntimeError: called by one of these coroutines, which would wait in vain.
        """
        return self._where_no_loop_runs(lambda: self._turn(done, timeout_s))

    async def turned(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        """As `turn`, in a thread, while the loop that awaits this runs on; until it awaits no more.

        Raises:
            RuntimeError: awaited by one of these coroutines.
        """
        around = asyncio.get_running_loop()
        self._check_not_within(around)
        ended, left = around.create_future(), threading.Event()

        def end(setter: Callable[[Any], None], value: Any) -> None:
            if not ended.done():
                setter(value)

        def run() -> None:
            try:
                turned = self._turn(lambda: left.is_set() or done(), timeout_s)
                outcome: Any = ended.set_result, turned
            except BaseException as error:
                outcome = ended.set_exception, error
            with contextlib.suppress(RuntimeError):  # closed: nobody waits any more
                around.call_soon_threadsafe(end, *outcome)

        threading.Thread(target=run, daemon=True, name="inline-loop").start()
        try:
            await ended
        finally:
            left.set()
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)

    def _check_not_within(self, around: Any) -> None:
        if around is self._loop:
            raise RuntimeError(
                "an async method waits for an async method of its own inline group, which cannot "
                "go on meanwhile: await the other worker's method itself"
            )

    def _turn(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not done():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            if not self._turning.acquire(timeout=_LOOK_AGAIN_S):
                continue
            try:
                timer = None if left is None else self._loop.call_later(left, self._loop.stop)
                if not done():
                    self._loop.run_forever()
                if timer is not None:
                    timer.cancel()
            finally:
                self._turning.release()
        return True

    def _where_no_loop_runs(self, function: Callable[[], T]) -> T:
        """Here, or, under another running loop, in a thread of its own, which may be any rank."""
        around = None
        with contextlib.suppress(RuntimeError):
            around = asyncio.get_running_loop()
        if around is None:
            return function()
        self._check_not_within(around)
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            with _freed:
                _freed.notify_all()

        with _freed:
            threading.Thread(target=run, daemon=True, name="inline-loop").start()
            _freed.wait_for(lambda: results or errors)  # lets go, however often it is held
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Cancel what still runs."""
        self._where_no_loop_runs(self._close)

    def _close(self) -> None:
        with self._turning:
            if not self._loop.is_closed():
                for task in self._tasks:
                    task.cancel()
                end = time.monotonic() + _CANCEL_S
                while self._tasks and time.monotonic() < end:
                    timer = self._loop.call_later(end - time.monotonic(), self._loop.stop)
                    self._loop.run_forever()  # until one of them has finished
                    timer.cancel()
                self._loop.close()


async def _stepwise(*args: Any) -> None:
    await _in_steps(*args)


@coroutine
def _in_steps(
    here: Callable[[], AbstractContextManager[Any]],
    run: Coroutine[Any, Any, None],
    stepped: Callable[[], None],
) -> Generator[Any, Any, None]:
    """`run`, each step of which is taken within `here()`."""
    step: Callable[[Any], Any] = run.send
    value: Any = None
    while True:
        with here():
            try:
                waits_for = step(value)
            except StopIteration:
                return
            finally:
                stepped()
        try:
            value, step = (yield waits_for), run.send
        except BaseException as error:
            value, step = error, run.throw
