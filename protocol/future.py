"""A batch that is still in the workers: which rows come from where, computed when asked for.

Where the rows are and how they travel is left to the backend, which supplies the sources.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch

from protocol import batches
from protocol.batches import Batch
from protocol.checks import balanced_sizes, equal_sizes, padded_sizes
from protocol.data_proto import DataProto
from protocol.errors import BatchError, BatchTypeError, ChunkError, RowCountError
from protocol.wire import read_as, reading

__all__ = ["DataProtoFuture", "How", "Source", "origins"]

How: TypeAlias = Literal["equal", "balanced", "padded"]

_Left: TypeAlias = "Callable[[], float | None]"
_Parts: TypeAlias = "list[tuple[Source, int, int]]"
_Span: TypeAlias = "tuple[int, int, int]"  # first row, row behind the last, copies of the last
_SIZES: dict[str, Callable[[int, int], list[int]]] = {
    "equal": equal_sizes,
    "balanced": balanced_sizes,
    "padded": padded_sizes,
}


@runtime_checkable
class Source(Protocol):
    """Rows that someone is producing. It must be picklable, and raises TimeoutError where they are
    not there within `timeout` seconds.

    It may have more: `title`, for messages; `reference`, for `DataProtoFuture.futures`; `async
    arrive(whole)`, which waits on the event loop for its rows to be known, or for the `whole`
    batch, and returns whether they came; and `select(keys, strict)`, which fetches these columns
    only, or without `strict` those of them that there are.
    """

    def rows(self, timeout: float | None) -> int:  # pyright: ignore[reportReturnType]
        """How many there are; moves no data."""

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:  # pyright: ignore[reportReturnType]
        """Rows `start:stop`, which may be none; private unless the reader asked for views
        (`protocol.wire.reading`).
        """


class _View:
    """A source that is made of others, which have the same rows unless it says otherwise."""

    __slots__ = ()
    _sources: tuple[Any, ...]

    def rows(self, timeout: float | None) -> int:
        return int(self._sources[0].rows(timeout))

    def narrowed(self, start: int, stop: int) -> Source:
        """These rows, made of nothing that has none of them. Waits for all producers."""
        return self._of([_narrowed(source, start, stop) for source in self._sources])

    def some(self, keys: Sequence[str], strict: bool) -> Source:
        """The same without other columns than these, where the sources can leave them out."""
        return self._of([_some(source, keys, strict) for source in self._sources])

    def _of(self, sources: Sequence[Source]) -> Source:
        made: Any = self
        return replace(made, _sources=tuple(sources))  # type: ignore[no-any-return]


def origins(sources: Iterable[Source]) -> Iterator[Source]:
    """The sources at the bottom of futures of futures, each once. Waits for nothing."""
    seen, left = set[int](), [*sources][::-1]
    while left:
        source = left.pop()
        if id(source) not in seen:
            seen.add(id(source))
            if isinstance(source, _View):
                left += source._sources[::-1]
            else:
                yield source


def _narrowed(source: Source, start: int, stop: int) -> Source:
    if isinstance(source, _View):
        return source.narrowed(start, stop)
    return source if (start, stop) == (0, source.rows(None)) else _Rows((source,), (start, stop, 0))


def _some(source: Any, keys: Sequence[str], strict: bool) -> Source:
    if isinstance(source, _View):
        return source.some(keys, strict)
    return source.select(keys, strict) if hasattr(source, "select") else source  # type: ignore[no-any-return]


class DataProtoFuture(_View):
    """The rows of several sources, one after another, as one batch that is not here yet.

    It can be pickled, and is itself a Source. `get`, `fetch`, `rows` and `len()` wait, and report
    what does not fit together; all else returns at once and fetches nothing.

    Attributes:
        auto_padding: whether a group may pad it when its rows do not divide over the ranks.
    """

    __slots__ = ("_ends", "_sources", "auto_padding")

    def __init__(self, sources: Sequence[Source], auto_padding: bool = False) -> None:
        """The rows of `sources`, in that order.

        Raises:
            BatchError: no source, so that not even the columns of zero rows could be known.
        """
        if not sources:
            raise BatchError("a DataProtoFuture needs at least one source; got none")
        self._sources = tuple(sources)
        self._ends: tuple[int, ...] = ()  # rows up to the end of each source, once all are known
        self.auto_padding = auto_padding

    def __repr__(self) -> str:
        rows = self._ends[-1] if self._ends else "?"
        return f"DataProtoFuture(rows={rows}, sources={len(self._sources)})"

    def __len__(self) -> int:
        return self.rows()

    def rows(self, timeout: float | None = None) -> int:
        """How many there are. Waits for all producers, fetches nothing.

        Raises:
            TimeoutError: they were not done within `timeout` seconds.
        """
        if not self._ends:
            left = _deadline(timeout)
            self._ends = tuple(accumulate(source.rows(left()) for source in self._sources))
        return self._ends[-1]

    def as_input(self) -> DataProto:
        """This future itself, as the batch that a method declares, for type checkers:

        actor.update(rollout.generate(prompts).as_input())
        """
        itself: Any = self
        return itself  # type: ignore[no-any-return]

    def get(
        self, timeout: float | None = None, map_location: torch.device | str | None = None
    ) -> Batch:
        """Wait for all producers and fetch all rows.

        Args:
            map_location: where the tensors go; on the driver by default to the CPU.

        Raises:
            TimeoutError: the rows were not here within `timeout` seconds.
        """
        left = _deadline(timeout)
        batch = self.fetch(0, self.rows(timeout), left())
        return batch if map_location is None else batch.to(map_location)

    @property
    def futures(self) -> list[Any]:
        """A reference per rank that makes rows, as the backend has them: `ray.get(future.futures)`
        waits until all have finished. What that gives is no batch; those stay where they are.
        """
        made: Iterator[Any] = origins([self])
        return [origin.reference for origin in made if hasattr(origin, "reference")]

    def __await__(self) -> Generator[Any, None, Batch]:
        """What `get` gives, while the event loop runs on. An `await` that is cancelled, as by
        `asyncio.wait_for`, returns at once; the rows can still be had.
        """
        return self._arrived().__await__()

    async def _arrived(self) -> Batch:
        """`get`, in a thread if something went wrong, or a source cannot be awaited."""
        for whole in (False, True):
            made = self.narrowed(0, self.rows()) if whole else self
            waits = [getattr(source, "arrive", None) for source in origins([made])]
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
        """
        left = _deadline(timeout)
        parts = self._parts(start, stop, left)
        if len(parts) == 1:
            ((source, first, last),) = parts
            return source.fetch(first, last, left())
        with read_as("join"):
            found = [source.fetch(a, b, left()) for source, a, b in parts]
            try:
                return batches.concat_batches(batches.on_one_device(found))
            except BatchError as error:
                titles = sorted({getattr(o, "title", "") for o in origins([self])} - {""})
                made = f"{', '.join(titles)}: the ranks' outputs cannot be joined: "
                raise type(error)(f"{made if titles else ''}{error}") from None

    def narrowed(self, start: int, stop: int) -> DataProtoFuture:
        return self._of([_narrowed(*part) for part in self._parts(start, stop, _deadline(None))])

    def resolved(self) -> DataProtoFuture:
        """All rows `narrowed`; if that fails, a future that raises why. Waits for all producers."""
        try:
            return self.narrowed(0, self.rows())
        except Exception as error:
            return self._of([_Rows((), partial(_fail, error))])

    def _parts(self, start: int, stop: int, left: _Left) -> _Parts:
        rows, parts = self.rows(left()), []
        _inside(start, stop, rows)
        whole = (start, stop) == (0, rows)
        at = 0 if whole else bisect_right(self._ends, start)
        while (whole and at < len(self._ends)) or start < stop:
            begin, end = self._ends[at - 1] if at else 0, min(stop, self._ends[at])
            if start < end or whole:
                parts.append((self._sources[at], start - begin, end - begin))
            start, at = end, at + 1
        filled = bisect_right(self._ends, 0) % len(self._ends)
        return parts or [(self._sources[filled], 0, 0)]

    def slice(self, start: int, stop: int) -> DataProtoFuture:
        """Rows `start:stop`; if they are not all there, a RowCountError once rows are known."""
        return self._of([_Rows((self,), partial(_inside, start, stop))])

    def chunk(self, chunks: int) -> list[DataProtoFuture]:
        """`chunks` futures of equally many consecutive rows. If these do not divide, each raises
        ChunkError once they are known, or with `auto_padding` sizes differ by one.

        Raises:
            ChunkError: `chunks` is less than one.
        """
        shards = self.shards(chunks, "balanced" if self.auto_padding else "equal")
        return [self._of([shard]) for shard in shards]

    def shards(self, parts: int, how: How, advice: str = "") -> list[DataProtoFuture]:
        """`parts` futures of consecutive rows.

        "equal": each has the same number of rows; if they do not divide, each raises ChunkError
        once they are known, which ends in `advice`. "balanced": they differ by at most one row,
        larger ones first. "padded": each has ceil(rows / parts), the last row being repeated to
        fill up.

        Raises:
            ChunkError: `parts` is less than one.
        """
        _SIZES[how](0, parts)  # refuses what is wrong whatever the rows
        spans = [partial(_shard, part, parts, how, advice) for part in range(parts)]
        return [DataProtoFuture([_Rows((self,), span)]) for span in spans]

    def counted(self, count: Callable[..., int], *others: DataProtoFuture) -> DataProtoFuture:
        """The first `count(rows, …)` rows; it gets the rows of the `others` too, and what it raises
        whoever reads this gets.
        """
        return self._of([_Rows((self, *others), partial(_first, count))])

    @staticmethod
    def concat(data: Sequence[DataProtoFuture]) -> DataProtoFuture:
        """All rows of all futures, in order.

        Raises:
            BatchError: no future.
        """
        padding = any(future.auto_padding for future in data)
        return DataProtoFuture(data, padding)

    def select(self, keys: Iterable[str]) -> DataProtoFuture:
        """Only these columns: no others leave the worker that made them.

        A key that is not there raises MissingKeyError when rows are fetched.
        """
        names = (keys,) if isinstance(keys, str) else tuple(keys)
        return self._of([_Columns((_some(s, names, strict=True),), names) for s in self._sources])

    def union(self, other: Source) -> DataProtoFuture:
        """The columns of both. Different numbers of rows raise RowCountError once they are known,
        different values under one key ConflictError when rows are fetched.

        Raises:
            BatchTypeError: `other` is no future, nor any other source.
        """
        if not isinstance(other, Source):
            raise BatchTypeError(
                f"other must be a DataProtoFuture; got {type(other).__name__}: make it one by "
                "pin(other), or join batches, future.get().union(other)"
            )
        joined = self._of([_Union((self, other))])
        joined.auto_padding |= getattr(other, "auto_padding", False)
        return joined

    def _of(self, sources: Sequence[Source]) -> DataProtoFuture:
        return DataProtoFuture(sources, self.auto_padding)


def _deadline(timeout: float | None) -> _Left:
    """One time limit over several waits: what is left of it."""
    if timeout is None:
        return lambda: None
    end = time.monotonic() + float(timeout)
    return lambda: max(0.0, end - time.monotonic())


@lru_cache(maxsize=64)
def _ends(how: How, rows: int, parts: int) -> tuple[int, ...]:
    """Where each part ends, after the start of the first."""
    return tuple(accumulate(_SIZES[how](rows, parts), initial=0))


def _shard(part: int, parts: int, how: How, advice: str, rows: int) -> _Span:
    """Part number `part` of so many rows."""
    try:
        start, stop = _ends(how, rows, parts)[part : part + 2]
    except ChunkError as error:
        raise ChunkError(f"{error}{advice}") from None
    return _within((0, rows, 0), start, stop)


def _inside(start: int, stop: int, rows: int) -> _Span:
    """Rows `start:stop`, which must be there."""
    if not 0 <= start <= stop <= rows:
        raise RowCountError(f"rows {start}:{stop} are not in a batch of {rows} rows")
    return start, stop, 0


def _fail(error: Exception) -> _Span:
    raise error


def _first(count: Callable[..., int], *rows: int) -> _Span:
    return 0, count(*rows), 0


def _within(span: _Span, start: int, stop: int) -> _Span:
    """Rows `start:stop` of a span."""
    first, last = (min(span[0] + row, span[1]) for row in (start, stop))
    padding = (stop - start) - (last - first)
    if padding and first == last:  # nothing but copies of the last row
        first, padding = last - 1, padding - 1
    return first, last, padding


@dataclass(frozen=True)
class _Rows(_View):
    """Some rows of a source: which ones, `span` may say only once it is told how many there are."""

    _sources: tuple[Source, ...]  # the first has the rows; `span` wants to know how many all have
    span: _Span | Callable[..., _Span]

    def _known(self, timeout: float | None) -> _Span:
        span, left = self.span, _deadline(timeout)
        return span if isinstance(span, tuple) else span(*(s.rows(left()) for s in self._sources))

    def rows(self, timeout: float | None) -> int:
        first, last, padding = self._known(timeout)
        return last - first + padding

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        left = _deadline(timeout)
        first, last, padding = _within(self._known(timeout), start, stop)
        batch = self._sources[0].fetch(first, last, left())
        return batches.pad_batch(batch, padding) if padding else batch

    def some(self, keys: Sequence[str], strict: bool) -> Source:
        first = [_some(source, keys, strict) for source in self._sources[:1]]
        return self._of([*first, *self._sources[1:]])

    def narrowed(self, start: int, stop: int) -> Source:
        first, last, padding = _within(self._known(None), start, stop)
        source = _narrowed(self._sources[0], first, last)
        return _Rows((source,), (0, last - first, padding)) if padding else source


@dataclass(frozen=True)
class _Columns(_View):
    """Some columns of a batch."""

    _sources: tuple[Source]
    keys: tuple[str, ...]

    def some(self, keys: Sequence[str], strict: bool) -> Source:
        """Those of them that are chosen; if one is not there, it is for the reader to say so."""
        chosen = tuple(key for key in self.keys if key in keys)
        if strict and not set(keys) <= set(chosen):
            return self
        return _Columns((_some(self._sources[0], chosen, strict),), chosen)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        how = reading()
        with read_as("join" if how == "own" else how):  # the other columns are not copied
            batch = batches.select_keys(self._sources[0].fetch(start, stop, timeout), self.keys)
        return batches.copy_batch(batch) if how == "own" else batch


@dataclass(frozen=True)
class _Union(_View):
    """The columns of two batches of equally many rows."""

    _sources: tuple[Source, Source]

    def some(self, keys: Sequence[str], strict: bool) -> Source:
        """Which of the two has a column, is not known."""
        return super().some(keys, strict=False)

    def rows(self, timeout: float | None) -> int:
        left = _deadline(timeout)
        one, other = (source.rows(left()) for source in self._sources)
        if one != other:
            raise RowCountError(f"a union needs equally many rows; got {one} and {other}")
        return one

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        left = _deadline(timeout)
        found = [source.fetch(start, stop, left()) for source in self._sources]
        return batches.union_batches(*batches.on_one_device(found))
