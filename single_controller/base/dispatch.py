"""Dispatch modes as pure functions: arguments to per-rank calls, outputs to one result.

A mode knows nothing of groups, Ray or processes, so each one is tested from a table. How a call
travels is left to the backends; functions in veRL's shape are adapted in `custom`. `protocol` is
imported on use: a worker process reads this module to register methods, and needs no torch for it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

from single_controller.errors import DispatchError

if TYPE_CHECKING:
    from protocol import DataProtoFuture

__all__ = [
    "AllToAll",
    "Broadcast",
    "ByRows",
    "Call",
    "Direct",
    "Layout",
    "Mode",
    "OneToAll",
    "Padding",
    "PerElement",
    "PerRank",
    "Plan",
    "RankZero",
]

Spread: TypeAlias = Callable[[str, Any], Sequence[Any]]


@dataclass(frozen=True)
class Broadcast:
    """Marks an argument that every rank gets whole, whatever the mode does with others."""

    value: Any


@dataclass(frozen=True)
class PerRank:
    """Marks an argument of which rank i gets `values[i]`, whatever the mode does with others."""

    values: Sequence[Any]


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
    once it is done.
    """

    answers: tuple[int, ...]
    shards: tuple[int, ...] = ()
    padding: Callable[[], Padding] | None = None


@dataclass(frozen=True)
class Mode(abc.ABC):
    """A way to spread arguments over ranks and to merge what comes back.

    `mesh` names the mesh whose layout the mode needs; None: every rank is a dp rank.
    `signature_kept`: the driver passes what the method's signature says.
    `batched`: without blocking, the result is a `DataProtoFuture`.
    """

    mesh: str | None = field(default=None, kw_only=True)

    signature_kept = True
    batched = False

    def plan(self, layout: Layout) -> Plan:
        """Whose outputs count, as far as the arguments do not matter."""
        return Plan(tuple(range(layout.world_size)))

    @abc.abstractmethod
    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        """The plan and, for each rank, its call (None: the rank is not called).

        Raises:
            DispatchError: the arguments cannot be spread this way.
        """

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        """Merge the outputs of `plan.answers`, in that order."""
        return list(outputs)

    def promise(self, plan: Plan, handles: Sequence[Any]) -> Any:
        """The same for a call that does not block: a handle stands for each output.

        A batched mode gets a `protocol.future.Source` per answer, the others the backend's
        own references.
        """
        return self.collect(plan, handles)


def _per_rank(
    layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any], spread: Spread
) -> list[Call | None]:
    """Each rank's call, where `spread` turns one unmarked argument into one value per rank."""
    size = layout.world_size

    def values(name: str, value: Any) -> Sequence[Any]:
        if isinstance(value, Broadcast):
            return [value.value] * size
        if isinstance(value, PerRank):
            if len(value.values) != size:
                raise DispatchError(
                    f"{name}: PerRank needs one value for each of {size} ranks; "
                    f"got {len(value.values)}"
                )
            return value.values
        return spread(name, value)

    columns = [values(f"argument {i}", value) for i, value in enumerate(args)]
    named = {key: values(f"argument {key!r}", value) for key, value in kwargs.items()}
    return [
        Call(tuple(column[rank] for column in columns), {k: v[rank] for k, v in named.items()})
        for rank in range(size)
    ]


@dataclass(frozen=True)
class OneToAll(Mode):
    """Every rank gets every argument whole; the result is the list of all outputs."""

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        calls = _per_rank(layout, args, kwargs, lambda _, value: [value] * layout.world_size)
        return self.plan(layout), calls


@dataclass(frozen=True)
class RankZero(Mode):
    """Only rank 0 is called; the result is its output."""

    def plan(self, layout: Layout) -> Plan:
        return Plan((0,))

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        calls = _per_rank(layout, args, kwargs, lambda _, value: [value] * layout.world_size)
        return self.plan(layout), [calls[0], *[None] * (layout.world_size - 1)]

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        return outputs[0]


@dataclass(frozen=True)
class AllToAll(Mode):
    """Rank i gets element i if every argument is a list of length world_size.

    Otherwise arguments go to all; a list of another length is refused, since it looks like one
    that was meant to be scattered. The result is the list of all outputs.
    """

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        size = layout.world_size
        unmarked = [v for v in (*args, *kwargs.values()) if not isinstance(v, Broadcast | PerRank)]
        scatter = all(isinstance(value, list) for value in unmarked)

        def spread(name: str, value: Any) -> Sequence[Any]:
            if isinstance(value, list) and len(value) != size:
                raise DispatchError(
                    f"{name} is a list of length {len(value)}, and ALL_TO_ALL scatters lists over "
                    f"{size} ranks: pass {size} elements, or say Broadcast(x) to send it whole"
                )
            return value if scatter else [value] * size

        return self.plan(layout), _per_rank(layout, args, kwargs, spread)


@dataclass(frozen=True)
class PerElement(Mode):
    """Every argument is a list with one element per shard; the result is a list of outputs."""

    def plan(self, layout: Layout) -> Plan:
        return Plan(tuple(rank for rank, collects in enumerate(layout.collects) if collects))

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        def spread(name: str, value: Any) -> Sequence[Any]:
            if not isinstance(value, list | tuple) or len(value) != layout.dp_size:
                came = f"length {len(value)}" if isinstance(value, list | tuple) else "no list"
                raise DispatchError(
                    f"{name} must be a list of {layout.dp_size} elements, one per data-parallel "
                    f"rank; got {type(value).__name__} ({came}). Broadcast(x) sends a value whole"
                )
            return [value[dp_rank] for dp_rank in layout.dp_ranks]

        return self.plan(layout), _per_rank(layout, args, kwargs, spread)


@dataclass(frozen=True)
class Direct(Mode):
    """For methods that an engine calls on its workers itself: a call through the group fails."""

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        raise NotImplementedError(
            "Direct rollout call is forbidden: this method is registered with "
            "Dispatch.DIRECT_ROLLOUT_METHOD and is called on the worker, not through a group"
        )


@dataclass(frozen=True)
class ByRows(Mode):
    """Batches (DataProto, TensorDict, futures of them) are split by rows over the dp ranks.

    Ranks of one dp group get the same shard object. `uneven`: shards may differ by one row;
    otherwise rows must divide, unless the batch has padding enabled: then its last row is
    repeated, and what comes back is cut. `merge`: "concat" joins the outputs to one batch,
    "list" returns them as they are. `function_first`: the first argument is a function that
    every rank gets whole.
    """

    uneven: bool = False
    merge: Literal["concat", "list"] = "concat"
    function_first: bool = False

    @property
    def batched(self) -> bool:  # type: ignore[override]
        return self.merge == "concat"

    def plan(self, layout: Layout) -> Plan:
        answers = layout.collecting_ranks()
        shards = tuple(layout.dp_ranks[rank] for rank in answers)
        if self.merge == "concat" and shards != tuple(range(layout.dp_size)):
            raise DispatchError(
                f"mesh {self.mesh!r}: each of {layout.dp_size} data-parallel ranks needs exactly "
                "one rank that collects, or rows would be lost or doubled; those that collect "
                f"have dp ranks {list(shards)}"
            )
        return Plan(answers, shards)

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        from protocol.batches import batch_rows

        if self.function_first:
            if not args or not callable(args[0]):
                raise DispatchError("the first argument must be a function, which all ranks get")
            args = (Broadcast(args[0]), *args[1:])
        batches = [v for v in (*args, *kwargs.values()) if _splits(v)]
        pads = not self.uneven and any(_padding_enabled(batch) for batch in batches)
        parts = layout.dp_size

        def spread(name: str, value: Any) -> Sequence[Any]:
            if not _splits(value):
                raise DispatchError(
                    f"{name} must be a DataProto, TensorDict or DataProtoFuture, to be split by "
                    f"rows; got {type(value).__name__}. Broadcast(x) sends a value whole, "
                    "PerRank([...]) one value to each rank"
                )
            shards = self._shards(name, value, parts, pads)
            return [shards[dp_rank] for dp_rank in layout.dp_ranks]

        calls = _per_rank(layout, args, kwargs, spread)
        padding: Callable[[], Padding] | None = None
        if pads and _is_future(batches[0]):
            padding = partial(_padding_of, batches[0], parts)
        elif pads and batch_rows(batches[0]) % parts:
            padding = partial(Padding, batch_rows(batches[0]), parts)
        return replace(self.plan(layout), padding=padding), calls

    def _shards(self, name: str, batch: Any, parts: int, pads: bool) -> Sequence[Any]:
        from protocol.batches import balanced_sizes, batch_rows, equal_sizes, pad_batch, split_batch
        from protocol.errors import BatchError

        if _is_future(batch):
            return batch.shards(parts, "padded" if pads else "balanced" if self.uneven else "equal")
        try:
            if self.uneven:
                return split_batch(batch, balanced_sizes(batch_rows(batch), parts))
            if pads and batch_rows(batch) % parts:
                batch = pad_batch(batch, -batch_rows(batch) % parts)
            return split_batch(batch, equal_sizes(batch_rows(batch), parts))
        except BatchError as error:
            raise DispatchError(f"{name}: {error}") from error

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        from protocol.batches import concat_batches, is_batch
        from protocol.errors import BatchError

        if self.merge == "list":
            return self._unpadded(plan, outputs)
        for rank, output in zip(plan.answers, outputs, strict=True):
            if not is_batch(output):
                raise DispatchError(
                    f"rank {rank} returned {type(output).__name__}, and this mode joins the ranks' "
                    "outputs to one batch: return a DataProto or TensorDict, or register the "
                    "method with Dispatch.DP_COMPUTE_METRIC to get the outputs as a list"
                )
        try:
            return concat_batches(self._unpadded(plan, outputs))
        except BatchError as error:
            raise DispatchError(f"the ranks' outputs cannot be joined: {error}") from error

    def promise(self, plan: Plan, handles: Sequence[Any]) -> Any:
        from protocol import DataProtoFuture

        if self.merge == "list":
            return list(handles)
        future = DataProtoFuture(handles)
        padding = plan.padding
        return future if padding is None else future.unpadded(lambda: padding().added)

    def _unpadded(self, plan: Plan, outputs: Sequence[Any]) -> list[Any]:
        """Cut the rows that padding added; in a list, outputs of another length stay."""
        if plan.padding is None:
            return list(outputs)
        from protocol.batches import batch_rows, is_batch, slice_batch

        padding, kept = plan.padding(), []
        for shard, output in zip(plan.shards, outputs, strict=True):
            rows, real = batch_rows(output) if is_batch(output) else 0, padding.real_rows(shard)
            if rows == padding.shard_rows:
                output = output if rows == real else slice_batch(output, 0, real)
            elif rows and self.merge == "concat":
                raise DispatchError(
                    f"padding cannot be removed: shard {shard} went out with {padding.shard_rows} "
                    f"rows and came back with {rows}. Register the method with uneven=True, "
                    "which needs no padding"
                )
            kept.append(output)
        return kept


def _splits(value: Any) -> bool:
    from protocol.batches import is_batch

    return _is_future(value) or is_batch(value)


def _is_future(value: Any) -> TypeGuard[DataProtoFuture]:
    from protocol import DataProtoFuture

    return isinstance(value, DataProtoFuture)


def _padding_of(future: DataProtoFuture, parts: int) -> Padding:
    return Padding(len(future), parts)


def _padding_enabled(batch: Any) -> bool:
    from protocol import DataProto, DataProtoConfig

    if isinstance(batch, DataProto):
        return batch.is_padding_enabled()
    return DataProtoConfig.auto_padding
