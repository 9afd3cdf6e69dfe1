"""The values that dispatch works with: markers, layouts, calls, plans. The modes are in
`dispatch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from single_controller.errors import DispatchError

__all__ = ["Broadcast", "Call", "Layout", "Padding", "PerRank", "Plan", "named_arguments"]

T = TypeVar("T")


@dataclass(frozen=True)
class Broadcast(Generic[T]):
    """Marks an argument that every rank gets whole, whatever the mode does with others."""

    value: T

    def as_input(self) -> T:
        """This mark itself, as the value that a method declares, for type checkers."""
        itself: Any = self
        return itself  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PerRank(Generic[T]):
    """Marks an argument of which rank i gets `values[i]`, whatever the mode does with others.

    Raises:
        DispatchError: `values` have no length, or no order.
    """

    values: Sequence[T]

    def __post_init__(self) -> None:
        if not _is_list(self.values):
            raise DispatchError(f"PerRank needs a list, one value per rank; got {self.values!r}")

    def as_input(self) -> T:
        """This mark itself, as the value that a method declares, for type checkers."""
        itself: Any = self
        return itself  # type: ignore[no-any-return]


def _is_list(values: Any) -> bool:
    """Whether it has a length, as a tensor without dimensions has not, and an order."""
    try:
        len(values)
    except TypeError:
        return False
    return hasattr(values, "__getitem__") and not isinstance(values, Mapping)


@dataclass(frozen=True)
class Layout:
    """What a mode needs to know of a group.

    `dp_ranks[i]`, below `dp_size`, is the shard that rank i gets; `collects[i]` tells whether
    its output counts.
    """

    dp_ranks: tuple[int, ...]
    collects: tuple[bool, ...]
    dp_size: int

    @classmethod
    def flat(cls, world_size: int) -> Layout:
        """Every rank is its own data-parallel rank."""
        return cls(tuple(range(world_size)), (True,) * world_size, world_size)

    @property
    def world_size(self) -> int:
        return len(self.dp_ranks)

    def subset(self, ranks: Sequence[int]) -> Layout:
        """The layout of these ranks alone, their shards numbered anew in the order they come."""
        kept = list(dict.fromkeys(self.dp_ranks[rank] for rank in ranks))
        return Layout(
            tuple(kept.index(self.dp_ranks[rank]) for rank in ranks),
            tuple(self.collects[rank] for rank in ranks),
            len(kept),
        )

    def collecting_ranks(self) -> tuple[int, ...]:
        """The ranks whose outputs count, in the order of their shards."""
        ranks = [rank for rank, collects in enumerate(self.collects) if collects]
        return tuple(sorted(ranks, key=lambda rank: (self.dp_ranks[rank], rank)))


@dataclass(frozen=True)
class Call:
    """One rank's arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def values(self) -> tuple[Any, ...]:
        """The positional ones, then those by name."""
        return (*self.args, *self.kwargs.values()) if self.kwargs else self.args


@dataclass(frozen=True)
class Padding:
    """Rows that dispatch added behind `rows` real ones, so that `parts` shards come out equal."""

    rows: int
    parts: int

    @property
    def shard_rows(self) -> int:
        return -(-self.rows // self.parts)

    @property
    def added(self) -> int:
        return self.shard_rows * self.parts - self.rows

    def real_rows(self, part: int) -> int:
        """How many rows of shard `part` were in the caller's batch."""
        return min(self.shard_rows, max(0, self.rows - part * self.shard_rows))


@dataclass(frozen=True)
class Plan:
    """What dispatch decided for a call, kept until collect.

    `answers` are the ranks whose outputs collect reads, in its order, and `shards` the shard
    that each of them got. `padding` is a function because the rows of a future are known only
    once it is done. `auto_padding`: a future of the result may be padded in turn.
    """

    answers: tuple[int, ...]
    shards: tuple[int, ...] = ()
    padding: Callable[[], Padding] | None = None
    auto_padding: bool = False


def named_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each argument of a call under the name that errors have for it."""
    for i, value in enumerate(args):
        yield f"argument {i}", value
    for key, value in kwargs.items():
        yield f"argument {key!r}", value
