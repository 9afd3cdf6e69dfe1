"""veRL's functions on a bare TensorDict: the operations of DataProto where a batch is not one.

A function that begins with `assign` or `pop` changes its TensorDict, and so do
`union_tensor_dict` (its first) and `maybe_fix_3d_position_ids`; all others return a new one that
shares the tensors it did not have to copy. Values get in by `tensordict_build`; rows are cut and
joined by `tensordict_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase

from protocol import checks, columns, summary, tensordict_rows
from protocol.errors import (
    BatchError,
    BatchTypeError,
    MissingKeyError,
    RowCountError,
)
from protocol.indices import normalize_index
from protocol.keyed import union_columns
from protocol.nested import (
    concat_nested_tensors,
    maybe_fix_3d_position_ids,
    nested_tensor_from_tensor_list,
)
from protocol.sampling import mini_batches
from protocol.shards import equal_sizes
from protocol.tensordict_build import (
    assign_non_tensor,
    assign_non_tensor_data,
    assign_non_tensor_stack,
    get_tensordict,
    list_of_dict_to_tensordict,
    unwrap_non_tensor_data,
)

__all__ = [
    "assert_tensordict_eq",
    "assign_non_tensor",
    "assign_non_tensor_data",
    "assign_non_tensor_stack",
    "chunk_tensordict",
    "concat_nested_tensors",
    "concat_tensordict",
    "concat_tensordict_with_none_bsz",
    "contiguous",
    "get",
    "get_keys",
    "get_non_tensor_data",
    "get_tensordict",
    "index_select_tensor_dict",
    "list_of_dict_to_tensordict",
    "make_iterator",
    "maybe_fix_3d_position_ids",
    "nested_tensor_from_tensor_list",
    "pad_to_divisor",
    "pop",
    "pop_keys",
    "union_tensor_dict",
    "unpad",
    "unwrap_non_tensor_data",
]


def get_non_tensor_data(data: TensorDict, key: str, default: Any) -> Any:
    """The shared object under `key`; a tensor or stack as it is; `default` if there is no key."""
    checks.named("key", key)
    return unwrap_non_tensor_data(checks.tensordict("data", data).get(key, default))


def get(tensordict: TensorDict, key: str, default: Any = None) -> Any:
    """The tensor, the shared object, or the list of one object per row; `default` if missing."""
    checks.named("key", key)
    value = checks.tensordict("tensordict", tensordict).get(key, default)
    return value.tolist() if isinstance(value, NonTensorStack) else unwrap_non_tensor_data(value)


def get_keys(tensordict: TensorDict, keys: Iterable[str]) -> TensorDict:
    """Only these keys.

    Raises:
        MissingKeyError: a key that the TensorDict lacks.
    """
    have = checks.tensordict("tensordict", tensordict).keys()
    values = {}
    for key in checks.key_list("keys", keys):
        if checks.named("a key", key) not in have:
            raise MissingKeyError(
                f"key {key} not in tensordict, which has {sorted(map(str, have))}"
            )
        values[key] = tensordict.get(key)
    return tensordict_rows.build(values, tensordict.batch_size, tensordict.device)


def pop(tensordict: TensorDict, key: str, default: Any = None) -> Any:
    """Like `get`, and removes the key in place."""
    value = get(tensordict, key, default)
    if key in tensordict.keys():  # noqa: SIM118
        tensordict.del_(key)
    return value


def pop_keys(tensordict: TensorDict, keys: Iterable[str]) -> TensorDict:
    """Like `get_keys`, and removes the keys in place: all of them, or none if one is missing.

    Raises:
        MissingKeyError: a key that the TensorDict lacks.
    """
    popped = get_keys(tensordict, keys)
    for key in popped.keys():  # noqa: SIM118
        tensordict.del_(key)
    return popped


def union_tensor_dict(tensor_dict1: TensorDict, tensor_dict2: TensorDict) -> TensorDict:
    """`tensor_dict1`, to which the columns of `tensor_dict2` are added in place. Under a common key
    both must be equal; NaN equals NaN.

    Raises:
        ConflictError: a common key holds different values; then nothing is added.
        RowCountError: the batch sizes differ.
    """
    checks.tensordict("tensor_dict1", tensor_dict1)
    if tensor_dict1.batch_size != checks.tensordict("tensor_dict2", tensor_dict2).batch_size:
        raise RowCountError(
            "Two tensor dict must have identical batch size. "
            f"Got {tensor_dict1.batch_size} and {tensor_dict2.batch_size}"
        )
    have = _plain(tensor_dict1)
    for key in union_columns(have, _plain(tensor_dict2)):
        if key not in have:
            tensordict_rows.put(tensor_dict1, key, tensor_dict2.get(key))
    return tensor_dict1


def _plain(td: TensorDict) -> dict[str, Any]:
    return {key: get(td, key) for key in map(str, td.keys())}


def assert_tensordict_eq(tensordict1: TensorDict, tensordict2: TensorDict) -> None:
    """Check that keys, types and values are equal; NaN equals NaN.

    Raises:
        BatchError: they are not; the message names the first key that differs and both values.
    """
    keys1 = set(checks.tensordict("tensordict1", tensordict1).keys())
    keys2 = set(checks.tensordict("tensordict2", tensordict2).keys())
    if keys1 != keys2:
        raise BatchError(
            f"key set diffs. Got tensordict2_key_set={keys2} vs tensordict1_key_set={keys1}"
        )
    plain1, plain2 = _plain(tensordict1), _plain(tensordict2)
    for key, left in plain1.items():
        right = plain2[key]
        if type(left) is not type(right):
            raise BatchError(
                f"The type of {key} must be the same. Got {type(left)} vs {type(right)}"
            )
        if not columns.equal(left, right):
            raise BatchError(
                f"The values of {key} must be equal: {summary.difference(left, right)}"
            )


def index_select_tensor_dict(
    batch: TensorDict, indices: torch.Tensor | list[int] | np.ndarray[Any, Any]
) -> TensorDict:
    """Copy the rows at `indices` (one dim; may repeat, be negative, or be a boolean mask).

    Raises:
        BatchTypeError: the indices are not one list of integers or booleans.
        RowIndexError: a row that is not there.
    """
    index = normalize_index(indices, tensordict_rows.count_rows(batch))
    if isinstance(index, slice):
        raise BatchTypeError("indices must be a 1D tensor or a list; for a slice use batch[a:b]")
    return tensordict_rows.take(batch, index)


def chunk_tensordict(td: TensorDict, chunks: int) -> list[TensorDict]:
    """Exactly `chunks` TensorDicts of equally many consecutive rows, which are views.

    Raises:
        ChunkError: the rows do not divide by `chunks`.
    """
    return tensordict_rows.split(td, equal_sizes(tensordict_rows.count_rows(td), chunks))


def concat_tensordict(data: list[TensorDict]) -> TensorDict:
    """All rows of all TensorDicts, in new memory.

    Of an object that all rows share, the first TensorDict's stays, as in veRL; use
    `assign_non_tensor_stack` for values that differ. If no TensorDict has a batch dim, this is
    `concat_tensordict_with_none_bsz`.

    Raises:
        BatchError: nothing to concatenate, or a key holds values that do not go together.
        MissingKeyError: the keys differ.
        RowCountError: only some have a batch dim.
    """
    _some_tensordicts(data)
    if not any(td.batch_size for td in data):
        return tensordict_rows.copy(concat_tensordict_with_none_bsz(data))
    return tensordict_rows.concat(data)


def concat_tensordict_with_none_bsz(data: list[TensorDict]) -> TensorDict:
    """The first of several TensorDicts without batch dim: they have no rows to join.

    Raises:
        BatchError: nothing to concatenate.
        RowCountError: one has a batch dim.
    """
    _some_tensordicts(data)
    for shard, td in enumerate(data):
        if td.batch_size:
            raise RowCountError(
                f"TensorDict {shard} must have batch_size=[]; got {list(td.batch_size)}. "
                "concat_tensordict joins rows"
            )
    return get_keys(data[0], map(str, data[0].keys()))


def _some_tensordicts(data: list[TensorDict]) -> None:
    for shard, td in enumerate(checks.list_of(object, "data", data)):
        checks.tensordict(f"data[{shard}]", td)
    if not data:
        raise BatchError("Must have at least one tensordict to concatenate")


def contiguous(data: TensorDict) -> TensorDict:
    """The same values with every tensor contiguous; those that are already are shared."""

    def convert(value: Any) -> Any:
        if isinstance(value, NonTensorStack | NonTensorData):
            return value
        return contiguous(value) if isinstance(value, TensorDictBase) else value.contiguous()

    values = {key: convert(value) for key, value in checks.tensordict("data", data).items()}
    return tensordict_rows.build(values, data.batch_size, data.device)


def make_iterator(
    tensordict: TensorDict,
    mini_batch_size: int,
    epochs: int,
    seed: int | None = None,
    dataloader_kwargs: dict[str, Any] | None = None,
) -> Iterator[TensorDict]:
    """Mini-batches (copies) of `mini_batch_size` rows, `epochs` times over.

    Rows keep their order unless `dataloader_kwargs` (for torch's DataLoader) has `shuffle=True`;
    `seed` makes the shuffled order repeatable.

    Raises:
        BatchError: the rows do not divide by `mini_batch_size`, and `drop_last` is not given.
    """
    rows = tensordict_rows.count_rows(tensordict)
    picks = mini_batches(rows, mini_batch_size, epochs, seed, dataloader_kwargs)
    return (tensordict_rows.take(tensordict, index) for index in picks)


def pad_to_divisor(data: TensorDict, size_divisor: int) -> tuple[TensorDict, int]:
    """`(padded, pad_size)`: rows from the top are repeated until `size_divisor` divides them.

    A batch that divides already, so also one of zero rows, is returned as it is.

    Raises:
        BatchError: `size_divisor` is less than one.
    """
    size_divisor = checks.count("size_divisor", size_divisor, least=1)
    rows = tensordict_rows.count_rows(data)
    pad_size = -rows % size_divisor
    if pad_size == 0:
        return data, 0
    return tensordict_rows.take(data, torch.arange(rows + pad_size) % rows), pad_size


def unpad(data: TensorDict, pad_size: int) -> TensorDict:
    """Without the last `pad_size` rows; the others are views.

    Raises:
        RowCountError: `pad_size` is negative or more than the rows there are.
    """
    pad_size = checks.count("pad_size", pad_size, least=None)
    if pad_size == 0:
        return checks.tensordict("data", data)
    rows = tensordict_rows.count_rows(data)
    if not 0 <= pad_size <= rows:
        raise RowCountError(f"pad_size must be between 0 and {rows} rows; got {pad_size}")
    return tensordict_rows.slice_rows(data, 0, rows - pad_size)
