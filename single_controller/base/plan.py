"""The values that a call is planned with: pools, layouts, markers, calls and plans.

The modes that make plans are in `dispatch`; reserving anything for a pool is left to the backends.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

from single_controller.errors import DispatchError, check_seconds

if TYPE_CHECKING:
    from protocol import DataProtoFuture

__all__ = [
    "Broadcast",
    "Call",
    "Handle",
    "Layout",
    "Padding",
    "PerRank",
    "Plan",
    "ResourcePool",
    "is_future",
    "is_late",
    "loaded",
    "named_arguments",
    "origins",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ResourcePool:
    """How many processes each node gets.

    Args:
        process_on_nodes: processes on node 0, 1, …; `[2, 4]` is six processes on two nodes.
        max_colocate_count: how many groups may share one process's resources.
        n_gpus_per_node: devices on each node, for programs that ask.

    Raises:
        ValueError: a count that is not a positive integer.
    """

    def __init__(
        self,
        process_on_nodes: Sequence[int] | None = None,
        max_colocate_count: int = 10,
        n_gpus_per_node: int = 8,
    ) -> None:
        self._store: list[int] = []
        for count in process_on_nodes or ():
            self.add_node(count)
        self.max_colocate_count = _count("max_colocate_count", max_colocate_count)
        self.n_gpus_per_node = n_gpus_per_node

    def add_node(self, process_count: int) -> None:
        """Append a node with `process_count` processes."""
        self._store.append(_count(f"process_on_nodes[{len(self._store)}]", process_count))

    @property
    def store(self) -> list[int]:
        """Processes per node (a copy)."""
        return list(self._store)

    @property
    def world_size(self) -> int:
        return sum(self.store)

    def __call__(self) -> list[int]:
        return self.store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store})"

    def local_world_size_list(self) -> list[int]:
        """For each rank, how many ranks its node has: `[2, 1]` gives `[2, 2, 1]`."""
        return [count for count in self.store for _ in range(count)]

    def local_rank_list(self) -> list[int]:
        """For each rank, its index on its node: `[2, 1]` gives `[0, 1, 0]`."""
        return [rank for count in self.store for rank in range(count)]


def _count(name: str, value: Any) -> int:
    if not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1):
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
    return int(value)


class _Mark(Generic[T_co]):
    def as_input(self) -> T_co:
        """This itself, as the value that a method declares, for type checkers."""
        itself: Any = self
        return itself  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Broadcast(_Mark[T]):
    """Marks an argument that every rank gets whole, whatever the mode does with others."""

    value: T


@dataclass(frozen=True)
class PerRank(_Mark[T]):
    """Marks an argument of which rank i gets `values[i]`, whatever the mode does with others.

    Raises:
        DispatchError: `values` have no length, or no order.
    """

    values: Sequence[T]

    def __post_init__(self) -> None:
        if isinstance(self.values, Mapping) or not hasattr(self.values, "__getitem__"):
            raise DispatchError(f"a list is needed, one value per rank; got {self.values!r}")


class Handle(_Mark[T_co]):
    """What one rank of a call has returned, or will: it stays there until someone asks.

    Passed to a method of a group, alone or within an argument, it arrives as the value; a role of
    the same process whose method is `reads_only` gets that itself.

        weights = trainer.weights()  # registered with blocking=False: a handle per rank
        rollout.load(weights[0])     # the value of rank 0, from process to process

    Tensors arrive without their gradients. Once nobody holds a handle, its worker lets go. One that
    is pickled is for processes of the same cluster.
    """

    def __init__(self, source: Any) -> None:
        self.source = source  # as those of a future of rows; its one row is the value

    def get(self, timeout: float | None = None) -> T_co:
        """Wait for all ranks of the call, and fetch this one's value; tensors come to the CPU.

        Raises:
            WorkerError: a rank raised. TimeoutError: the ranks, or then the value, took longer than
                `timeout` seconds.
            GroupBrokenError: its group was closed or restarted.
            ValueError: `timeout` is no number of seconds.
        """
        check_seconds("timeout", timeout)
        value: T_co = self.source.fetch(0, 1, timeout)
        return value

    def done(self) -> bool:
        """Whether its rank has finished, well or not."""
        return bool(self.source.done())

    def __await__(self) -> Generator[Any, None, T_co]:
        """What `get` gives, while the event loop runs on."""
        return self._arrived().__await__()

    async def _arrived(self) -> T_co:
        for whole in (False, True):
            if not await self.source.arrive(whole):
                return await asyncio.to_thread(self.get)  # finding out why takes seconds
            self.source.rows(None)
        return self.get()

    def resolved(self) -> Handle[T_co]:
        """Itself, once all ranks of its call have finished, well or not."""
        with suppress(Exception):  # which whoever reads it runs into
            self.source.rows(None)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self.source,)

    def __repr__(self) -> str:
        return f"<handle of {self.source.title}, rank {self.source.rank}>"


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
        return _layout(tuple(range(world_size)), (True,) * world_size)

    @classmethod
    def of(cls, dp_ranks: Sequence[int], collects: Sequence[bool]) -> Layout:
        """The layout of a mesh, by rank. What was made of it once is not made again."""
        return _layout(tuple(dp_ranks), tuple(collects))

    @property
    def world_size(self) -> int:
        return len(self.dp_ranks)

    def subset(self, ranks: Sequence[int]) -> Layout:
        """The layout of these ranks alone, their shards numbered anew in the order they come."""
        shards = [self.dp_ranks[rank] for rank in ranks]
        anew = {shard: i for i, shard in enumerate(dict.fromkeys(shards))}
        return Layout.of([anew[shard] for shard in shards], [self.collects[rank] for rank in ranks])

    @cached_property
    def collecting(self) -> tuple[int, ...]:
        """The ranks whose outputs count."""
        return tuple(rank for rank, collects in enumerate(self.collects) if collects)

    @cached_property
    def by_shard(self) -> tuple[int, ...]:
        """The same, in the order of their shards."""
        return tuple(sorted(self.collecting, key=self.dp_ranks.__getitem__))

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Their shards: each once and in order, where no rows would be lost or doubled."""
        return tuple(self.dp_ranks[rank] for rank in self.by_shard)


@lru_cache(maxsize=256)
def _layout(dp_ranks: tuple[int, ...], collects: tuple[bool, ...]) -> Layout:
    return Layout(dp_ranks, collects, max(dp_ranks, default=-1) + 1)


@dataclass(frozen=True)
class Call:
    """One rank's arguments. Ranks that get the same ones may share one `Call`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def values(self) -> tuple[Any, ...]:
        """The positional ones, then those by name."""
        return (*self.args, *self.kwargs.values())


@dataclass(frozen=True)
class Padding:
    """Rows that dispatch added behind the real ones, so that `parts` shards come out equal.

    `batch` is how many real ones there are, or a future that knows once it is done.
    """

    batch: int | DataProtoFuture
    parts: int

    @cached_property
    def rows(self) -> int:
        return self.batch if isinstance(self.batch, int) else len(self.batch)

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes need no future of which the rows are known."""
        return Padding, (vars(self).get("rows", self.batch), self.parts)

    @property
    def shard_rows(self) -> int:
        return -(-self.rows // self.parts)

    @property
    def added(self) -> int:
        return self.shard_rows * self.parts - self.rows

    def real_rows(self, shard: int, came: int) -> int:
        """How many of the rows that came back for a shard were in the caller's batch.

        Raises:
            DispatchError: they are not as many as went out.
        """
        sent = self.shard_rows
        if not self.added:
            return came
        if came and came != sent:
            raise DispatchError(
                f"padding cannot be removed: shard {shard} went out with {sent} rows and came "
                f"back with {came}. Register the method with uneven=True, which needs no padding"
            )
        return min(came, max(0, self.rows - shard * sent))


@dataclass(frozen=True)
class Plan:
    """What dispatch decided for a call, kept until collect.

    `answers` are the ranks whose outputs collect reads, in its order, and `shards` the shard
    that each of them got. `auto_padding`: a future of the result may be padded in turn.
    """

    answers: tuple[int, ...]
    shards: tuple[int, ...] = ()
    padding: Padding | None = None
    auto_padding: bool = False


def named_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each argument of a call under the name that errors have for it."""
    for i, value in enumerate(args):
        yield f"argument {i}", value
    for key, value in kwargs.items():
        yield f"argument {key!r}", value


_loaded: dict[str, Any] = {}


def loaded(name: str) -> Any:
    """A module, whole also where another thread is just importing it; None where nobody has."""
    if name not in _loaded and name in sys.modules:
        _loaded[name] = importlib.import_module(name)
    return _loaded.get(name)


def is_future(value: Any) -> TypeGuard[DataProtoFuture]:
    """Whether it is a `DataProtoFuture`; where its module is not loaded, there can be none."""
    module = loaded("protocol.future")
    return module is not None and isinstance(value, module.DataProtoFuture)


def is_late(value: Any) -> bool:
    """Whether it is a future or a handle, which is fetched where it is read."""
    return isinstance(value, Handle) or is_future(value)


def origins(late: Sequence[Any]) -> list[Any]:
    """The sources at the bottom of these futures and handles, each once. Waits for nothing."""
    sources = [one.source if isinstance(one, Handle) else one for one in late]
    future = loaded("protocol.future")  # where it is not loaded, all are handles
    return [*future.origins(sources)] if future else [*{id(s): s for s in sources}.values()]
