"""Results that stay in the process that made them, until others ask or the driver drops them.

A call whose result is a future leaves its batch on the shelf of its host. A later call on the same
process takes it from there. For anyone else it is published: copied into shared memory, by a task
that the driver puts into the queue of the host. How the driver decides is in `routes`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import ray

from single_controller.errors import SharedMemoryWriteError
from single_controller.ray.parcel import Result, SizeOf

__all__ = [
    "AsyncShelfTasks",
    "Kept",
    "Shelf",
    "ShelfTasks",
    "claimed",
    "in_thread",
    "kept_here",
    "known_rows",
    "needed_tokens",
    "remember_rows",
]

_claims: ContextVar[Mapping[str, Kept]] = ContextVar("_claims")
_rows: dict[str, tuple[int | None, ...]] = {}  # by call: what this process learned for its shelf


class Kept:
    """One rank's result. Until it is there, `made` is unset."""

    def __init__(self) -> None:
        self.made = asyncio.Event()
        self.publications = 0  # tasks that have come to publish it
        self.last: int | None = None  # as many are to come before it can go
        self._batch: Any = None
        self._versions: list[int] = []
        self._title = ""
        self._loans: list[Result] = []

    def keep(self, output: Any, title: str) -> int | None:
        """Keep what the method `title` returned, if it is a batch; its rows."""
        from protocol.batches import batch_rows, detach_batch, is_batch

        self.made.set()
        if not is_batch(output):
            return None
        self._batch, self._title = detach_batch(output), title
        self._versions = _versions(self._batch)
        return batch_rows(output)

    def fail(self) -> None:
        """Note that there will be no batch; who waits for one learns why from the call itself."""
        self.made.set()

    def published(self, lends: bool) -> tuple[Any, Any]:
        """The batch for others, and the bytes it takes; with `lends`, device memory stays here.

        None if there is no batch: whoever reads it has learned why, from the call itself.
        """
        if self._batch is None:
            return None, 0
        result = Result(self.batch(), lends=lends)
        if lends:
            self._loans.append(result)
        return result, SizeOf(result)

    def end_loans(self) -> None:
        """Nobody will read what was lent any more."""
        for result in self._loans:
            for tensor in result.lent:
                tensor.end()

    def batch(self) -> Any:
        """The batch, which is still its maker's: it must not be changed.

        Raises:
            SharedMemoryWriteError: somebody has.
        """
        if self._batch is None:
            raise RuntimeError("the call that was to make this batch failed or was dropped")
        if _versions(self._batch) != self._versions:
            raise SharedMemoryWriteError(
                f"{self._title} returned a batch without blocking, so that it stays in the worker, "
                "and its tensors have been written to since: return a copy of what the worker "
                "writes into, as x.clone(); or a method with reads_only=True wrote into them"
            )
        return self._batch


def _versions(batch: Any) -> list[int]:
    """How often each tensor was written to; torch does not count for inference tensors."""
    from protocol.batches import batch_tensors

    return [0 if tensor.is_inference() else tensor._version for tensor in batch_tensors(batch)]


class Shelf:
    """A host's results by token."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, token: str) -> Kept:
        """The place of a result that is there, or will be."""
        return self._kept.setdefault(token, Kept())

    def claim(self, tokens: Iterable[str]) -> dict[str, Kept]:
        """What a call is going to read. It outlives its release."""
        return {token: self._kept[token] for token in tokens if token in self._kept}

    def publication(self, token: str) -> Kept:
        """The same for a task that publishes."""
        kept = self.open(token)
        kept.publications += 1
        self._drop(token)
        return kept

    def release(self, token: str, publications: int) -> None:
        """Let go of a result, after so many publications, which may come in any order."""
        if token in self._kept:
            self._kept[token].last = publications
            self._drop(token)

    def _drop(self, token: str) -> None:
        kept = self._kept[token]
        if kept.last is not None and kept.publications >= kept.last:
            kept.end_loans()
            del self._kept[token]
            _rows.pop(token.rpartition(":")[0], None)


@contextmanager
def claimed(kept: Mapping[str, Kept]) -> Generator[None, None, None]:
    """Within this context, batches read from these places and not from shared memory."""
    token = _claims.set(kept)
    try:
        yield
    finally:
        _claims.reset(token)


def kept_here(token: str) -> Kept | None:
    """The result of this token, if the running call claimed it in its own process."""
    return _claims.get({}).get(token)


def known_rows(call: str) -> tuple[int | None, ...] | None:
    """The rows that each rank's result of a call has, if this process was told."""
    return _rows.get(call)


def remember_rows(call: str, rows: tuple[int | None, ...]) -> None:
    """Tell it, for as long as one of the results is here."""
    if any(token.rpartition(":")[0] == call for token in _claims.get({})):
        _rows[call] = rows


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run what may wait in a thread of its own: those of asyncio's pool could all be waiting for
    something that needs one of them.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            setter(value)

    def run() -> None:
        try:
            outcome = done.set_result, context.run(function, *args)
        except BaseException as error:
            outcome = done.set_exception, error
        loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, daemon=True, name=function.__name__).start()
    return await done


class ShelfTasks:
    """The tasks of a host that runs its calls in the order in which they were sent."""

    _shelf: Shelf

    @ray.method(num_returns=2)
    def publish(self, token: str, wanted: Any = None, lends: bool = False) -> tuple[Any, Any]:
        """The batch, for shared memory, and how many bytes that took.

        `wanted`: futures that other hosts will read; nothing is published if none needs this.
        `lends`: memory on a device is lent to them instead, until the release.
        """
        kept = self._shelf.publication(token)
        with claimed({token: kept}):
            return kept.published(lends) if _is_needed(token, wanted) else (None, 0)

    def release(self, token: str, publications: int, turn: Any) -> None:
        """Let go of a result; calls that were sent before this have read it."""
        self._shelf.release(token, publications)


class AsyncShelfTasks:
    """The same for a host on an event loop, where tasks start in any order.

    A result that is not there yet is waited for. `release` has its turn among the calls; these
    claim in theirs what they read. Publications are counted.
    """

    _shelf: Shelf

    @ray.method(num_returns=2)
    async def publish(self, token: str, wanted: Any = None, lends: bool = False) -> tuple[Any, Any]:
        kept = self._shelf.publication(token)
        await kept.made.wait()
        with claimed({token: kept}):
            needed = wanted is None or await in_thread(_is_needed, token, wanted)
        return kept.published(lends) if needed else (None, 0)


def _is_needed(token: str, wanted: Any) -> bool:
    return wanted is None or any(token in needed_tokens(future) for future in wanted)


def needed_tokens(future: Any) -> set[str]:
    """The results that a future reads rows of; waits until the rows are known. None if they never
    are: whoever reads it runs into the same, and says so.
    """
    try:
        needed = list(future.needed(0, future.rows()))
    except Exception:
        return set()
    return {origin.token for origin in needed if hasattr(origin, "token")}
