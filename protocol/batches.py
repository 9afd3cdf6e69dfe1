"""Whole batches of either kind, DataProto or TensorDict: what dispatch and futures do with them,
and veRL's functions beside its class. What rows are is left to `columns`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tensordict import NonTensorData, TensorDict, TensorDictBase

from protocol import checks, columns, combine
from protocol.checks import balanced_sizes, equal_sizes
from protocol.data_proto import DataProto, DataProtoItem
from protocol.errors import BatchError, BatchTypeError, RowCountError
from protocol.wire import reading

__all__ = [
    "Batch",
    "BatchData",
    "all_gather_data_proto",
    "balanced_sizes",
    "batch_rows",
    "batch_tensors",
    "collate_fn",
    "concat_batches",
    "copy_batch",
    "detach_batch",
    "equal_sizes",
    "fold_batch_dim",
    "has_rows",
    "is_batch",
    "lend_rows",
    "on_one_device",
    "only_batch",
    "pad_batch",
    "pad_dataproto_to_divisor",
    "select_keys",
    "set_shared_values",
    "shared_values",
    "slice_batch",
    "split_batch",
    "unfold_batch_dim",
    "union_batches",
    "unpad_dataproto",
]

Batch: TypeAlias = DataProto | TensorDict
_B = TypeVar("_B", DataProto, TensorDict)


def is_batch(x: object) -> TypeGuard[Batch]:
    return isinstance(x, DataProto | TensorDict)


def has_rows(x: Batch) -> bool:
    """Whether rows can be split; a TensorDict of `batch_size=[]` goes whole, as metrics do."""
    return isinstance(x, DataProto) or len(x.batch_size) > 0


def batch_rows(x: Batch) -> int:
    """Rows along dim 0; none in a TensorDict without batch dim."""
    return len(x) if has_rows(x) else 0


def slice_batch(x: Batch, start: int, stop: int) -> Batch:
    """Rows `start:stop`, as views; RowCountError unless 0 <= start <= stop <= rows."""
    if not 0 <= start <= stop <= batch_rows(x):
        raise RowCountError(f"rows {start}:{stop} are not in a batch of {batch_rows(x)} rows")
    if isinstance(x, DataProto):
        return x.slice(start, stop)
    return columns.slice_rows(x, start, stop) if has_rows(x) else x


def split_batch(x: Batch, sizes: Sequence[int]) -> Sequence[Batch]:
    """Consecutive rows, as views; RowCountError if the sizes do not sum to the rows."""
    return x._split(sizes) if isinstance(x, DataProto) else columns.split(x, sizes)


def pad_batch(x: Batch, count: int) -> Batch:
    """A new batch with the last row repeated `count` times; RowCountError if there is none."""
    return _take(x, checks.padded(batch_rows(x), count))


def _take(x: _B, index: torch.Tensor) -> _B:
    return x.select_idxs(index) if isinstance(x, DataProto) else columns.take(x, index)  # type: ignore[no-any-return]


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """All rows of batches of one kind, in new memory; BatchError if they do not go together."""
    if not batches or isinstance(batches[0], DataProto):
        return DataProto.concat(batches)
    kind: Any = TensorDictBase
    return combine.cat_tensordicts(checks.list_of(kind, "batches", batches))


def union_batches(left: Batch, right: Batch) -> Batch:
    """The columns of two batches of one kind and of equal rows, in a new one."""
    if isinstance(left, DataProto) and isinstance(right, DataProto):
        return left.union(right)
    if isinstance(left, TensorDict) and isinstance(right, TensorDict):
        values = {**dict(left.items()), **combine.added(left, right)}
        return columns.build(values, left.batch_size, left.device)
    raise BatchTypeError(f"a union is of two DataProto or TensorDict; got {[left, right]!r:.200}")


def only_batch(x: Batch) -> Batch:
    """What `concat_batches` makes of it alone, but in the same memory."""
    if not isinstance(x, DataProto):
        return x
    whole = copy.copy(x)
    whole.meta_info = combine.merge_meta([x.meta_info])
    return whole


def copy_batch(x: Batch) -> Batch:
    """The same rows in memory of their own, on the same device, without autograd's graph."""
    return copy.deepcopy(x) if isinstance(x, DataProto) else columns.map_leaves(x, columns.twin)


def detach_batch(x: Batch) -> Batch:
    """The same tensors without autograd's graph, in a batch with dicts and arrays of its own."""

    def detached(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().requires_grad_(value.requires_grad)
        return value.copy() if isinstance(value, np.ndarray) else value

    return x._twin(detached) if isinstance(x, DataProto) else columns.map_leaves(x, detached)


def batch_tensors(x: Batch) -> list[torch.Tensor]:
    """Its tensors, those of nested TensorDicts too."""
    if isinstance(x, DataProto):
        return [*x._tensors().values()]
    values = x.values(include_nested=True, leaves_only=True)
    return [value for value in values if isinstance(value, torch.Tensor)]


def lend_rows(x: Batch, start: int, stop: int) -> Batch:
    """Rows `start:stop` of a batch that others use, as the reader asked for them to be read
    (`protocol.wire.reading`): copies on the same device, or views, where arrays are read-only.
    """
    rows, how = slice_batch(x, start, stop), reading()
    if how == "own":
        return copy_batch(rows)
    if isinstance(rows, DataProto):
        rows.meta_info = columns.deepcopy(rows.meta_info)
        for key, array in rows.non_tensor_batch.items():
            lent = columns.deepcopy(array) if array.dtype.hasobject else array.view()
            lent.flags.writeable = how != "view"
            rows.non_tensor_batch[key] = lent
    return rows


def on_one_device(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, those on an accelerator moved to the CPU unless all are on the same one."""
    devices = [{str(tensor.device) for tensor in batch_tensors(batch)} for batch in batches]
    if len(set().union(*devices)) < 2:
        return [*batches]
    return [
        batch if found <= {"cpu"} else copy.copy(batch).to("cpu")
        for batch, found in zip(batches, devices, strict=True)
    ]


def select_keys(x: Batch, keys: Iterable[str], strict: bool = True) -> Batch:
    """Only these columns, shared with `x`; meta_info stays whole.

    MissingKeyError for a key that the batch lacks, unless it need not be there (`strict`), or there
    are no rows: then others decide which columns there are.
    """
    keys, batch = checks.key_list("keys", keys), x
    if isinstance(batch, TensorDict):
        if strict and (not has_rows(batch) or len(batch)):
            combine.require_keys(keys, batch.keys(), "batch")
        some = {key: batch.get(key) for key in keys if key in batch.keys()}  # noqa: SIM118
        return columns.build(some, batch.batch_size, batch.device)
    tensors = batch._tensors()
    if strict and len(batch):
        combine.require_keys(keys, {**tensors, **batch.non_tensor_batch}, "batch")
    return DataProto.select(batch, [key for key in keys if key in tensors], keys)


def shared_values(x: Batch) -> dict[str, Any]:
    """What all rows share: the meta_info of a DataProto, the shared objects of a TensorDict."""
    if isinstance(x, DataProto):
        return dict(x.meta_info)
    return {key: value.data for key, value in x.items() if isinstance(value, NonTensorData)}


def set_shared_values(x: Batch, values: Mapping[str, Any]) -> None:
    """Replace, in place, some of what all rows share."""
    if isinstance(x, DataProto):
        x.meta_info.update(values)
        return
    for key, value in values.items():
        columns.put(x, key, NonTensorData(value, batch_size=x.batch_size))


def pad_dataproto_to_divisor(data: _B, size_divisor: int) -> tuple[_B, int]:
    """`(padded, pad_size)`: the rows again from the first on, until they divide by `size_divisor`;
    the batch itself if it divides already, as an empty one does.
    """
    rows = batch_rows(data)
    pad_size = -rows % checks.count("size_divisor", size_divisor, least=1)
    if not pad_size:
        return data, 0
    return _take(data, torch.arange(rows + pad_size) % rows), pad_size


def unpad_dataproto(data: _B, pad_size: int) -> _B:
    """The batch without its last `pad_size` rows, as views; itself if that is 0."""
    return slice_batch(data, 0, len(data) - pad_size) if pad_size else data  # type: ignore[return-value]


def collate_fn(x: Sequence[DataProtoItem]) -> DataProto:
    """A batch of single rows, without their meta_info; arrays are of dtype object. BatchError if
    there is no row, or they differ in keys.
    """
    if not x:
        raise BatchError("cannot collate zero rows: pass at least one")
    rows, objects = [item._tensors() for item in x], [item.non_tensor_batch for item in x]
    combine.require_same_keys(rows, "rows to collate", "batch of row")
    combine.require_same_keys(objects, "rows to collate", "non_tensor_batch of row")
    tensors = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    like = x[0]._batch
    batch = None if like is None else TensorDict(tensors, [len(x)], device=like.device)
    arrays = {key: columns.as_object_array([row[key] for row in objects]) for key in objects[0]}
    return DataProto(batch, arrays)


def fold_batch_dim(data: DataProto, new_batch_size: int) -> DataProto:
    """Columns of shape (rows, ...) become (new_batch_size, rows // new_batch_size, ...)."""
    each = len(data) // checks.count("new_batch_size", new_batch_size, least=1)
    return _reshaped(data, lambda column: (new_batch_size, each, *column.shape[1:]))


def unfold_batch_dim(data: DataProto, batch_dims: int = 2) -> DataProto:
    """Merge the first `batch_dims` dims of all columns; undoes `fold_batch_dim`."""
    return _reshaped(
        data, lambda column: (math.prod(column.shape[:batch_dims]), *column.shape[batch_dims:])
    )


def _reshaped(data: DataProto, shape: Callable[[Any], Any]) -> DataProto:
    tensors = {key: column.reshape(shape(column)) for key, column in data._tensors().items()}
    arrays = {key: column.reshape(shape(column)) for key, column in data.non_tensor_batch.items()}
    return DataProto.from_dict(tensors, arrays, data.meta_info)


def all_gather_data_proto(data: DataProto, process_group: dist.ProcessGroup | None) -> None:
    """Replace the columns of `data`, in place, by those of all ranks of the group, in rank order.

    Ranks may hold different numbers of rows, and are joined as `DataProto.concat` joins them; all
    of it travels pickled, and arrives on the device that `data` is on. meta_info stays that of this
    rank. BatchError, on every rank, if they do not go together.
    """
    shards: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(shards, data.select(meta_info_keys=[]), group=process_group)
    whole = DataProto.concat(shards)
    if (tensors := batch_tensors(data)) and tensors[0].device.type != "cpu":
        whole.to(tensors[0].device)
    data.batch, data.non_tensor_batch = whole.batch, whole.non_tensor_batch


class BatchData:
    """veRL's wrapper that asks of any value whether it can be split or joined by rows.

    `data` is a DataProto, TensorDict, DataProtoFuture, or anything else that has `chunk(n)` and a
    `concat` of its class, to chunk, or a list of one kind to concat.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def is_chunkable(self) -> bool:
        """Whether `chunk` works: the value is one batch or future, or has its methods."""
        splits, joins = getattr(self.data, "chunk", None), getattr(type(self.data), "concat", None)
        return isinstance(self.data, TensorDict) or (callable(splits) and callable(joins))

    def is_concatable(self) -> bool:
        """Whether `concat` works: the value is a list of what can be chunked, of one type."""
        if not isinstance(self.data, list | tuple) or not self.data:
            return False
        kind = type(self.data[0])
        return all(type(x) is kind and BatchData(x).is_chunkable() for x in self.data)

    def chunk(self, chunks: int) -> list[Any]:
        """`chunks` equal parts; ChunkError if rows do not divide. Fetches nothing of a future."""
        if isinstance(self.data, TensorDict):
            return [*split_batch(self.data, equal_sizes(batch_rows(self.data), chunks))]
        return [*self.data.chunk(chunks)]

    def concat(self) -> Any:
        """All rows of all elements. Fetches nothing."""
        joined: Any = concat_batches if is_batch(self.data[0]) else type(self.data[0]).concat
        return joined(self.data)
