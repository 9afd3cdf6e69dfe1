"""What one value of a batch does by rows, whichever kind it is: a tensor, jagged or not, an array,
a TensorDict, one Python object per row (NonTensorStack), or one for all rows (NonTensorData)."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase

from protocol.checks import check_sizes, short, wrong
from protocol.device_memory import to_host
from protocol.errors import BatchError, BatchTypeError, RowCountError

__all__ = [
    "NUMBERS",
    "Array",
    "Column",
    "Numbers",
    "Unbuilt",
    "as_object_array",
    "build",
    "cat",
    "combinable",
    "cut",
    "deepcopy",
    "describe",
    "flat_bytes",
    "is_jagged",
    "is_plain",
    "jagged",
    "jagged_parts",
    "leaves",
    "map_leaves",
    "nested_tensor_from_tensor_list",
    "put",
    "ragged_mark",
    "row",
    "rows",
    "slice_rows",
    "split",
    "stack",
    "take",
    "tensor",
    "twin",
    "unwrapped",
]

Array: TypeAlias = "np.ndarray[Any, Any]"
Column: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"

_LARGE = 1 << 22  # bytes from which numpy asks for large pages


class Numbers(NamedTuple):
    """A dense tensor on the CPU before someone asks for it: numpy shows memory, which may be
    read-only, in a tenth of the time that torch takes, and joins small ones sooner.
    """

    array: Array
    dtype: torch.dtype  # where numpy has none like it, the array is of integers of its size


_NAMES = "bool uint8 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
NUMBERS = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}  # which both have


def tensor(column: Any) -> Any:
    """The tensor of `Numbers`; any other column itself."""
    if type(column) is not Numbers:
        return column
    array, dtype = column
    made = torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))
    return made if dtype in NUMBERS else made.view(dtype)


class _Writable:
    """Shows a read-only array to torch, which warns about those, as if it could be written."""

    def __init__(self, source: Array) -> None:
        self.source = source  # keeps the memory alive
        self.__array_interface__ = source.__array_interface__
        self.__array_interface__["data"] = self.__array_interface__["data"][0], False


# A jagged tensor of n rows is stored as `values`, all rows one after another along one dim, and
# n + 1 `offsets` into that dim. Everything below is arithmetic on these two. Torch's other nested
# tensors, of strided layout, are no columns.


def is_jagged(column: object) -> TypeGuard[torch.Tensor]:
    """Whether its rows may differ in length."""
    return isinstance(column, torch.Tensor) and column.layout is torch.jagged


def jagged_parts(column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`(values, offsets, ragged_idx)`, without holes and with offsets[0] == 0. The ragged dim of
    `values` is `ragged_idx - 1`.
    """
    nested: Any = column
    values, offsets, ragged_idx = nested.values(), nested.offsets(), nested._ragged_idx
    dim, lengths = ragged_idx - 1, nested.lengths()
    if lengths is not None:
        return *_gather(values, offsets[: len(lengths)], lengths, dim), ragged_idx
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != values.shape[dim]:
        values, offsets = values.narrow(dim, first, last - first), offsets - first
    return values, offsets, ragged_idx


def jagged(values: torch.Tensor, offsets: torch.Tensor, ragged_idx: int) -> torch.Tensor:
    """What `jagged_parts` takes apart. It knows its shortest and longest row: torch pads one that
    does not to the length of all rows together.
    """
    lengths = offsets.diff()
    shortest, longest = torch.stack(lengths.aminmax()).tolist() if len(lengths) else (0, 0)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, jagged_dim=ragged_idx, min_seqlen=shortest, max_seqlen=longest
    )


def nested_tensor_from_tensor_list(
    tensors: Sequence[torch.Tensor], ragged_idx: int | None = None
) -> torch.Tensor:
    """A jagged tensor whose row i is `tensors[i]`, also when all rows have one shape.

    The ragged dim is `ragged_idx`, counted with the batch dim: 1 for rows of shape (length, ...),
    2 for (k, length, ...). Left out, it is the dim in which the rows differ, or the last one if
    they do not.

    >>> nested_tensor_from_tensor_list([torch.zeros(3, 2), torch.zeros(3, 5)], ragged_idx=2).dim()
    3

    Raises:
        BatchError: no tensor, they differ in another dim, or have no such dim.
    """
    if not tensors:
        raise BatchError("Must provide at least one tensor")
    most = tensors[0].dim()
    if ragged_idx is None:  # the dim in which they differ
        lengths = [len(set(each)) for each in zip(*(t.shape for t in tensors), strict=False)]
        ragged_idx = next((dim for dim, n in enumerate(lengths, 1) if n > 1), most)
    if not 1 <= ragged_idx <= most:
        raise BatchError(f"ragged_idx must be in [1, {most}] for such rows. Got {ragged_idx=}")
    dim = ragged_idx - 1
    try:
        values = torch.cat([*tensors], dim)
    except (RuntimeError, TypeError) as error:
        raise BatchError(f"only dense rows that agree in all dims but {dim}: {error}") from error
    sizes = torch.tensor([t.shape[dim] for t in tensors], device=values.device)
    return jagged(values, _offsets(sizes), ragged_idx)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _gather(
    values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy `lengths[i]` elements from `starts[i]` on, for every i; returns values and offsets."""
    offsets = _offsets(lengths)
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths)
    return values.index_select(dim, shift + torch.arange(len(shift), device=shift.device)), offsets


def ragged_mark(column: torch.Tensor) -> Hashable:
    """Torch lets jagged tensors be combined if this is the same: the very tensors of offsets."""
    return id(column.offsets()), id(column.lengths())  # type: ignore[attr-defined]


def combinable(after: Mapping[Any, Any], *before: Mapping[Any, Any]) -> dict[Any, Any]:
    """The columns `after`, made of those `before`: jagged ones keep the offsets in common."""
    result, firsts = dict(after), dict[Hashable, Any]()
    for key, column in after.items():
        if is_jagged(column):
            first = firsts.setdefault(tuple(ragged_mark(part[key]) for part in before), column)
            if ragged_mark(first) != ragged_mark(column):
                leaf: Any = column.is_leaf and column.requires_grad
                nested: Any = column.detach() if leaf else column
                twin = jagged(nested.values(), first.offsets(), nested._ragged_idx)
                result[key] = twin.requires_grad_() if leaf else twin
    return result


# TensorDicts


class Unbuilt(NamedTuple):
    """What a TensorDict is built from once someone asks for it; cutting a batch does not."""

    columns: Mapping[Any, torch.Tensor | Numbers]
    batch_size: tuple[int, ...]
    device: torch.device | None

    def tensors(self) -> dict[Any, torch.Tensor]:
        return {key: tensor(column) for key, column in self.columns.items()}


def build(
    values: Mapping[Any, Any], size: Sequence[int], device: torch.device | None = None
) -> TensorDict:
    """A TensorDict; the batch dims come last, or tensordict 0.10 takes no stack of zero objects."""
    td = TensorDict(dict(values), batch_size=[], device=device)
    td.batch_size = torch.Size(size)
    return td


def put(td: TensorDict, key: str, value: Any) -> None:
    """Set one value in place; like `build`, also a stack of zero objects."""
    size, td.batch_size = td.batch_size, torch.Size([])
    try:
        td.set(key, value)
    finally:
        td.batch_size = size


def stack(values: Sequence[object]) -> Any:
    """One Python object per row."""
    wrapped = (NonTensorData, NonTensorStack)
    return NonTensorStack(*(v if isinstance(v, wrapped) else NonTensorData(v) for v in values))


def unwrapped(value: Any) -> Any:
    """The objects of a stack in a list, or the one that all rows share; else the value itself."""
    if isinstance(value, NonTensorStack):
        return value.tolist()
    return value.data if isinstance(value, NonTensorData) else value


def leaves(batch: TensorDictBase, prefix: tuple[str, ...] = ()) -> dict[Any, torch.Tensor]:
    """The tensors of a TensorDict, those in nested ones under a tuple of keys; nothing else may be
    in it.
    """
    found: dict[Any, torch.Tensor] = {}
    for key, value in batch.items():  # which refuses a lazy stack of rows that differ
        path = (*prefix, key)
        if isinstance(value, torch.Tensor):
            if value.is_nested and not is_jagged(value):
                raise wrong(f"batch[{key!r}]", "a dense or jagged tensor", value)
            found[path if prefix else key] = value
        elif isinstance(value, TensorDictBase):
            found.update(leaves(value, path))
        else:
            raise BatchTypeError(
                f"batch[{key!r}] must be a tensor, got {type(value).__name__}: put it into "
                "non_tensor_batch or meta_info, or build the batch with DataProto.from_tensordict"
            )
    return found


def map_leaves(td: TensorDictBase, function: Callable[[Any], Any]) -> TensorDict:
    """A TensorDict of the same shape with every tensor, stack and shared object replaced."""

    def replaced(value: Any) -> Any:
        inner = isinstance(value, TensorDictBase) and not isinstance(value, NonTensorStack)
        return map_leaves(value, function) if inner else function(value)

    before = dict(td.items())
    after = {key: replaced(value) for key, value in before.items()}
    return build(combinable(after, before), td.batch_size, td.device)


def cut(
    values: Mapping[Any, Any], count: int, op: Callable[[Any], Sequence[Any]]
) -> list[dict[Any, Any]]:
    """`op` makes `count` columns of each; these by part."""
    pieces = {key: op(column) for key, column in values.items()}
    parts = [{key: each[i] for key, each in pieces.items()} for i in range(count)]
    return [combinable(part, values) for part in parts]


def _cut(value: Any, sizes: Sequence[int], op: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """The same for a TensorDict, or what is in one."""
    shapes = [torch.Size([size, *value.batch_size[1:]]) for size in sizes]
    if isinstance(value, NonTensorData):
        return [NonTensorData(value.data, batch_size=shape) for shape in shapes]
    if isinstance(value, NonTensorStack):
        objects = value.unbind(0)
        return [stack([objects[i] for i in piece]) for piece in op(np.arange(len(objects)))]
    parts = cut(dict(value.items()), len(sizes), op)
    return [build(*each, value.device) for each in zip(parts, shapes, strict=True)]


# Rows of any kind of value


def rows(column: Any, name: str = "a column") -> int:
    """How many there are; BatchTypeError for what cannot be cut into rows, sparse tensors say."""
    if isinstance(column, torch.Tensor):
        known = column.layout is (torch.jagged if column.is_nested else torch.strided)
    else:
        known = isinstance(column, (np.ndarray, TensorDictBase, NonTensorData))
    if not known:
        raise wrong(name, "an array, or a dense or jagged tensor", column)
    if not column.shape:
        raise RowCountError(f"{name} needs rows along dim 0; got a 0-dim value or batch_size=[]")
    return int(column.shape[0])


def take(column: Any, index: torch.Tensor) -> Any:
    """Copy the rows that `index` (1-D, int64, not negative) names, in its order."""
    if isinstance(column, np.ndarray):
        return column[index.cpu().numpy()]
    if not isinstance(column, torch.Tensor):
        return _cut(column, [len(index)], lambda value: [take(value, index)])[0]
    index = index.to(column.device)
    if not is_jagged(column):
        return column.index_select(0, index)
    values, offsets, ragged_idx = jagged_parts(column)
    starts, lengths = offsets[:-1][index], offsets.diff()[index]
    return jagged(*_gather(values, starts, lengths, ragged_idx - 1), ragged_idx)


def row(column: Column, at: int) -> Any:
    """Row `at` (not negative) without the batch dim: a view of a tensor, an element of an array."""
    if not is_jagged(column):
        return column[at]
    nested: Any = column
    offsets, lengths = nested.offsets(), nested.lengths()
    start = int(offsets[at])
    length = int(offsets[at + 1]) - start if lengths is None else int(lengths[at])
    return nested.values().narrow(nested._ragged_idx - 1, start, length)


def slice_rows(column: Any, start: int, stop: int, step: int = 1) -> Any:
    """Rows `start:stop:step`, all in range; a view, but of a jagged tensor with step > 1."""
    if isinstance(column, (torch.Tensor, np.ndarray)) and not is_jagged(column):
        return column[start:stop:step]
    if step != 1:
        return take(column, torch.arange(start, stop, step))
    if not isinstance(column, torch.Tensor):
        return _cut(column, [stop - start], lambda value: [slice_rows(value, start, stop)])[0]
    return split(column, [start, stop - start, rows(column) - stop])[1]


def split(column: Any, sizes: Sequence[int]) -> list[Any]:
    """Views of consecutive rows; a size may be zero. RowCountError if the sizes do not sum up."""
    check_sizes(sizes, rows(column))
    bounds = pairwise(accumulate(sizes, initial=0))
    if isinstance(column, np.ndarray):
        return [column[a:b] for a, b in bounds]
    if not isinstance(column, torch.Tensor):
        return _cut(column, sizes, lambda value: split(value, sizes))
    if not is_jagged(column):
        return list(column.split_with_sizes(list(sizes)))  # torch.split takes twice as long
    values, offsets, ragged_idx = jagged_parts(column)
    at, dim = offsets.tolist(), ragged_idx - 1
    return [
        jagged(values.narrow(dim, at[a], at[b] - at[a]), offsets[a : b + 1] - at[a], ragged_idx)
        for a, b in bounds
    ]


def cat(columns: Sequence[Any]) -> Any:
    """All rows of all tensors or arrays, in new memory; numbers of several dtypes become those that
    torch or numpy promote them to. BatchError if they do not go together.
    """
    if not columns:
        raise BatchError("cannot concatenate zero columns: pass at least one")
    first = columns[0]
    if isinstance(first, Numbers) and first.array.nbytes < _LARGE:  # large ones torch joins sooner
        shape, dtype = first.array.shape[1:], first.dtype
        each = [c.array for c in columns if isinstance(c, Numbers) and c.dtype == dtype]
        if len(each) == len(columns) and all(array.shape[1:] == shape for array in each):
            return tensor(Numbers(np.concatenate(each), dtype))
    columns = [*map(tensor, columns)]
    try:
        if len({getattr(column, "layout", "array") for column in columns}) > 1:
            raise TypeError("they are arrays, dense and jagged tensors")
        if isinstance(columns[0], np.ndarray):
            return _cat_arrays(columns)
        return _cat_jagged(columns) if is_jagged(columns[0]) else _cat(columns, 0)
    except (TypeError, ValueError, RuntimeError) as error:
        shards = short([*map(describe, columns)], 200)
        raise BatchError(f"columns of {shards} cannot be joined: {error}") from error


def _cat_arrays(arrays: Sequence[Array]) -> Array:
    kinds = {array.dtype.kind for array in arrays}
    # numpy would also turn numbers into text, and into durations.
    if len(kinds) > 1 and "O" not in kinds and not kinds <= {*"biufc"}:
        raise TypeError("numbers, text and times have no dtype in common")
    return np.concatenate(arrays)


def _cat_jagged(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    columns = [column for column in columns if len(column)] or columns[:1]
    if len({column._ragged_idx for column in columns}) > 1:  # type: ignore[attr-defined]
        # Rows of one shape say nothing of the dim that was meant to be ragged: look at all.
        return nested_tensor_from_tensor_list([row for column in columns for row in column])
    parts = [jagged_parts(column) for column in columns]
    ragged_idx = parts[0][2]
    values = _cat([values for values, _, _ in parts], ragged_idx - 1)
    return jagged(values, _offsets(torch.cat([o.diff() for _, o, _ in parts])), ragged_idx)


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat` into memory that numpy allocates: it asks the kernel for large pages, without
    which most of the time goes into page faults.
    """
    first, dtypes = tensors[0], {tensor.dtype for tensor in tensors}
    large = sum(tensor.nbytes for tensor in tensors) >= _LARGE and len(dtypes) == 1
    if not large or first.device.type != "cpu" or any(t.requires_grad for t in tensors):
        return torch.cat(tensors, dim)
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    out = torch.from_numpy(np.empty(math.prod(shape) * first.element_size(), np.uint8))
    return torch.cat(tensors, dim, out=out.view(first.dtype).view(shape))


# One value as it is


def describe(column: Column) -> str:
    """`int64 (4, 2)` or `int64 jagged (4, *)`: kind and shape, no data."""
    if not isinstance(column, (torch.Tensor, np.ndarray)):
        return type(column).__name__
    if not isinstance(column, torch.Tensor):
        return f"{column.dtype} array {column.shape}"
    sizes = [str(size) if isinstance(size, int) else "*" for size in column.shape]
    layout = " jagged" if is_jagged(column) else ""
    end = "," if len(sizes) == 1 else ""
    return f"{str(column.dtype).removeprefix('torch.')}{layout} ({', '.join(sizes)}{end})"


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as uint8 on the CPU; a view where it can be."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return to_host(flat.view(torch.uint8))


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is one block of numbers in memory (not sparse, meta, distributed, ...)."""
    return (
        value.layout is torch.strided
        and not value.is_nested
        and not value.is_quantized
        and value.device.type != "meta"
        and type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    )


def as_object_array(values: Sequence[object]) -> Array:
    """A 1-D object array with one element per value, also where numpy would build a 2-D one."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def twin(value: Any) -> Any:
    """A value of a batch in memory of its own, on the same device, without autograd's graph."""
    if isinstance(value, torch.Tensor):
        own = cat([value.detach()]) if value.dim() else value.detach().clone()
        return own.requires_grad_(value.requires_grad)
    if isinstance(value, NonTensorStack):
        return stack([twin(child) for child in value.unbind(0)])
    if isinstance(value, NonTensorData):
        return NonTensorData(deepcopy(value.data), batch_size=value.batch_size)
    return deepcopy(value)


def deepcopy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except RuntimeError:  # torch refuses a tensor that autograd computed, which pickle takes
        return pickle.loads(pickle.dumps(value))
