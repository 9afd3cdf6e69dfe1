"""Pure functions on one column of a batch (a tensor, a jagged tensor or an array); what a set of
columns means is left to `data_proto` and `tensordict_utils`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
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
    "combinable",
    "describe",
    "differing_dim",
    "elements",
    "equal",
    "flat_bytes",
    "from_rows",
    "from_strided_parts",
    "is_nested",
    "is_strided",
    "jagged",
    "jagged_parts",
    "lacks_eq",
    "nbytes",
    "ragged_mark",
    "repeat",
    "row",
    "rows",
    "slice_rows",
    "split",
    "strided",
    "strided_parts",
    "take",
    "unbind",
]

Column: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"


# A nested tensor of n rows is stored as `values`, all rows one after another along one dim, and
# n + 1 `offsets` into that dim. Everything below is arithmetic on these two.


def is_nested(column: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a nested tensor, jagged or strided: its rows differ in length."""
    return isinstance(column, torch.Tensor) and column.is_nested


def is_strided(column: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a nested tensor of strided layout, whose rows may differ in several dims. It
    is worked on row by row.
    """
    return is_nested(column) and column.layout is torch.strided


def strided(rows: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A nested tensor of these rows, of the dtype and on the device of another tensor."""
    if rows:
        return torch.nested.as_nested_tensor(list(rows))
    return torch.nested.nested_tensor([], dtype=like.dtype, device=like.device)


def strided_parts(column: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """All elements of a strided nested tensor in one dim, and the shapes of its rows."""
    rows = column.unbind()
    flat = [row.reshape(-1) for row in rows]
    empty = torch.empty(0, dtype=column.dtype, device=column.device)
    return torch.cat(flat or [empty]), [tuple(row.shape) for row in rows]


def from_strided_parts(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
    """The nested tensor that `strided_parts` takes apart."""
    pieces = flat.split_with_sizes([math.prod(shape) for shape in shapes]) if shapes else ()
    return strided([part.view(*shape) for part, shape in zip(pieces, shapes, strict=True)], flat)


def elements(column: torch.Tensor) -> torch.Tensor:
    """Those of a nested tensor, in a dense one."""
    return strided_parts(column)[0] if is_strided(column) else jagged_parts(column)[0]


def jagged_parts(column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`(values, offsets, ragged_idx)` of any nested tensor, without holes and with offsets[0] == 0.

    `ragged_idx` is the ragged dim of the column, so `ragged_idx - 1` is that of `values`.
    """
    if is_strided(column):
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
    """The nested tensor that `jagged_parts` takes apart.

    It knows its shortest and longest row: torch pads one that does not to the length of all rows
    together.
    """
    lengths = offsets.diff()
    shortest, longest = torch.stack(lengths.aminmax()).tolist() if len(lengths) else (0, 0)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, jagged_dim=ragged_idx, min_seqlen=shortest, max_seqlen=longest
    )


def ragged_mark(column: torch.Tensor) -> Hashable:
    """What nested tensors have in common that torch lets be combined: their offsets are the same
    tensor.
    """
    return id(column.offsets()), id(column.lengths())  # type: ignore[attr-defined]


def combinable(after: Mapping[Any, Any], *before: Mapping[Any, Any]) -> dict[Any, Any]:
    """The columns `after`, each made of those of its name `before`: jagged ones that had common
    offsets have them still.
    """
    columns_of, firsts = dict(after), dict[Hashable, torch.Tensor]()
    for key, column in after.items():
        if is_nested(column) and not is_strided(column):
            first = firsts.setdefault(tuple(ragged_mark(part[key]) for part in before), column)
            if ragged_mark(first) != ragged_mark(column):
                columns_of[key] = _with_offsets(column, first.offsets())  # type: ignore[attr-defined]
    return columns_of


def _with_offsets(column: Any, offsets: torch.Tensor) -> torch.Tensor:
    own = column.is_leaf and column.requires_grad
    values = (column.detach() if own else column).values()
    twin = jagged(values, offsets, column._ragged_idx)
    return twin.requires_grad_() if own else twin


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
    return (elements(column) if is_nested(column) else column).nbytes


def describe(column: Column) -> str:
    """`int64 (4, 2)` or `int64 jagged (4, *)`: kind and shape, no data."""
    if not isinstance(column, torch.Tensor):
        return f"{column.dtype} array {column.shape}"
    sizes = ["*" if not isinstance(size, int) else str(size) for size in _shape(column)]
    layout = " jagged" if column.is_nested else ""
    end = "," if len(sizes) == 1 else ""
    return f"{str(column.dtype).removeprefix('torch.')}{layout} ({', '.join(sizes)}{end})"


def _shape(column: torch.Tensor) -> Sequence[object]:
    if is_strided(column):
        return [column.size(0), *"*" * (column.dim() - 1)]
    return column.shape


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
    if is_strided(column):
        each = column.unbind()
        return strided([each[at] for at in index.tolist()], column)
    values, offsets, ragged_idx = jagged_parts(column)
    starts, lengths = offsets[:-1][index], offsets.diff()[index]
    return jagged(*_gather(values, starts, lengths, ragged_idx - 1), ragged_idx)


def row(column: Column, at: int) -> Any:
    """Row `at` (not negative) without the batch dim: a view of a tensor, an element of an array."""
    if not is_nested(column) or is_strided(column):
        return column[at]
    jagged_column: Any = column
    offsets, lengths = jagged_column.offsets(), jagged_column.lengths()
    start = int(offsets[at])
    length = int(offsets[at + 1]) - start if lengths is None else int(lengths[at])
    return jagged_column.values().narrow(jagged_column._ragged_idx - 1, start, length)


def unbind(column: Column) -> Sequence[Any]:
    """What `row` gives for each row, together: that takes a nested tensor far less time."""
    rows: Any = column.unbind() if isinstance(column, torch.Tensor) else column
    return rows  # type: ignore[no-any-return]


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
    if is_strided(column):
        each = column.unbind()
        return [strided(each[a:b], column) for a, b in bounds]
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

    Numbers of several dtypes become those that torch or numpy promote them to.

    Raises:
        BatchError: no column, or they differ in kind, device or trailing shape, or their dtypes
            have none in common.
    """
    if not columns:
        raise BatchError("cannot concatenate zero columns: pass at least one")
    first, signature = columns[0], _signature(columns[0])
    for shard, column in enumerate(columns):
        if shard and _signature(column) != signature:
            raise _differ(columns, shard, "agree in kind, device and all dims but the first")
    dtype: Any = first.dtype
    for shard, column in enumerate(columns):
        if (common := _promoted(dtype, column.dtype)) is None:
            raise _differ(columns, shard, "be of dtypes that have one in common")
        dtype = common
    if not isinstance(first, torch.Tensor):
        return np.concatenate([np.asarray(column, dtype) for column in columns])
    tensors: list[Any] = [c if c.dtype == dtype else c.to(dtype) for c in columns]  # type: ignore[union-attr]
    if not first.is_nested:
        return dense.cat(tensors)
    if is_strided(first):
        return strided([row for tensor in tensors for row in tensor.unbind()], first.to(dtype))
    parts = [jagged_parts(tensor) for tensor in tensors]
    ragged_idx = parts[0][2]
    values = dense.cat([values for values, _, _ in parts], ragged_idx - 1)
    lengths = torch.cat([offsets.diff() for _, offsets, _ in parts])
    return jagged(values, _offsets(lengths), ragged_idx)


def _differ(columns: Sequence[Column], shard: int, wanted: str) -> BatchError:
    first, column = columns[0], columns[shard]
    return BatchError(
        f"columns to concatenate must {wanted}; shard 0 has {describe(first)} and shard {shard} "
        f"has {describe(column)}" + _device_note(first, column)
    )


def _signature(column: Column) -> tuple[object, ...]:
    """What columns must have in common to be concatenated, but for the dtype."""
    if not isinstance(column, torch.Tensor):
        return "array", column.shape[1:]
    if not column.is_nested:
        return "dense", column.device, column.shape[1:]
    if is_strided(column):
        return "strided", column.device, column.dim() if column.size(0) else None
    values, _, ragged_idx = jagged_parts(column)
    trailing = list(values.shape)
    trailing[ragged_idx - 1] = -1
    return "nested", column.device, trailing


def _promoted(a: Any, b: Any) -> Any:
    """The dtype that holds the values of both; None if there is none."""
    if a == b:
        return a
    kinds = {a.kind, b.kind} if isinstance(a, np.dtype) else {"O"}
    # numpy would also turn numbers into text, and into durations.
    if "O" not in kinds and not any(kinds <= {*k} for k in ("biufc", "S", "U", "m", "M", "V")):
        return None
    try:
        library: Any = np if isinstance(a, np.dtype) else torch
        return library.promote_types(a, b)
    except (TypeError, RuntimeError):  # structures, and torch's float8
        return None


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

    Tensors and arrays are equal if dtype, shape and every element are; devices are ignored. Objects
    whose class has no `__eq__` are if what pickle would save of them is.
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
            if isinstance(a, np.ma.MaskedArray):
                masked: list[Any] = [a, b]
                x, y = ([np.ma.getmaskarray(array), array.compressed()] for array in masked)
                return _equal(x, y, visiting)
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
            if bool(a == b) or bool(a != a and b != b):  # only NaN is not itself
                return True
        except (TypeError, ValueError, RuntimeError):  # an == that does not give a truth value
            return _same_state(a, b, visiting)
        return lacks_eq(a) and _same_state(a, b, visiting)
    finally:
        visiting.discard((id(a), id(b)))


def lacks_eq(value: object) -> bool:
    """Whether its class leaves it to identity what is equal."""
    return type(value).__eq__ is object.__eq__


def _same_state(a: Any, b: Any, visiting: set[tuple[int, int]]) -> bool:
    """Whether pickle would save the same of both."""
    if type(a) is not type(b):
        return False
    try:
        x, y = (value.__reduce_ex__(4) for value in (a, b))
    except Exception:  # it cannot be pickled, for reasons of its own
        return False
    if isinstance(x, str) or isinstance(y, str):  # the name of a global
        return bool(x == y)
    x, y = ([list(s) if isinstance(s, Iterator) else s for s in state] for state in (x, y))
    return _equal(x, y, visiting)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.is_nested != b.is_nested or a.dim() != b.dim():
        return False
    if not a.is_nested and (a.layout != b.layout or a.shape != b.shape):
        return False
    if not a.is_nested and a.layout is not torch.strided:
        return _equal(_parts(a), _parts(b), set())
    if is_strided(a) or is_strided(b):
        return _equal(a.unbind(), b.unbind(), set())
    if a.is_nested:
        parts = zip(jagged_parts(a), jagged_parts(b), strict=True)
        return all(_equal(x, y, set()) for x, y in parts)
    if _view_of(a) == _view_of(b):
        return True
    a, b = a.detach(), b.detach().to(a.device)
    if a.element_size() == 1 and a.is_floating_point():  # float8 has no comparison
        a, b = a.to(torch.float32), b.to(torch.float32)
    if torch.equal(a, b):
        return True
    exact = not (a.is_floating_point() or a.is_complex())
    return not exact and bool(((a == b) | ((a != a) & (b != b))).all())


def _parts(sparse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if sparse.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return (sparse.to_dense(),)
    entries = sparse.detach().to_sparse().coalesce()
    return entries.indices(), entries.values()


def _view_of(a: torch.Tensor) -> tuple[object, ...]:
    return a.data_ptr(), a.device, a.stride(), a.is_conj(), a.is_neg()
