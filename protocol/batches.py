"""What the dispatcher and futures do with a batch, whichever of the two kinds it is; how it is
done is left to `data_proto` and `tensordict_utils`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from tensordict import NonTensorData, TensorDict

from protocol import checks, dense, meta, tensordict_rows, tensordict_utils
from protocol.data_proto import DataProto
from protocol.errors import BatchError, BatchTypeError, MissingKeyError, RowCountError
from protocol.plain import arrival
from protocol.shards import balanced_sizes, equal_sizes
from protocol.table import Array
from protocol.wire import Reading, reading

__all__ = [
    "Batch",
    "balanced_sizes",
    "batch_rows",
    "batch_tensors",
    "concat_batches",
    "copy_batch",
    "detach_batch",
    "equal_sizes",
    "has_rows",
    "is_batch",
    "is_chunkable",
    "lend_rows",
    "on_one_device",
    "only_batch",
    "pad_batch",
    "select_keys",
    "set_shared_values",
    "shared_values",
    "slice_batch",
    "split_batch",
    "union_batches",
]

Batch: TypeAlias = DataProto | TensorDict


def is_batch(x: object) -> TypeGuard[Batch]:
    """Whether this is a DataProto or a TensorDict."""
    return isinstance(x, DataProto | TensorDict)


def has_rows(x: Batch) -> bool:
    """Whether a batch can be split by rows. A TensorDict of `batch_size=[]` cannot: it has none, it
    goes whole wherever rows go, and the first of several stands for all, as metrics do.
    """
    return isinstance(x, DataProto) or len(x.batch_size) > 0


def is_chunkable(x: object) -> bool:
    """Whether a value that is no batch can be split and joined: it has `chunk(n)`, which gives a
    list of n parts, and its class has `concat(parts)`.
    """
    splits, joins = getattr(x, "chunk", None), getattr(type(x), "concat", None)
    return callable(splits) and callable(joins) and not is_batch(x)


def batch_rows(x: Batch) -> int:
    """Rows along dim 0; none in a TensorDict without batch dim."""
    return len(x) if isinstance(x, DataProto) or has_rows(x) else 0


def slice_batch(x: Batch, start: int, stop: int) -> Batch:
    """Rows `start:stop`, as views.

    Raises:
        RowCountError: not 0 <= start <= stop <= rows.
    """
    if not 0 <= start <= stop <= batch_rows(x):
        raise RowCountError(f"rows {start}:{stop} are not in a batch of {batch_rows(x)} rows")
    if isinstance(x, DataProto):
        return x.slice(start, stop)
    return tensordict_rows.slice_rows(x, start, stop) if has_rows(x) else x


def split_batch(x: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Consecutive rows, as views; a size may be zero.

    Raises:
        RowCountError: the sizes do not sum to the rows.
    """
    if isinstance(x, DataProto):
        return [*x.split_sizes(sizes)]
    return [*tensordict_rows.split(x, sizes)]


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """All rows of batches of one kind, in new memory.

    Raises:
        BatchError: nothing to concatenate, or the batches do not go together.
        BatchTypeError: DataProto and TensorDict are mixed.
    """
    protos = [batch for batch in batches if isinstance(batch, DataProto)]
    tensordicts = [batch for batch in batches if isinstance(batch, TensorDict)]
    if not batches:
        raise BatchError("cannot concatenate zero batches: pass at least one")
    if len(protos) == len(batches):
        return DataProto.concat(protos)
    if len(tensordicts) == len(batches):
        return tensordict_utils.concat_tensordict(tensordicts)
    raise BatchTypeError(
        "batches to concatenate must all be DataProto or all TensorDict; "
        f"got {[type(batch).__name__ for batch in batches]}"
    )


def only_batch(x: Batch) -> Batch:
    """What `concat_batches` makes of it alone, but in the same memory.

    Raises:
        BatchError: its metrics are of another kind than can be joined.
    """
    if not isinstance(x, DataProto):
        return x
    whole = copy.copy(x)
    whole.meta_info = meta.merge([x.meta_info])
    return whole


def copy_batch(x: Batch) -> Batch:
    """The same rows in memory of their own, on the same device, without autograd's graph."""
    if isinstance(x, DataProto):
        return copy.deepcopy(x)
    return tensordict_rows.copy(x)


def detach_batch(x: Batch) -> Batch:
    """The same tensors without autograd's graph, and arrays of its own. Adding or replacing columns
    and changing meta_info does not show in `x`.
    """
    if isinstance(x, DataProto):
        return x.detached()
    return tensordict_rows.map_columns(x, dense.detached)


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
        rows.meta_info = dense.deepcopy(rows.meta_info)
        arrays = rows.non_tensor_batch.items()
        rows.non_tensor_batch = {key: _lent_array(array, how) for key, array in arrays}
    return rows


def _lent_array(array: Array, how: Reading) -> Array:
    if array.dtype.hasobject:
        seen = arrival(array, "view") if how == "view" else None
        array = dense.deepcopy(array) if seen is None else seen
    else:
        array = array.view()
    array.flags.writeable = how != "view"
    return array


def on_one_device(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, those on an accelerator moved to the CPU unless all are on the same one."""
    if len({str(_device(batch)) for batch in batches if batch_tensors(batch)}) < 2:
        return [*batches]
    return [_on_cpu(batch) for batch in batches]


def _on_cpu(x: Batch) -> Batch:
    if _device(x) == torch.device("cpu"):
        return x
    return x.to("cpu") if isinstance(x, TensorDict) else copy.copy(x).to("cpu")


def _device(x: Batch) -> torch.device:
    """Where the first tensor is; the CPU if there is none."""
    values = x._tensors().values() if isinstance(x, DataProto) else x.values()
    return next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))


def pad_batch(x: Batch, count: int) -> Batch:
    """A new batch with the last row repeated `count` times at the end.

    Raises:
        RowCountError: `count` is negative, or there is no row to repeat.
    """
    rows = batch_rows(x)
    if count < 0 or (count and not rows):
        raise RowCountError(f"a batch of {rows} rows cannot be padded by {count} rows")
    if isinstance(x, DataProto):
        return x.pad_rows(count)
    return tensordict_rows.take(x, torch.arange(rows + count).clamp(max=rows - 1))


def select_keys(x: Batch, keys: Iterable[str]) -> Batch:
    """Only these columns, shared with `x`; meta_info stays whole.

    Raises:
        MissingKeyError: a key that the batch lacks, unless it has no rows: then others decide
            which columns there are.
    """
    keys = checks.key_list("keys", keys)
    if isinstance(x, DataProto):
        tensors = x._tensors()
        have = {**tensors, **x.non_tensor_batch}
        if len(x) and (missing := [key for key in keys if key not in have]):
            raise MissingKeyError(
                f"keys {missing} not in batch, which has {sorted(map(str, have))}"
            )
        batch: Any = x  # TensorDict, which basedpyright takes it for as well, selects otherwise
        chosen: DataProto = batch.select([key for key in keys if key in tensors], keys)
        return chosen
    if x.batch_size[:1] == (0,):
        keys = [key for key in keys if key in x.keys()]  # noqa: SIM118
    return tensordict_utils.get_keys(x, keys)


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
        tensordict_rows.put(x, key, NonTensorData(value, batch_size=x.batch_size))


def union_batches(left: Batch, right: Batch) -> Batch:
    """The columns of two batches of one kind, in a new one.

    Raises:
        BatchTypeError: one is a DataProto and the other a TensorDict.
        ConflictError: a common key holds different values.
        RowCountError: they differ in rows.
    """
    if isinstance(left, DataProto) and isinstance(right, DataProto):
        return left.union(right)
    if isinstance(left, TensorDict) and isinstance(right, TensorDict):
        return tensordict_utils.union_tensor_dict(left.copy(), right)
    raise BatchTypeError(
        f"a union is of two DataProto or two TensorDict; got {type(left).__name__} and "
        f"{type(right).__name__}"
    )
