"""Operations on the rows of a bare TensorDict, alike in every tensordict version; what veRL calls
them, and what it accepts, is left to `tensordict_utils`.

A value of a TensorDict is a column (tensor or jagged tensor), a stack with one Python object per
row, one object that all rows share, or again a TensorDict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase

from protocol import checks, columns, dense
from protocol.columns import Column
from protocol.errors import BatchError, RowCountError
from protocol.keyed import deciding, items, require_same_keys
from protocol.nested import concat_nested_tensors
from protocol.shards import check_sizes

__all__ = [
    "build",
    "concat",
    "copy",
    "count_rows",
    "map_columns",
    "put",
    "slice_rows",
    "split",
    "stack",
    "take",
]


def build(
    values: Mapping[Any, Any], size: Sequence[int], device: torch.device | None = None
) -> TensorDict:
    """The TensorDict of these values, which it shares.

    tensordict 0.10 takes a stack of zero objects only while there is no batch dim.
    """
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
    return NonTensorStack(*(_as_child(value) for value in values))


def _as_child(value: object) -> Any:
    return value if isinstance(value, NonTensorData | NonTensorStack) else NonTensorData(value)


def count_rows(td: TensorDict) -> int:
    """Rows along dim 0.

    Raises:
        RowCountError: the TensorDict has no batch dim.
    """
    if not checks.tensordict("a TensorDict argument", td).batch_size:
        raise RowCountError(
            "a TensorDict with batch_size=[] has no rows to work on; build it with "
            "get_tensordict, or pass batch_size=[rows]"
        )
    return int(td.batch_size[0])


def slice_rows(td: TensorDict, start: int, stop: int) -> TensorDict:
    """Rows `start:stop`, given 0 <= start <= stop <= rows; tensors are views."""
    return _map(td, [stop - start], lambda column: [columns.slice_rows(column, start, stop)])[0]


def split(td: TensorDict, sizes: Sequence[int]) -> list[TensorDict]:
    """Consecutive rows as views; a size may be zero.

    Raises:
        RowCountError: the sizes do not sum to the rows.
    """
    check_sizes(sizes, count_rows(td))
    return _map(td, sizes, lambda column: columns.split(column, sizes))


def take(td: TensorDict, index: torch.Tensor) -> TensorDict:
    """Copy the rows that `index` (1-D, int64, not negative) names, in its order."""
    return _map(td, [len(index)], lambda column: [columns.take(column, index)])[0]


def copy(td: TensorDict) -> TensorDict:
    """The same in memory of its own, on the same device, without autograd's graph."""

    def twin(value: Any) -> Any:
        own: Any = columns.cat([value.detach()]) if value.dim() else value.detach().clone()
        return own.requires_grad_(value.requires_grad)

    def own(value: Any) -> Any:
        if isinstance(value, NonTensorStack):
            return stack([own(child) for child in value.unbind(0)])
        return NonTensorData(dense.deepcopy(value.data), batch_size=value.batch_size)

    return map_columns(td, twin, own)


def map_columns(
    td: TensorDict,
    tensors: Callable[[torch.Tensor], torch.Tensor],
    objects: Callable[[Any], Any] = lambda value: value,
) -> TensorDict:
    """A TensorDict of the same shape with every tensor and every non-tensor value replaced."""

    def replaced(value: Any) -> Any:
        if isinstance(value, NonTensorData | NonTensorStack):
            return objects(value)
        is_inner = isinstance(value, TensorDictBase)
        return map_columns(value, tensors, objects) if is_inner else tensors(value)

    before = dict(items(td))
    after = columns.combinable({k: replaced(value) for k, value in before.items()}, before)
    return build(after, td.batch_size, td.device)


def _map(
    td: TensorDictBase, sizes: Sequence[int], op: Callable[[Column], Sequence[Column]]
) -> list[TensorDict]:
    """The TensorDicts of so many rows that `op` makes of every column."""
    shapes = [torch.Size([size, *td.batch_size[1:]]) for size in sizes]

    def pieces(value: Any) -> Sequence[Any]:
        if isinstance(value, NonTensorData):
            return [NonTensorData(value.data, batch_size=shape) for shape in shapes]
        if isinstance(value, NonTensorStack):
            objects = value.unbind(0)
            numbers = op(np.arange(len(objects)))  # which objects `op` puts where
            return [stack([objects[row] for row in piece]) for piece in numbers]
        return _map(value, sizes, op) if isinstance(value, TensorDictBase) else op(value)

    before = dict(items(td))
    columns_of = {key: pieces(value) for key, value in before.items()}
    return [
        build(
            columns.combinable({key: of[i] for key, of in columns_of.items()}, before),
            shape,
            td.device,
        )
        for i, shape in enumerate(shapes)
    ]


def concat(data: Sequence[TensorDict]) -> TensorDict:
    """All rows of all TensorDicts. Of an object that all rows share, the first one's stays; of a
    TensorDict without rows nothing does, if others have rows.

    Raises:
        BatchError: a key holds values that do not go together.
        MissingKeyError: the keys differ.
        RowCountError: a TensorDict without batch dim.
    """
    counts = [count_rows(td) for td in data]
    chosen = deciding(counts, [td.keys() for td in data])
    data, counts = [data[i] for i in chosen], [counts[i] for i in chosen]
    first = data[0]
    require_same_keys([td.keys() for td in data], "TensorDicts to concatenate", "shard")
    size = torch.Size([sum(counts), *first.batch_size[1:]])
    joined = {
        key: _join(str(key), [value, *(td.get(key) for td in data[1:])], counts, size)
        for key, value in first.items()
    }
    return build(columns.combinable(joined, *(dict(items(td)) for td in data)), size, first.device)


def _join(key: str, values: Sequence[Any], counts: Sequence[int], size: torch.Size) -> Any:
    kinds = {_kind(value) for value in values}
    if kinds == {"shared object"}:
        return NonTensorData(values[0].data, batch_size=size)
    if kinds <= {"shared object", "objects"}:
        return stack([c for v, n in zip(values, counts, strict=True) for c in _children(v, n)])
    if kinds == {"TensorDict"}:
        return concat(values)
    if len(kinds) > 1:
        raise BatchError(
            f"key {key!r} must hold the same kind of value in every TensorDict to concatenate; "
            f"got {[_kind(value) for value in values]}"
        )
    try:
        return concat_nested_tensors(list(values)) if kinds == {"jagged"} else columns.cat(values)
    except BatchError as error:
        raise type(error)(f"key {key!r}: {error}") from error


def _children(value: Any, rows: int) -> list[Any]:
    if isinstance(value, NonTensorStack):
        return list(value.unbind(0))
    return [NonTensorData(value.data) for _ in range(rows)]


def _kind(value: Any) -> str:
    if isinstance(value, NonTensorData):
        return "shared object"
    if isinstance(value, NonTensorStack):
        return "objects"
    if isinstance(value, TensorDictBase):
        return "TensorDict"
    return "jagged" if columns.is_nested(value) else "dense"
