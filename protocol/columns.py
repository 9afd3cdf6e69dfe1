"""Pure functions on one column of a batch (a tensor, a jagged tensor or an array); what a set of
columns means is left to `data_proto` and `tensordict_utils`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from tensordict import is_tensor_collection

from protocol import checks, dense, indices
from protocol.errors import BatchError, BatchTypeError, RowCountError
from protocol.shards import check_sizes
from protocol.staging import to_host

__all__ = [
    "Column",
    "as_object_array",
    "cat",
    "describe",
    "differing_dim",
    "equal",
    "flat_bytes",
    "from_rows",
    "is_nested",
    "jagged",
    "jagged_parts",
    "nbytes",
    "repeat",
    "row",
    "rows",
    "slice_rows",
    "split",
    "take",
]

Column: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"


# A nested tensor of n rows is stored as `values`, all rows one after another along one dim, and
# n + 1 `offsets` into that dim. Everything below is arithmetic on these two.


def is_nested(column: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a nested tensor, jagged or strided: its rows differ in length."""
    return isinstance(column, torch.Tensor) and column.is_nested


def jagged_parts(column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`(values, offsets, ragged_idx)` of any nested tensor, without holes and with offsets[0] == 0.

    `ragged_idx` is the ragged dim of the column, so `ragged_idx - 1` is that of `values`.
    """
    if column.layout is not torch.jagged:
        column = from_rows(list(column.unbind()))
    values, offsets = column.values(), column.offsets()  # type: ignore[attr-defined]
    ragged_idx: int = column._ragged_idx  # type: ignore[attr-defined]
    dim, lengths = ragged_idx - 1, column.lengths()  # type: ignore[attr-defined]
    if lengths is not None:
        return *_gather(values, offsets[: len(lengths)], lengths, dim), ragged_idx
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != values.shape[dim]:
        values, offsets = values.narrow(dim, first, last - first), offsets - first
    return values, offsets, ragged_idx


def from_rows(tensors: Sequence[torch.Tensor], ragged_idx: int | None = None) -> torch.Tensor:
    """One jagged tensor from one dense tensor per row.

    The ragged dim is the one in which the rows differ (1 if they do not), unless `ragged_idx`,
    counted with the batch dim, names it.

    Raises:
        BatchError: there is no row, one is nested, or they differ in dtype or in more than one dim.
    """
    if not tensors:
        raise BatchError("a jagged tensor needs at least one row to know its dtype; got none")
    if any(tensor.is_nested for tensor in tensors):
        raise BatchError("the rows of a jagged tensor must be dense tensors; got a nested one")
    ragged_idx = ragged_idx or differing_dim(tensors) or 1
    dim = ragged_idx - 1
    kinds = {(t.dtype, t.shape[:dim], t.shape[dim + 1 :], t.dim() > dim) for t in tensors}
    if len(kinds) > 1 or tensors[0].dim() <= dim:
        raise BatchError(
            f"the rows of a jagged tensor must agree in dtype and in every dim but {dim}; got "
            + ", ".join(sorted({f"{t.dtype} {tuple(t.shape)}" for t in tensors}))
        )
    lengths = torch.tensor([t.shape[dim] for t in tensors], device=tensors[0].device)
    return jagged(torch.cat(list(tensors), dim), _offsets(lengths), ragged_idx)


def differing_dim(tensors: Sequence[torch.Tensor]) -> int | None:
    """The first dim, counted with the batch dim, in which rows differ; None if there is none."""
    sizes = enumerate(zip(*(t.shape for t in tensors), strict=False), start=1)
    return next((dim for dim, lengths in sizes if len(set(lengths)) > 1), None)


def jagged(values: torch.Tensor, offsets: torch.Tensor, ragged_idx: int) -> torch.Tensor:
    """The nested tensor that `jagged_parts` takes apart."""
    return torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=ragged_idx)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _gather(
    values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy `lengths[i]` elements from `starts[i]` on, for every i; returns values and offsets."""
    offsets = _offsets(lengths)
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths)
    return values.index_select(dim, shift + torch.arange(len(shift), device=shift.device)), offsets


def rows(column: Column) -> int:
    """Number of rows; for a nested tensor, of its components."""
    if not isinstance(column, (torch.Tensor, np.ndarray)):
        raise BatchTypeError(
            f"a column must be a tensor or an array; got {type(column).__name__} "
            f"{checks.short(column)}"
        )
    if column.ndim == 0:
        raise RowCountError("a column needs a batch dim; got a 0-dim value")
    return column.size(0) if isinstance(column, torch.Tensor) else len(column)


def nbytes(column: Column) -> int:
    """Bytes of the elements; of an object array, of the references only."""
    return (jagged_parts(column)[0] if is_nested(column) else column).nbytes


def describe(column: Column) -> str:
    """`int64 (4, 2)` or `int64 jagged (4, *)`: kind and shape, no data."""
    if not isinstance(column, torch.Tensor):
        return f"{column.dtype} array {column.shape}"
    sizes = ["*" if not isinstance(size, int) else str(size) for size in _shape(column)]
    layout = " jagged" if column.is_nested else ""
    end = "," if len(sizes) == 1 else ""
    return f"{str(column.dtype).removeprefix('torch.')}{layout} ({', '.join(sizes)}{end})"


def _shape(column: torch.Tensor) -> Sequence[object]:
    strided = column.is_nested and column.layout is not torch.jagged
    return [column.size(0), *"*" * (column.dim() - 1)] if strided else column.shape


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as uint8 on the CPU; a view where it can be."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return to_host(flat.view(torch.uint8))


def take(column: Column, index: torch.Tensor) -> Column:
    """Copy the rows that `index` (1-D, int64, not negative) names, in its order."""
    if not isinstance(column, torch.Tensor):
        picked: Column = column[index.cpu().numpy()]
        return picked
    index = index.to(column.device)
    if not column.is_nested:
        return column.index_select(0, index)
    values, offsets, ragged_idx = jagged_parts(column)
    starts, lengths = offsets[:-1][index], offsets.diff()[index]
    return jagged(*_gather(values, starts, lengths, ragged_idx - 1), ragged_idx)


def row(column: Column, at: int) -> Any:
    """Row `at` (not negative) without the batch dim: a view of a tensor, an element of an array."""
    one: Any = slice_rows(column, at, at + 1) if is_nested(column) else column[at]
    return jagged_parts(one)[0] if is_nested(one) else one


def slice_rows(column: Column, start: int, stop: int, step: int = 1) -> Column:
    """Rows `start:stop:step`, given 0 <= start <= stop <= rows and step > 0.

    A view, except for a nested tensor with step > 1.
    """
    if not is_nested(column):
        view: Column = column[start:stop:step]
        return view
    if step != 1:
        return take(column, torch.arange(start, stop, step))
    return split(column, [start, stop - start, rows(column) - stop])[1]


def split(column: Column, sizes: Sequence[int]) -> list[Column]:
    """Views of consecutive rows; a size may be zero.

    Raises:
        RowCountError: the sizes do not sum to the rows of the column.
    """
    check_sizes(sizes, rows(column))
    if isinstance(column, torch.Tensor) and not column.is_nested:
        return list(column.split_with_sizes(list(sizes)))  # torch.split takes twice as long
    bounds = pairwise(accumulate(sizes, initial=0))
    if not isinstance(column, torch.Tensor):
        return [column[a:b] for a, b in bounds]
    values, offsets, ragged_idx = jagged_parts(column)
    at = offsets.tolist()
    return [
        jagged(
            values.narrow(ragged_idx - 1, at[a], at[b] - at[a]),
            offsets[a : b + 1] - at[a],
            ragged_idx,
        )
        for a, b in bounds
    ]


def cat(columns: Sequence[Column]) -> Column:
    """All rows of all columns, in new memory even for a single column.

    Raises:
        BatchError: no column, or they differ in kind, dtype, device or trailing shape.
    """
    if not columns:
        raise BatchError("cannot concatenate zero columns: pass at least one")
    first = columns[0]
    for shard, column in enumerate(columns):
        if _signature(column) != _signature(first):
            raise BatchError(
                "columns to concatenate must agree in dtype, device and all dims but the first; "
                f"shard 0 has {describe(first)} and shard {shard} has {describe(column)}"
                + _device_note(first, column)
            )
    if not isinstance(first, torch.Tensor):
        return np.concatenate(columns)
    if not first.is_nested:
        return dense.cat(columns)  # type: ignore[arg-type]
    parts = [jagged_parts(column) for column in columns]  # type: ignore[arg-type]
    ragged_idx = parts[0][2]
    values = dense.cat([values for values, _, _ in parts], ragged_idx - 1)
    lengths = torch.cat([offsets.diff() for _, offsets, _ in parts])
    return jagged(values, _offsets(lengths), ragged_idx)


def _signature(column: Column) -> tuple[object, ...]:
    """What columns must have in common to be concatenated."""
    if not isinstance(column, torch.Tensor):
        kind = column.dtype.kind
        return kind if kind in "US" else column.dtype, column.shape[1:]  # "US": any string width
    if not column.is_nested:
        return "dense", column.dtype, column.device, column.shape[1:]
    values, _, ragged_idx = jagged_parts(column)
    trailing = list(values.shape)
    trailing[ragged_idx - 1] = -1
    return "nested", column.dtype, column.device, trailing


def _device_note(a: Column, b: Column) -> str:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.device != b.device:
        return f" (on {a.device} and {b.device})"
    return ""


def repeat(
    column: Column, times: int | np.integer[Any] | Sequence[int] | Column, interleave: bool
) -> Column:
    """Copy every row `times` times: a a b b with `interleave`, else a b a b.

    `times` may also hold one count per row, which implies `interleave`.

    Raises:
        BatchError: a negative count, or not one count per row.
    """
    count = rows(column)
    if not isinstance(times, (int, np.integer)):
        counts = indices.numbers("repeat_times", times)
        if counts.numel() == 0:  # an empty list becomes a float tensor
            counts = counts.long()
        whole = counts.shape == (count,) and indices.are_whole(counts)
        if not whole or ((counts := counts.long()) < 0).any():
            raise BatchError(
                f"repeat_times must hold one count (>= 0) for each of {count} rows; got {times!r}"
            )
        return take(column, torch.repeat_interleave(torch.arange(count), counts.cpu()))
    times = checks.count("repeat_times", times)
    index = torch.arange(count)
    return take(
        column,
        index.repeat_interleave(times)
        if checks.flag("interleave", interleave)
        else index.repeat(times),
    )


def as_object_array(values: Sequence[object]) -> np.ndarray[Any, Any]:
    """A 1-D object array with one element per value, also where numpy would build a 2-D one."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


_ATOMS = frozenset({str, bytes, int, bool, type(None)})


def equal(a: object, b: object) -> bool:
    """Deep equality in which NaN equals NaN and cycles end.

    Tensors and arrays are equal if dtype, shape and every element are; devices are ignored.
    """
    return _equal(a, b, set())


def _equal(a: Any, b: Any, visiting: set[tuple[int, int]]) -> bool:
    if type(a) in _ATOMS and type(a) is type(b):  # most of what object columns hold
        return bool(a == b)
    if a is b or (id(a), id(b)) in visiting:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _same_tensor(a, b)
    visiting.add((id(a), id(b)))
    try:
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            if type(a) is not type(b) or a.shape != b.shape or a.dtype.kind != b.dtype.kind:
                return False
            if a.dtype.kind == "O":
                return all(_equal(x, y, visiting) for x, y in zip(a.flat, b.flat, strict=True))
            if a.dtype != b.dtype and a.dtype.kind not in "US":
                return False
            return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM"))
        if is_tensor_collection(a) or isinstance(a, Mapping):
            return (
                type(a) is type(b)
                and getattr(a, "batch_size", None) == getattr(b, "batch_size", None)
                and set(a.keys()) == set(b.keys())
                and all(_equal(a[key], b[key], visiting) for key in a.keys())  # noqa: SIM118
            )
        if isinstance(a, (list, tuple)):
            return (
                type(a) is type(b)
                and len(a) == len(b)
                and all(_equal(x, y, visiting) for x, y in zip(a, b, strict=True))
            )
        try:
            return bool(a == b) or bool(a != a and b != b)  # only NaN is not itself
        except (TypeError, ValueError, RuntimeError):  # an == that does not give a truth value
            return False
    finally:
        visiting.discard((id(a), id(b)))


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.is_nested != b.is_nested or a.dim() != b.dim():
        return False
    if a.is_nested:
        parts = zip(jagged_parts(a), jagged_parts(b), strict=True)
        return all(_equal(x, y, set()) for x, y in parts)
    if a.shape != b.shape:
        return False
    if _view_of(a) == _view_of(b):
        return True
    a, b = a.detach(), b.detach().to(a.device)
    if a.element_size() == 1 and a.is_floating_point():  # float8 has no comparison
        a, b = a.to(torch.float32), b.to(torch.float32)
    if torch.equal(a, b):
        return True
    exact = not (a.is_floating_point() or a.is_complex())
    return not exact and bool(((a == b) | ((a != a) & (b != b))).all())


def _view_of(a: torch.Tensor) -> tuple[object, ...]:
    return a.data_ptr(), a.device, a.stride(), a.is_conj(), a.is_neg()
