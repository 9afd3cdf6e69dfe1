"""A batch that is still in the workers: which rows come from where, computed when asked for.

Where the rows are and how they travel is left to the backend, which supplies the sources.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch

from protocol import checks
from protocol.batches import (
    Batch,
    concat_batches,
    copy_batch,
    on_one_device,
    pad_batch,
    select_keys,
    union_batches,
)
from protocol.data_proto import DataProto
from protocol.errors import BatchError, BatchTypeError, ChunkError, RowCountError
from protocol.shards import balanced_sizes, equal_sizes, padded_sizes
from protocol.wire import read_as, reading

__all__ = ["DataProtoFuture", "How", "Source"]

How: TypeAlias = Literal["equal", "balanced", "padded"]

_SIZES: dict[str, Callable[[int, int], list[int]]] = {
    "equal": equal_sizes,
    "balanced": balanced_sizes,
    "padded": padded_sizes,
}


@runtime_checkable
class Source(Protocol):
    """Rows that someone is producing. It must be picklable, for consumers in other processes."""

    def rows(self, timeout: float | None) -> int:  # pyright: ignore[reportReturnType]
        """Wait for the producer and return how many rows it made; moves no data.

        Raises:
            TimeoutError: not done within `timeout` seconds.
        """

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:  # pyright: ignore[reportReturnType]
        """Wait for the producer and bring its rows `start:stop`, which may be none, here.

        They are private unless the reader asked for views (`protocol.wire.reading`).

        Raises:
            TimeoutError: not done within `timeout` seconds.
        """


class DataProtoFuture:
    """The rows of several sources, one after another, as one batch that is not here yet.

    It can be pickled, and is itself a Source. Every method but `get`, `fetch`, `rows` and `len()`
    returns at once; what does not fit together is then reported by these four.

    Attributes:
        auto_padding: whether a group may pad it when its rows do not divide over the ranks.
        map_location: where `get` puts the tensors unless told otherwise.
    """

    __slots__ = ("_sizes", "_sources", "auto_padding", "map_location")

    def __init__(
        self,
        sources: Sequence[Source],
        auto_padding: bool = False,
        map_location: torch.device | str | None = None,
    ) -> None:
        """The rows of `sources`, in that order. Fetches and waits for nothing.

        Raises:
            BatchError: no source, so that not even the columns of zero rows could be known.
            BatchTypeError: something that is no source.
        """
        if not checks.list_of(object, "sources", sources):
            raise BatchError("a DataProtoFuture needs at least one source; got none")
        for i, source in enumerate(sources):
            if not (hasattr(source, "rows") and hasattr(source, "fetch")):
                raise BatchTypeError(
                    f"sources[{i}] must have rows and fetch, as a Source has; got "
                    f"{type(source).__name__} {checks.short(source)}: a group's method registered "
                    "with blocking=False, or pin(data), gives a future"
                )
        self._sources = tuple(sources)
        self._sizes: tuple[int, ...] | None = None  # rows per source, once all are known
        self.auto_padding, self.map_location = auto_padding, map_location

    def __repr__(self) -> str:
        rows = "?" if self._sizes is None else sum(self._sizes)
        return f"DataProtoFuture(rows={rows}, sources={len(self._sources)})"

    def __len__(self) -> int:
        """Number of rows. Waits for all producers, fetches nothing."""
        return self.rows()

    def rows(self, timeout: float | None = None) -> int:
        """Number of rows. Waits for all producers, fetches nothing.

        Raises:
            TimeoutError: they were not done within `timeout` seconds.
            BatchTypeError: `timeout` is no number. BatchError: it is negative.
        """
        return sum(self._rows_per_source(_Deadline(timeout)))

    def _rows_per_source(self, deadline: _Deadline) -> tuple[int, ...]:
        if self._sizes is None:
            self._sizes = tuple(source.rows(deadline.left()) for source in self._sources)
        return self._sizes

    def as_input(self) -> DataProto:
        """This future itself, as the batch that a method declares, for type checkers:

        future = rollout[Rollout.generate](prompts)
        actor[Actor.update](future.as_input())
        """
        itself: Any = self
        return itself  # type: ignore[no-any-return]

    def get(
        self, timeout: float | None = None, map_location: torch.device | str | None = None
    ) -> Batch:
        """Wait for all producers and fetch all rows.

        Args:
            map_location: where the tensors go; by default where the future says, else on the
                driver to the CPU.

        Raises:
            TimeoutError: the rows were not here within `timeout` seconds.
            BatchTypeError: `timeout` is no number. BatchError: it is negative.
        """
        deadline = _Deadline(timeout)
        batch = self.fetch(0, self.rows(timeout), deadline.left())
        place = self.map_location if map_location is None else map_location
        return batch if place is None else batch.to(place)

    @property
    def futures(self) -> list[Any]:
        """A reference per rank that makes rows, as the backend has them: `ray.get(future.futures)`
        waits until all have finished. What that gives is no batch; those stay where they are.
        """
        origins: list[Any] = list(self.origins())
        return [origin.reference for origin in origins if hasattr(origin, "reference")]

    def __await__(self) -> Generator[Any, None, Batch]:
        """What `get` gives, while the event loop runs on. An `await` that is cancelled, as by
        `asyncio.wait_for`, returns at once; the rows can still be had.
        """
        return self._arrived().__await__()

    async def _arrived(self) -> Batch:
        """A source says by `arrive(whole)` how its rows, then the `whole` batch, are awaited, and
        whether they came; `get` in a thread finds out what went wrong, and asks those that cannot.
        """
        for whole in (False, True):
            sources = dict.fromkeys(self.needed(0, self.rows()) if whole else self.origins())
            waits = [getattr(source, "arrive", None) for source in sources]
            if not all(waits) or not all(await asyncio.gather(*(w(whole) for w in waits if w))):
                return await asyncio.to_thread(self.get)
        return self.get()

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Batch:
        """Fetch rows `start:stop`, only from the sources that have some of them.

        All rows come from all sources, so that the meta_info of one without rows is not lost.
        No rows are fetched as such, from one source, for their columns.

        Raises:
            RowCountError: not 0 <= start <= stop <= rows.
            TimeoutError: the rows were not here within `timeout` seconds.
            BatchTypeError: `start`, `stop` or `timeout` is no number.
        """
        start, stop = checks.count("start", start, None), checks.count("stop", stop, None)
        deadline = _Deadline(timeout)
        parts = self._parts(start, stop, deadline)
        if len(parts) == 1:
            ((source, first, last),) = parts
            return source.fetch(first, last, deadline.left())
        with read_as("join"):
            found = [source.fetch(a, b, deadline.left()) for source, a, b in parts]
            try:
                return concat_batches(on_one_device(found))
            except BatchError as error:
                raise self._not_joined(error) from None

    def _not_joined(self, error: BatchError) -> BatchError:
        makers = sorted({str(getattr(origin, "title", "")) for origin in self.origins()} - {""})
        if not makers:
            return error
        return type(error)(f"{', '.join(makers)}: the ranks' outputs cannot be joined: {error}")

    def _parts(self, start: int, stop: int, deadline: _Deadline) -> list[tuple[Source, int, int]]:
        """The sources that rows `start:stop` come from, each with its own rows."""
        sizes = self._rows_per_source(deadline)
        if not 0 <= start <= stop <= sum(sizes):
            raise RowCountError(f"rows {start}:{stop} are not in a batch of {sum(sizes)} rows")
        whole, parts = (start, stop) == (0, sum(sizes)), []
        for source, size, end in zip(self._sources, sizes, accumulate(sizes), strict=True):
            first, last = max(start, end - size), min(stop, end)
            if first < last or whole:
                offset = end - size
                parts.append((source, first - offset, last - offset))
        if not parts:
            filled = next((i for i, size in enumerate(sizes) if size), 0)
            return [(self._sources[filled], 0, 0)]
        return parts

    def origins(self) -> Iterator[Source]:
        """The sources at the bottom, which futures of futures are made of. Waits for nothing."""
        return (origin for source in self._sources for origin in _origins(source))

    def needed(self, start: int, stop: int) -> Iterator[Source]:
        """Those of them that `fetch` of rows `start:stop` asks. Waits for all producers."""
        for source, first, last in self._parts(start, stop, _Deadline(None)):
            yield from _needed(source, first, last)

    def chunk(self, chunks: int) -> list[DataProtoFuture]:
        """`chunks` futures of equally many consecutive rows. Fetches and waits for nothing.

        If the rows do not divide, each of them raises ChunkError once they are known, or with
        `auto_padding` sizes differ by one.

        Raises:
            ChunkError: `chunks` is less than one.
        """
        shards = self.shards(chunks, "balanced" if self.auto_padding else "equal")
        return [self._derived([shard]) for shard in shards]

    def shards(self, parts: int, how: How, advice: str = "") -> list[DataProtoFuture]:
        """`parts` futures of consecutive rows. Fetches and waits for nothing.

        "equal": each has the same number of rows; if they do not divide, each raises ChunkError
        once they are known, which ends in `advice`. "balanced": they differ by at most one row,
        larger ones first. "padded": each has ceil(rows / parts), the last row being repeated to
        fill up.

        Raises:
            BatchError: another `how`.
            ChunkError: `parts` is less than one.
        """
        if not isinstance(how, str) or how not in _SIZES:
            raise BatchError(f"how must be one of {list(_SIZES)}; got {how!r}")
        _SIZES[how](0, parts)  # refuses what is wrong whatever the rows
        return [DataProtoFuture([_Shard(self, part, parts, how, advice)]) for part in range(parts)]

    @staticmethod
    def concat(data: Sequence[DataProtoFuture]) -> DataProtoFuture:
        """All rows of all futures, in order. Fetches and waits for nothing.

        Raises:
            BatchError: no future.
        """
        futures = checks.list_of(DataProtoFuture, "data", data)
        padding = any(future.auto_padding for future in futures)
        return DataProtoFuture(futures, padding, futures[0].map_location if futures else None)

    def select(self, keys: Iterable[str]) -> DataProtoFuture:
        """Only these columns, which are all that whoever fetches rows keeps. Fetches nothing.

        A key that is not there raises MissingKeyError when rows are fetched.

        Raises:
            BatchTypeError: `keys` is neither a key nor a list of some.
        """
        names = checks.keys_or_key("keys", keys)
        return self._derived([_Columns(source, names) for source in self._sources])

    def union(self, other: Source) -> DataProtoFuture:
        """The columns of both. Fetches nothing now; later the same rows from either.

        Different numbers of rows raise RowCountError once they are known, different values
        under one key ConflictError when rows are fetched.

        Raises:
            BatchTypeError: `other` is no future, nor any other source.
        """
        if not isinstance(other, Source):
            raise BatchTypeError(
                f"other must be a DataProtoFuture; got {type(other).__name__}: make it one by "
                "pin(other), or join batches, future.get().union(other)"
            )
        return self._derived([_Union(self, other)], getattr(other, "auto_padding", False))

    def _derived(self, sources: Sequence[Source], auto_padding: bool = False) -> DataProtoFuture:
        return DataProtoFuture(sources, self.auto_padding or auto_padding, self.map_location)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """In another process rows stay where they arrive: `map_location` is of this one."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return None, {**state, "map_location": None}


class _Deadline:
    """One time limit over several waits."""

    def __init__(self, timeout: float | None) -> None:
        left = None if timeout is None else checks.seconds("timeout", timeout)
        self._end = None if left is None else time.monotonic() + left

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


@dataclass(frozen=True)
class _Shard:
    """Part number `part` of `parts`. "padded" ones may reach behind the last row."""

    whole: DataProtoFuture
    part: int
    parts: int
    how: How
    advice: str

    def rows(self, timeout: float | None) -> int:
        return self._sizes(self.whole.rows(timeout))[self.part]

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        deadline = _Deadline(timeout)
        first, last, padding = self._rows_of_whole(start, stop, timeout)
        batch = self.whole.fetch(first, last, deadline.left())
        return pad_batch(batch, padding) if padding else batch

    def origins(self) -> Iterator[Source]:
        return self.whole.origins()

    def needed(self, start: int, stop: int) -> Iterator[Source]:
        first, last, _ = self._rows_of_whole(start, stop, None)
        return self.whole.needed(first, last)

    def _sizes(self, rows: int) -> list[int]:
        try:
            return _SIZES[self.how](rows, self.parts)
        except ChunkError as error:
            raise ChunkError(f"{error}{self.advice}") from None

    def _rows_of_whole(self, start: int, stop: int, timeout: float | None) -> tuple[int, int, int]:
        """`(first, last, padding)`: rows `first:last` of the whole, the last one padded."""
        rows = self.whole.rows(timeout)
        offset = sum(self._sizes(rows)[: self.part])
        first, last = min(offset + start, rows), min(offset + stop, rows)
        padding = (stop - start) - (last - first)
        if padding and first == last:  # nothing but copies of the last row
            first, padding = rows - 1, padding - 1
        return first, last, padding


@dataclass(frozen=True)
class _Columns:
    """Some columns of a batch."""

    source: Source
    keys: tuple[str, ...]

    def rows(self, timeout: float | None) -> int:
        return self.source.rows(timeout)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        how = reading()
        with read_as("join" if how == "own" else how):  # the other columns are not copied
            batch = select_keys(self.source.fetch(start, stop, timeout), self.keys)
        return copy_batch(batch) if how == "own" else batch

    def origins(self) -> Iterator[Source]:
        return _origins(self.source)

    def needed(self, start: int, stop: int) -> Iterator[Source]:
        return _needed(self.source, start, stop)


@dataclass(frozen=True)
class _Union:
    """The columns of two batches of equally many rows."""

    left: Source
    right: Source

    def rows(self, timeout: float | None) -> int:
        deadline = _Deadline(timeout)
        left, right = self.left.rows(timeout), self.right.rows(deadline.left())
        if left != right:
            raise RowCountError(f"a union needs equally many rows; got {left} and {right}")
        return left

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        deadline = _Deadline(timeout)
        left = self.left.fetch(start, stop, timeout)
        return union_batches(*on_one_device([left, self.right.fetch(start, stop, deadline.left())]))

    def origins(self) -> Iterator[Source]:
        return chain(_origins(self.left), _origins(self.right))

    def needed(self, start: int, stop: int) -> Iterator[Source]:
        return chain(_needed(self.left, start, stop), _needed(self.right, start, stop))


def _origins(source: Any) -> Iterator[Source]:
    """What a source is made of: itself, unless it is made of others and says so."""
    return source.origins() if hasattr(source, "origins") else iter([source])


def _needed(source: Any, start: int, stop: int) -> Iterator[Source]:
    return source.needed(start, stop) if hasattr(source, "needed") else iter([source])
