"""Dispatch modes as pure functions: arguments to per-rank calls, outputs to one result.

A mode knows nothing of groups, Ray or processes, so each one is tested from a table. How a call
travels is left to the backends; functions in veRL's shape are adapted in `custom`. `protocol` is
imported on use: a worker process reads this module to register methods, and needs no torch for it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from single_controller.base.plan import Broadcast, Call, Layout, PerRank, Plan, named_arguments
from single_controller.base.rows import (
    RealRows,
    aligned,
    cannot_unpad,
    check_batch,
    goes_whole,
    is_future,
    padding_enabled,
    padding_of,
    splits,
)
from single_controller.errors import DispatchError

if TYPE_CHECKING:
    from protocol.future import How

__all__ = [
    "AllToAll",
    "ByRows",
    "Direct",
    "Mode",
    "OneToAll",
    "PerElement",
    "RankZero",
]

_WAYS_OUT = (
    " Two ways out: register(..., uneven=True) sends shards that differ by at most one row; "
    "DataProto.from_dict(..., auto_padding=True) repeats the last row and removes the padding from "
    "what comes back"
)

Spread: TypeAlias = Callable[[str, Any], Sequence[Any]]


@dataclass(frozen=True)
class Mode(abc.ABC):
    """A way to spread arguments over ranks and to merge what comes back.

    `mesh` names the mesh whose layout the mode needs; None: every rank is a dp rank.
    `signature_kept`: the driver passes what the method's signature says.
    `batched`: without blocking, the result is a `DataProtoFuture`.
    `returns`: what collect makes, in words.
    """

    mesh: str | None = field(default=None, kw_only=True)

    signature_kept = True
    batched = False
    returns = "the list of outputs"

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

    def reading(self, plan: Plan) -> AbstractContextManager[None]:
        """How outputs are to be read for `collect`: in memory of their own."""
        return nullcontext()

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
    if not (args or kwargs):
        return [Call()] * size

    def values(name: str, value: Any) -> Sequence[Any]:
        if isinstance(value, Broadcast):
            check_batch(name, value.value)
            return [value.value] * size
        if isinstance(value, PerRank):
            if len(value.values) != size:
                each = f"one value for each of {size} ranks"
                raise DispatchError(f"{name}: PerRank needs {each}; got {len(value.values)}")
            _check_batches(name, value.values)
            return value.values
        check_batch(name, value)
        return spread(name, value)

    columns = [values(name, value) for name, value in named_arguments(args, kwargs)]
    positional, named = columns[: len(args)], dict(zip(kwargs, columns[len(args) :], strict=True))
    return [
        Call(tuple(column[rank] for column in positional), {k: v[rank] for k, v in named.items()})
        for rank in range(size)
    ]


def _check_batches(name: str, values: Sequence[Any]) -> None:
    for i, value in enumerate(values):
        check_batch(f"{name}, element {i}", value)


@dataclass(frozen=True)
class OneToAll(Mode):
    """Every rank gets every argument whole; the result is the list of all outputs."""

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        size = layout.world_size
        return self.plan(layout), _per_rank(layout, args, kwargs, lambda _, v: [v] * size)


@dataclass(frozen=True)
class RankZero(Mode):
    """Only rank 0 is called; the result is its output."""

    returns = "the output"

    def plan(self, layout: Layout) -> Plan:
        return Plan((0,))

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        calls = OneToAll().dispatch(layout, args, kwargs)[1]
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
            if scatter:
                _check_batches(name, value)
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
            _check_batches(name, value)
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

    So is whatever has `chunk(n)` and a `concat` of its class. A TensorDict of `batch_size=[]` goes
    whole to every rank, and of such outputs the first counts.

    Ranks of one dp group get the same shard object. `uneven`: shards may differ by one row;
    otherwise rows must divide, unless the batch has padding enabled: then its last row is
    repeated, and what comes back is cut; all batches of the call then need equally many rows, and
    a future that has others is refused where it is read. `merge`: "concat" joins the outputs to
    one batch, "list" returns them as they are. `function_first`: the first argument is a function
    that every rank gets whole.
    """

    uneven: bool = False
    merge: Literal["concat", "list"] = "concat"
    function_first: bool = False

    @property
    def batched(self) -> bool:  # type: ignore[override]
        return self.merge == "concat"

    @property
    def returns(self) -> str:  # type: ignore[override]
        return "one batch, the rows" if self.batched else Mode.returns

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
        if self.function_first:
            if not args or not callable(args[0]):
                raise DispatchError("the first argument must be a function, which all ranks get")
            args = (Broadcast(args[0]), *args[1:])
        named = named_arguments(args, kwargs)
        batches = {name: v for name, v in named if splits(v) and not goes_whole(v)}
        auto_padding = any(padding_enabled(batch) for batch in batches.values())
        pads = auto_padding and not self.uneven
        rows, compared = aligned(batches) if pads else (0, {})
        parts = layout.dp_size
        cut: dict[int, Sequence[Any]] = {}  # by id: a batch in two arguments has one set of shards

        def spread(name: str, value: Any) -> Sequence[Any]:
            if id(value) not in cut:
                batch = compared.get(id(value), value)
                cut[id(value)] = self._shards(name, batch, parts, pads)
            shards = cut[id(value)]
            return [shards[dp_rank] for dp_rank in layout.dp_ranks]

        calls = _per_rank(layout, args, kwargs, spread)
        padding = partial(padding_of, rows, parts) if pads else None
        plan = self.plan(layout)
        return replace(plan, padding=padding, auto_padding=True) if auto_padding else plan, calls

    def _shards(self, name: str, batch: Any, parts: int, pads: bool) -> Sequence[Any]:
        from protocol.batches import (
            balanced_sizes,
            batch_rows,
            equal_sizes,
            is_chunkable,
            pad_batch,
            split_batch,
        )
        from protocol.errors import BatchError, ChunkError

        if is_future(batch):
            how: How = "padded" if pads else "balanced" if self.uneven else "equal"
            return batch.shards(parts, how, _WAYS_OUT)
        if goes_whole(batch):
            return [batch] * parts
        if not splits(batch):
            if not is_chunkable(batch):
                raise DispatchError(
                    f"{name} must be a DataProto, TensorDict or DataProtoFuture, to be split by "
                    f"rows, or have chunk(n) and a class with concat; got {type(batch).__name__}. "
                    "Broadcast(x) sends a value whole, PerRank([...]) one value to each rank"
                )
            shards = list(batch.chunk(parts))
            if len(shards) != parts:
                raise DispatchError(
                    f"{name}: chunk({parts}) of {type(batch).__name__} gave {len(shards)} parts"
                )
            return shards
        try:
            rows = batch_rows(batch)
            if parts == 1:
                return [batch]
            if self.uneven:
                return split_batch(batch, balanced_sizes(rows, parts))
            if pads and rows % parts:
                batch = pad_batch(batch, -rows % parts)
            return split_batch(batch, equal_sizes(batch_rows(batch), parts))
        except BatchError as error:
            advice = _WAYS_OUT if isinstance(error, ChunkError) else ""
            raise DispatchError(f"{name}: {error}{advice}") from error

    def reading(self, plan: Plan) -> AbstractContextManager[None]:
        """Outputs that are joined are read as views, and joining them makes the only copy."""
        from protocol.wire import read_as

        return read_as("join") if self.batched and len(plan.answers) > 1 else nullcontext()

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        from protocol.batches import concat_batches, is_batch, is_chunkable, only_batch
        from protocol.errors import BatchError

        if self.merge == "list":
            return self._unpadded(plan, outputs)
        kind: Any = type(outputs[0])
        if all(is_chunkable(output) and type(output) is kind for output in outputs):
            return outputs[0] if len(outputs) == 1 else kind.concat(list(outputs))
        for rank, output in zip(plan.answers, outputs, strict=True):
            if not is_batch(output):
                raise DispatchError(
                    f"rank {rank} returned {type(output).__name__}, and this mode joins the ranks' "
                    "outputs to one batch: return a DataProto or TensorDict, or register the "
                    "method with Dispatch.DP_COMPUTE_METRIC to get the outputs as a list"
                )
        try:
            whole = self._unpadded(plan, outputs)
            return only_batch(whole[0]) if len(whole) == 1 else concat_batches(whole)
        except BatchError as error:
            raise DispatchError(f"the ranks' outputs cannot be joined: {error}") from error

    def promise(self, plan: Plan, handles: Sequence[Any]) -> Any:
        from protocol import DataProtoFuture

        if self.merge == "list":
            return list(handles)
        if plan.padding is None:
            return DataProtoFuture(handles, plan.auto_padding)
        real = [
            RealRows(handle, shard, plan.padding)
            for handle, shard in zip(handles, plan.shards, strict=True)
        ]
        return DataProtoFuture(real, plan.auto_padding)

    def _unpadded(self, plan: Plan, outputs: Sequence[Any]) -> list[Any]:
        """Cut the rows that padding added; in a list, outputs of another length stay."""
        if plan.padding is None or not plan.padding().added:
            return list(outputs)
        from protocol.batches import batch_rows, is_batch, slice_batch

        padding, kept = plan.padding(), []
        for shard, output in zip(plan.shards, outputs, strict=True):
            rows, real = batch_rows(output) if is_batch(output) else 0, padding.real_rows(shard)
            if rows == padding.shard_rows:
                output = output if rows == real else slice_batch(output, 0, real)
            elif rows and self.merge == "concat":
                raise cannot_unpad(shard, padding.shard_rows, rows)
            kept.append(output)
        return kept
