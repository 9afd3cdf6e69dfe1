"""The rows of a call's batches: that those which are padded have as many, and which are padding.

Splitting and joining them is left to the modes in `dispatch`. `protocol` is imported on use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

from single_controller.base.plan import Padding
from single_controller.errors import DispatchError

if TYPE_CHECKING:
    from protocol import DataProtoFuture
    from protocol.future import Source

__all__ = [
    "AUTO_PADDING",
    "RealRows",
    "aligned",
    "cannot_unpad",
    "check_batch",
    "goes_whole",
    "is_future",
    "padding_enabled",
    "padding_of",
    "padding_setting",
    "splits",
]

AUTO_PADDING = "VERL_AUTO_PADDING"


def is_future(value: Any) -> TypeGuard[DataProtoFuture]:
    """Whether it is a `DataProtoFuture`; where its module is not loaded, there can be none."""
    module = sys.modules.get("protocol.future")
    return module is not None and isinstance(value, module.DataProtoFuture)


def check_batch(name: str, value: Any) -> None:
    """Raise DispatchError for a DataProto whose columns somebody made differ in rows."""
    module = sys.modules.get("protocol.data_proto")
    if module is not None and isinstance(value, module.DataProto):
        from protocol.errors import BatchError

        try:
            value.check_consistency()
        except BatchError as error:
            raise DispatchError(f"{name}: {error}") from error


def splits(value: Any) -> bool:
    """Whether it is a batch, here or in the workers."""
    from protocol.batches import is_batch

    return is_future(value) or is_batch(value)


def goes_whole(value: Any) -> bool:
    """Whether it is a TensorDict without batch dim, which every rank gets."""
    from protocol.batches import has_rows, is_batch

    return is_batch(value) and not has_rows(value)


def padding_enabled(batch: Any) -> bool:
    """Whether a batch may be padded where its rows do not divide."""
    from protocol import DataProto, DataProtoConfig

    if isinstance(batch, DataProto):
        return batch.is_padding_enabled()
    return DataProtoConfig.auto_padding or (is_future(batch) and batch.auto_padding)


def padding_setting() -> str | None:
    """VERL_AUTO_PADDING for the workers: what DataProtoConfig was set to here, else as it is."""
    module = sys.modules.get("protocol.config")
    chosen = None if module is None else module.DataProtoConfig._auto_padding
    return os.environ.get(AUTO_PADDING) if chosen is None else str(int(chosen))


def padding_of(rows: int | DataProtoFuture, parts: int) -> Padding:
    """What is added to so many rows; waits for those of a future."""
    return Padding(rows if isinstance(rows, int) else len(rows), parts)


def aligned(
    batches: Mapping[str, Any],
) -> tuple[int | DataProtoFuture, dict[int, DataProtoFuture]]:
    """The rows that all these arguments have, or the future that will tell, and by id what goes
    in place of the futures whose rows are still to be compared: they raise when they are read.

    Raises:
        DispatchError: batches that are here differ in rows, or one has none to split by.
    """
    here = {name: _count(name, batch) for name, batch in batches.items() if not is_future(batch)}
    if len({*here.values()}) > 1:
        raise _differing(here)
    first = next(iter(here or batches))
    rows: int | DataProtoFuture = here[first] if here else batches[first]
    late = {id(b): (name, b) for name, b in batches.items() if is_future(b) and b is not rows}
    if not late:
        return rows, {}
    from protocol import DataProtoFuture

    checks = {key: _Aligned(name, batch, first, rows) for key, (name, batch) in late.items()}
    return rows, {key: DataProtoFuture([check]) for key, check in checks.items()}


def _count(name: str, batch: Any) -> int:
    from protocol.batches import batch_rows
    from protocol.errors import BatchError

    try:
        return batch_rows(batch)
    except BatchError as error:
        raise DispatchError(f"{name}: {error}") from error


def _differing(rows: Mapping[str, int]) -> DispatchError:
    counts = ", ".join(f"{name} has {count}" for name, count in rows.items())
    return DispatchError(
        f"batches that are padded, or go with one that is, need equally many rows; {counts}. "
        "Broadcast(x) sends a batch whole, PerRank([...]) one to each rank"
    )


@dataclass(frozen=True)
class _Aligned:
    """A source of an argument's rows, which must be as many as another argument's."""

    name: str
    source: DataProtoFuture
    other: str
    expected: int | DataProtoFuture

    def rows(self, timeout: float | None) -> int:
        rows, expected = self.source.rows(timeout), self.expected
        if not isinstance(expected, int):
            expected = expected.rows(timeout)
        if rows != expected:
            raise _differing({self.other: expected, self.name: rows})
        return rows

    def fetch(self, start: int, stop: int, timeout: float | None) -> Any:
        return self.source.fetch(start, stop, timeout)

    def origins(self) -> Iterator[Source]:
        asked = () if isinstance(self.expected, int) else self.expected.origins()
        return chain(self.source.origins(), asked)

    def needed(self, start: int, stop: int) -> Iterator[Source]:
        return self.source.needed(start, stop)


@dataclass(frozen=True)
class RealRows:
    """A source of a shard's rows without its padding."""

    source: Source
    shard: int
    padding: Callable[[], Padding]

    def rows(self, timeout: float | None) -> int:
        rows, padding = self.source.rows(timeout), self.padding()
        if not padding.added:
            return rows
        if rows and rows != padding.shard_rows:
            raise cannot_unpad(self.shard, padding.shard_rows, rows)
        return min(rows, padding.real_rows(self.shard))

    def fetch(self, start: int, stop: int, timeout: float | None) -> Any:
        return self.source.fetch(start, stop, timeout)

    def origins(self) -> Iterator[Source]:
        yield self.source

    def needed(self, start: int, stop: int) -> Iterator[Source]:
        yield self.source


def cannot_unpad(shard: int, sent: int, came: int) -> DispatchError:
    """The error for a shard that came back with another number of rows than it went out with."""
    return DispatchError(
        f"padding cannot be removed: shard {shard} went out with {sent} rows and came back with "
        f"{came}. Register the method with uneven=True, which needs no padding"
    )
