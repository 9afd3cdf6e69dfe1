"""Functions on whole batches that veRL has beside its class: padding, collating, batch dims, and
gathering over a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict

from protocol import checks, columns
from protocol.columns import Column
from protocol.data_proto import DataProto
from protocol.errors import BatchError, MissingKeyError, RowCountError
from protocol.table import DataProtoItem

__all__ = [
    "all_gather_data_proto",
    "collate_fn",
    "fold_batch_dim",
    "pad_dataproto_to_divisor",
    "unfold_batch_dim",
    "unpad_dataproto",
]


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """`(padded, pad_size)`: the rows again from the first on, until they divide by `size_divisor`.

    The batch itself comes back if it divides already, as an empty one does.
    """
    rows = len(checks.instance(DataProto, "data", data))
    size_divisor = checks.count("size_divisor", size_divisor, least=1)
    pad_size = -rows % size_divisor
    if not pad_size:
        return data, 0
    return data.select_idxs(torch.arange(rows + pad_size) % rows), pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """The batch without its last `pad_size` rows, as views; itself if that is 0."""
    pad_size = checks.count("pad_size", pad_size, least=None)
    rows = len(checks.instance(DataProto, "data", data))
    if not 0 <= pad_size <= rows:
        raise RowCountError(f"cannot remove {pad_size} rows from a batch of {rows} rows")
    return data.slice(0, rows - pad_size) if pad_size else data


def collate_fn(x: Sequence[DataProtoItem]) -> DataProto:
    """A batch of single rows, without their meta_info; arrays are of dtype object.

    Raises:
        BatchError: there is no row, or rows differ in keys, or in the shape of a tensor.
    """
    if not checks.list_of(DataProtoItem, "x", x):
        raise BatchError("cannot collate zero rows: pass at least one")
    rows = [item._tensors() for item in x]
    for part, parts in (("batch", rows), ("non_tensor_batch", [i.non_tensor_batch for i in x])):
        for i, have in enumerate(parts):
            if have.keys() != parts[0].keys():
                raise MissingKeyError(
                    f"rows to collate must have the same keys in {part}; row 0 has "
                    f"{[*parts[0]]}, row {i} has {[*have]}"
                )
    batch = None
    if x[0].batch is not None:
        tensors = {key: _stack(key, [row[key] for row in rows]) for key in rows[0]}
        batch = TensorDict(tensors, [len(x)], device=x[0].batch.device)
    objects = {key: [item.non_tensor_batch[key] for item in x] for key in x[0].non_tensor_batch}
    return DataProto(batch, {k: columns.as_object_array(v) for k, v in objects.items()})


def _stack(key: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise BatchError(
            f"rows to collate must have one shape under {key!r}, got {shapes}: "
            "pick rows of a jagged column with select_idxs"
        )
    return torch.stack(tensors)


def fold_batch_dim(data: DataProto, new_batch_size: int) -> DataProto:
    """Columns of shape (rows, ...) become (new_batch_size, rows // new_batch_size, ...)."""
    rows = len(checks.instance(DataProto, "data", data))
    new_batch_size = checks.count("new_batch_size", new_batch_size, least=1)
    if rows % new_batch_size:
        raise RowCountError(
            f"cannot fold {rows} rows into new_batch_size={new_batch_size}: they do not divide"
        )
    return _reshape(data, 1, [new_batch_size, rows // new_batch_size])


def unfold_batch_dim(data: DataProto, batch_dims: int = 2) -> DataProto:
    """Merge the first `batch_dims` dims of all columns; undoes `fold_batch_dim`."""
    batch_dims = checks.count("batch_dims", batch_dims, least=1)
    return _reshape(checks.instance(DataProto, "data", data), batch_dims, None)


def _reshape(data: DataProto, dims: int, sizes: list[int] | None) -> DataProto:
    """Replace the first `dims` dims of all columns by `sizes`, or by their product."""

    def reshape(key: Any, column: Column) -> Column:
        if columns.is_nested(column) or column.ndim < dims:
            raise BatchError(
                f"column {key!r} is {columns.describe(column)}: "
                f"its first {dims} dims cannot be reshaped"
            )
        first = [int(np.prod(column.shape[:dims]))] if sizes is None else sizes
        return column.reshape(*first, *column.shape[dims:])

    tensors = {k: reshape(k, v) for k, v in data._tensors().items()}
    arrays = {k: reshape(k, v) for k, v in data.non_tensor_batch.items()}
    return DataProto.from_dict(tensors, arrays, data.meta_info)  # type: ignore[arg-type]


def all_gather_data_proto(data: DataProto, process_group: dist.ProcessGroup | None) -> None:
    """Replace the columns of `data`, in place, by those of all ranks of the group, in rank order.

    Ranks may hold different numbers of rows, and are joined as `DataProto.concat` joins them. Dense
    tensors that are alike on all ranks move by the group's own collective on their device,
    everything else as pickled objects. meta_info stays that of this rank.

    Raises:
        BatchError: the batches of the ranks do not go together; every rank raises it.
    """
    tensors = checks.instance(DataProto, "data", data)._tensors()
    world = dist.get_world_size(process_group)
    kinds: list[Any] = [None] * world
    dist.all_gather_object(
        kinds,
        {k: (t.dtype, t.shape[1:]) for k, t in tensors.items() if not columns.is_nested(t)},
        group=process_group,
    )
    dense = [key for key in kinds[0] if all(kind.get(key) == kinds[0][key] for kind in kinds)]
    rest = data.select([key for key in tensors if key not in dense], meta_info_keys=[])
    others: list[Any] = [None] * world
    dist.all_gather_object(others, rest, group=process_group)
    whole = DataProto.concat(others)  # in which a rank without rows decides nothing
    counts = [*map(len, others)]
    both = {key: _all_gather(tensors[key], counts, process_group) for key in dense}
    for key, column in whole._tensors().items():
        both[key] = column.to(tensors[key].device if key in tensors else column.device)
    if whole.batch is not None:
        device = None if data.batch is None else data.batch.device
        order = [key for key in dict.fromkeys([*tensors, *both]) if key in both]
        data.batch = TensorDict({key: both[key] for key in order}, [sum(counts)], device=device)
    data.non_tensor_batch = whole.non_tensor_batch


def _all_gather(
    tensor: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The rows of all ranks; a collective needs equal shapes, so shorter ones are padded."""
    most = max(counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
