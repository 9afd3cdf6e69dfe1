"""Dispatch modes as pure functions: arguments to per-rank calls, outputs to one result.

A mode knows nothing of groups, Ray or processes, so each one is tested from a table. How a call
travels is left to the backends. `protocol` is imported on use: a worker process reads this module
to register methods, and needs no torch for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from single_controller.base.plan import (
    Broadcast,
    Call,
    Layout,
    Padding,
    PerRank,
    Plan,
    is_future,
    loaded,
    named_arguments,
)
from single_controller.errors import DispatchError

if TYPE_CHECKING:
    from protocol.future import How

__all__ = [
    "AUTO_PADDING",
    "AllToAll",
    "ByRows",
    "CustomMode",
    "Direct",
    "Mode",
    "OneToAll",
    "PerElement",
    "RankZero",
    "padding_setting",
]

AUTO_PADDING = "VERL_AUTO_PADDING"
_WAYS_OUT = (
    " Two ways out: register(..., uneven=True) sends shards that differ by at most one row; "
    "DataProto.from_dict(..., auto_padding=True) repeats the last row and removes the padding from "
    "what comes back"
)

T = TypeVar("T")
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
Calls: TypeAlias = list[Call | None]
Spread: TypeAlias = Callable[[str, Any], Sequence[Any]]


@dataclass(frozen=True)
class Mode:
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

    def dispatch(self, layout: Layout, args: Args, kwargs: Kwargs) -> tuple[Plan, Calls]:
        """The plan and, for each rank, its call (None: the rank is not called). Ranks that get the
        same values get the same `Call`.

        Raises:
            DispatchError: the arguments cannot be spread this way.
        """
        return self.plan(layout), _per_rank(layout, args, kwargs, partial(self._spread, layout))

    def _spread(self, layout: Layout, name: str, value: Any) -> Sequence[Any]:
        """One value per rank of an argument that is not marked."""
        return [value] * layout.world_size

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        """Merge the outputs of `plan.answers`, in that order."""
        return list(outputs)

    def reading(self, plan: Plan) -> AbstractContextManager[None]:
        """How outputs are to be read for `collect`: in memory of their own."""
        return nullcontext()

    def promise(self, plan: Plan, handles: Sequence[Any]) -> Any:
        """The same for a call that does not block: a handle stands for each output.

        A batched mode gets a `protocol.future.Source` per answer, the others a `Handle`.
        """
        return self.collect(plan, handles)


def _per_rank(layout: Layout, args: Args, kwargs: Kwargs, spread: Spread) -> Calls:
    """Each rank's call, where `spread` turns one unmarked argument into one value per rank."""
    size = layout.world_size
    if not (args or kwargs):
        return [Call()] * size

    def column(name: str, value: Any) -> Sequence[Any]:
        if isinstance(value, PerRank):
            if (came := len(value.values)) != size:
                raise DispatchError(f"{name} needs one value for each of {size} ranks; got {came}")
            return value.values
        whole = value.value if isinstance(value, Broadcast) else value
        module = loaded("protocol.data_proto")  # where it is not loaded, there is none
        if module and isinstance(whole, module.DataProto):
            _named(name, whole.check_consistency)
        return [whole] * size if isinstance(value, Broadcast) else spread(name, whole)

    made: dict[tuple[int, ...], Call] = {}  # by the identity of the values
    calls: Calls = []
    columns = [column(name, value) for name, value in named_arguments(args, kwargs)]
    for values in zip(*columns, strict=True):
        key = tuple(map(id, values))
        if key not in made:
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            made[key] = Call(values[: len(args)], named)
        calls.append(made[key])
    return calls


def _named(name: str, function: Callable[[], T]) -> T:
    """What `function` returns; an error of a batch says which argument it was."""
    from protocol.errors import BatchError, ChunkError

    try:
        return function()
    except BatchError as error:
        advice = _WAYS_OUT if isinstance(error, ChunkError) else ""
        raise DispatchError(f"{name}: {error}{advice}") from error


@dataclass(frozen=True)
class OneToAll(Mode):
    """Every rank gets every argument whole; the result is the list of all outputs."""


@dataclass(frozen=True)
class RankZero(Mode):
    """Only rank 0 is called; the result is its output."""

    def plan(self, layout: Layout) -> Plan:
        return Plan((0,))

    def dispatch(self, layout: Layout, args: Args, kwargs: Kwargs) -> tuple[Plan, Calls]:
        plan, calls = super().dispatch(layout, args, kwargs)
        return plan, [calls[0], *[None] * (layout.world_size - 1)]

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        return outputs[0]


@dataclass(frozen=True)
class AllToAll(Mode):
    """Rank i gets element i if every argument is a list of length world_size.

    Otherwise arguments go to all; a list of another length is refused, since it looks like one
    that was meant to be scattered. The result is the list of all outputs.
    """

    def dispatch(self, layout: Layout, args: Args, kwargs: Kwargs) -> tuple[Plan, Calls]:
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
        return Plan(layout.collecting)

    def _spread(self, layout: Layout, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple) or len(value) != layout.dp_size:
            came = f"length {len(value)}" if isinstance(value, list | tuple) else "no list"
            raise DispatchError(
                f"{name} must be a list of {layout.dp_size} elements, one per data-parallel "
                f"rank; got {type(value).__name__} ({came}). Broadcast(x) sends a value whole"
            )
        return [value[dp_rank] for dp_rank in layout.dp_ranks]


@dataclass(frozen=True)
class Direct(Mode):
    """For methods that an engine calls on its workers itself: a call through the group fails."""

    def dispatch(self, layout: Layout, args: Args, kwargs: Kwargs) -> tuple[Plan, Calls]:
        raise NotImplementedError(
            "Direct rollout call is forbidden: this method is registered with "
            "Dispatch.DIRECT_ROLLOUT_METHOD and is called on the worker, not through a group"
        )


@dataclass(frozen=True)
class CustomMode(Mode):
    """A user's pair of functions.

    `dispatch_fn(worker_group, *args, **kwargs)` returns the arguments and keyword arguments as
    lists with one element per rank; `collect_fn(worker_group, output)` gets the list of all
    ranks' outputs (handles of them where the call does not block).
    """

    dispatch_fn: Callable[..., Any]
    collect_fn: Callable[..., Any]
    group: Any = field(default=None, compare=False)

    signature_kept = False

    def dispatch(self, layout: Layout, args: Args, kwargs: Kwargs) -> tuple[Plan, Calls]:
        spread = self.dispatch_fn(self.group, *args, **kwargs)
        if not (isinstance(spread, tuple) and len(spread) == 2 and isinstance(spread[1], Mapping)):
            raise DispatchError(
                f"{self.name} must return (args, kwargs), each value in them a list with one "
                f"element per rank; got {type(spread).__name__}"
            )
        named = {name: PerRank(values) for name, values in spread[1].items()}
        return super().dispatch(layout, tuple(map(PerRank, spread[0])), named)

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        return self.collect_fn(self.group, list(outputs))

    @property
    def name(self) -> str:
        return getattr(self.dispatch_fn, "__name__", "dispatch_fn")


@dataclass(frozen=True)
class ByRows(Mode):
    """Batches (DataProto, TensorDict, futures of them, and what has `chunk(n)` and whose class has
    `concat`) are split by rows over the dp ranks. A TensorDict of `batch_size=[]` goes whole to
    every rank, and of such outputs the first counts.

    `uneven`: shards may differ by one row. Otherwise rows must divide, unless a batch has padding
    enabled: then its last row is repeated, and what comes back is cut. All batches of the call need
    equally many rows then, and where there are several, futures are waited for.
    `merge`: "concat" joins the outputs to one batch, "list" returns them as they are.
    `function_first`: the first argument is a function that every rank gets whole.
    """

    uneven: bool = False
    merge: Literal["concat", "list"] = "concat"
    function_first: bool = False

    @property
    def batched(self) -> bool:  # type: ignore[override]
        return self.merge == "concat"

    def plan(self, layout: Layout) -> Plan:
        if self.batched and layout.shards != tuple(range(layout.dp_size)):
            raise DispatchError(
                f"mesh {self.mesh!r}: each of {layout.dp_size} data-parallel ranks needs exactly "
                "one rank that collects, or rows would be lost or doubled; those that collect "
                f"have dp ranks {list(layout.shards)}"
            )
        return Plan(layout.by_shard, layout.shards)

    def dispatch(self, layout: Layout, args: Args, kwargs: Kwargs) -> tuple[Plan, Calls]:
        from protocol.batches import has_rows, is_batch

        if self.function_first:
            if not args or not callable(args[0]):
                raise DispatchError("the first argument must be a function, which all ranks get")
            args = (Broadcast(args[0]), *args[1:])
        plan = self.plan(layout)
        named = named_arguments(args, kwargs)
        batches = {n: v for n, v in named if is_future(v) or (is_batch(v) and has_rows(v))}
        late: dict[int, Any] = {}
        if any(map(_may_be_padded, batches.values())):
            plan = replace(plan, auto_padding=True)
            if not self.uneven:
                rows, late = _same_rows(batches)
                plan = replace(plan, padding=Padding(rows, layout.dp_size))
        cut: dict[int, Sequence[Any]] = {}  # by id: a batch in two arguments has one set of shards

        def spread(name: str, value: Any) -> Sequence[Any]:
            if id(value) not in cut:
                batch = late.get(id(value), value)
                shards = self._shards(name, batch, layout.dp_size, plan.padding is not None)
                cut[id(value)] = [shards[dp_rank] for dp_rank in layout.dp_ranks]
            return cut[id(value)]

        return plan, _per_rank(layout, args, kwargs, spread)

    def _shards(self, name: str, batch: Any, parts: int, pads: bool) -> Sequence[Any]:
        from protocol import BatchData, batches

        if is_future(batch):
            how: How = "padded" if pads else "balanced" if self.uneven else "equal"
            return batch.shards(parts, how, _WAYS_OUT)
        if not batches.is_batch(batch):
            if not BatchData(batch).is_chunkable():
                raise DispatchError(
                    f"{name} must be a DataProto, TensorDict or DataProtoFuture, to be split by "
                    f"rows, or have chunk(n) and a class with concat; got {type(batch).__name__}. "
                    "Broadcast(x) sends a value whole, PerRank([...]) one value to each rank"
                )
            if len(shards := list(batch.chunk(parts))) != parts:
                raise DispatchError(
                    f"{name}: chunk({parts}) of {type(batch).__name__} gave {len(shards)} parts"
                )
            return shards
        if parts == 1 or not batches.has_rows(batch):
            return [batch] * parts

        def split() -> Sequence[Any]:
            rows = batches.batch_rows(batch)
            added = -rows % parts if pads else 0
            sizes = batches.balanced_sizes if self.uneven else batches.equal_sizes
            whole = batches.pad_batch(batch, added) if added else batch
            return batches.split_batch(whole, sizes(rows + added, parts))

        return _named(name, split)

    def reading(self, plan: Plan) -> AbstractContextManager[None]:
        """Outputs that are joined are read as views, and joining them makes the only copy."""
        from protocol.wire import read_as

        return read_as("join") if self.batched and len(plan.answers) > 1 else nullcontext()

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        from protocol import BatchData, batches
        from protocol.errors import BatchError

        if not self.batched:
            return self._unpadded(plan, outputs)
        ranks = zip(plan.answers, outputs, strict=True)
        if odd := next(((r, o) for r, o in ranks if not batches.is_batch(o)), None):
            if (joined := BatchData([*outputs])).is_concatable():
                return outputs[0] if len(outputs) == 1 else joined.concat()
            rank, output = odd
            raise DispatchError(
                f"rank {rank} returned {type(output).__name__}, and this mode joins the ranks' "
                "outputs to one batch: return a DataProto or TensorDict, or register the "
                "method with Dispatch.DP_COMPUTE_METRIC to get the outputs as a list"
            )
        try:
            whole = self._unpadded(plan, outputs)
            return (
                batches.only_batch(whole[0]) if len(whole) == 1 else batches.concat_batches(whole)
            )
        except BatchError as error:
            raise DispatchError(f"the ranks' outputs cannot be joined: {error}") from error

    def promise(self, plan: Plan, handles: Sequence[Any]) -> Any:
        from protocol import DataProtoFuture

        if not self.batched:
            return list(handles)
        if plan.padding is not None:
            real = [partial(plan.padding.real_rows, shard) for shard in plan.shards]
            each = zip(handles, real, strict=True)
            handles = [DataProtoFuture([handle]).counted(rows) for handle, rows in each]
        return DataProtoFuture(handles, plan.auto_padding)

    def _unpadded(self, plan: Plan, outputs: Sequence[Any]) -> list[Any]:
        """Cut the rows that padding added; in a list, outputs of another length stay."""
        if plan.padding is None or not plan.padding.added:
            return list(outputs)
        from protocol.batches import batch_rows, is_batch, slice_batch

        kept = []
        for shard, output in zip(plan.shards, outputs, strict=True):
            rows = batch_rows(output) if is_batch(output) else 0
            if rows == plan.padding.shard_rows or (rows and self.batched):
                output = slice_batch(output, 0, plan.padding.real_rows(shard, rows))
            kept.append(output)
        return kept


def padding_setting() -> str | None:
    """VERL_AUTO_PADDING for the workers: what DataProtoConfig was set to here, else as it is."""
    module = loaded("protocol")
    chosen = None if module is None else module.DataProtoConfig._auto_padding
    return os.environ.get(AUTO_PADDING) if chosen is None else str(int(chosen))


def _may_be_padded(batch: Any) -> bool:
    from protocol import DataProto, DataProtoConfig

    if isinstance(batch, DataProto):
        return batch.is_padding_enabled()
    return DataProtoConfig.auto_padding or (is_future(batch) and batch.auto_padding)


def _same_rows(batches: Mapping[str, Any]) -> tuple[Any, dict[int, Any]]:
    """The rows that all these arguments have, or the future that will tell; and by id what goes in
    place of other futures: nobody waits for rows here, who reads them finds out that they differ.
    """
    from protocol.batches import batch_rows

    here = {n: batch_rows(b) for n, b in batches.items() if not is_future(b)}
    first = next(iter(here or batches))
    for name, count in here.items():
        _compared(first, name, count, here[first])
    rows: Any = here[first] if here else batches[first]
    late = {}
    for name, batch in batches.items():
        if is_future(batch) and batch is not rows:
            if here:
                late[id(batch)] = batch.counted(partial(_compared, first, name, wanted=rows))
            else:
                late[id(batch)] = batch.counted(partial(_compared, first, name), rows)
    return rows, late


def _compared(first: str, name: str, count: int, wanted: int) -> int:
    if count != wanted:
        raise DispatchError(
            f"batches that are padded, or go with one that is, need equally many rows; {first} "
            f"has {wanted}, {name} has {count}. Broadcast(x) sends a batch whole, "
            "PerRank([...]) one to each rank"
        )
    return count
