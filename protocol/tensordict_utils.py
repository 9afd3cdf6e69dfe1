"""veRL's functions on a bare TensorDict: the operations of DataProto where a batch is not one.

A function that begins with `assign` or `pop` changes its TensorDict, and so do
`union_tensor_dict` (its first) and `maybe_fix_3d_position_ids`; all others return a new one that
shares the tensors it did not have to copy. Jagged tensors may be in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from protocol import checks, columns, combine
from protocol.batches import concat_batches
from protocol.batches import pad_dataproto_to_divisor as pad_to_divisor
from protocol.batches import unpad_dataproto as unpad
from protocol.columns import nested_tensor_from_tensor_list
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ConflictError,
    RowCountError,
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

# Values, in and out


def get_tensordict(
    tensor_dict: Mapping[str, torch.Tensor | np.ndarray[Any, Any] | list[Any]],
    non_tensor_dict: Mapping[str, Any] | None = None,
) -> TensorDict:
    """A TensorDict with one batch dim.

    In `tensor_dict`, dim 0 of a tensor is its rows, and a list or array holds one object per row.
    All rows share the values of `non_tensor_dict`, lists included.

    >>> td = get_tensordict({"ids": torch.zeros(2, 3), "text": ["a", "b"]}, {"temperature": 0.7})
    >>> td[0]["text"], td[0]["temperature"]
    ('a', 0.7)

    Raises:
        BatchError: the values differ in rows, a tensor has no dim, a value is of another type or
            a list of tensors, or a key is in both.
    """
    shared = dict(non_tensor_dict or {})
    if both := sorted(tensor_dict.keys() & shared.keys()):
        raise ConflictError(f"keys may be in tensor_dict or in non_tensor_dict; both have {both}")
    values = {key: _column(key, value) for key, value in tensor_dict.items()}
    counts = {key: columns.rows(value, key) for key, value in values.items()}
    size = [*counts.values()][:1]
    if odd := next((key for key, count in counts.items() if [count] != size), None):
        raise RowCountError(
            f"Batch size of tensor {odd} is not consistent with other tensors. "
            f"Expected {size[0]}, got {counts[odd]}"
        )
    for key, value in shared.items():
        values[key] = NonTensorData(unwrap_non_tensor_data(value), batch_size=size)
    return columns.build(values, size)


def _column(key: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor | NonTensorStack):
        return value
    if not isinstance(value, list | np.ndarray):
        raise BatchTypeError(
            f"{key} -> {type(value)} isn't of 'torch.Tensor | list | np.ndarray' type; "
            "a value that all rows share belongs in non_tensor_dict"
        )
    if any(isinstance(element, torch.Tensor) for element in value):
        raise BatchTypeError(f"{key}: not a list of tensors; nested_tensor_from_tensor_list(list)")
    return columns.stack(list(value))


def list_of_dict_to_tensordict(list_of_dicts: list[dict[str, Any]]) -> TensorDict:
    """One row per dict. Tensors become a jagged column, also if all have one shape, 0-dim ones a
    dense column of their values; anything else becomes one Python object per row.

    Raises:
        BatchError: no dict, they differ in keys, or the tensors of a key do not go together.
    """
    if not list_of_dicts:
        raise BatchError("list_of_dicts must have at least one dict, to know the keys; got none")
    combine.require_same_keys(list_of_dicts, "dicts", "row")
    values: dict[str, Any] = {}
    for key in list_of_dicts[0]:
        rows = [row[key] for row in list_of_dicts]
        if not all(isinstance(row, torch.Tensor) for row in rows):
            values[key] = columns.stack(rows)
        else:
            dense = all(row.dim() == 0 for row in rows)
            values[key] = torch.stack(rows) if dense else nested_tensor_from_tensor_list(rows)
    return columns.build(values, [len(list_of_dicts)])


def assign_non_tensor_data(tensor_dict: TensorDict, key: str, val: Any) -> None:
    """Set, in place, one object that all rows share."""
    value: Any = NonTensorData(unwrap_non_tensor_data(val), batch_size=tensor_dict.batch_size)
    tensor_dict.set(key, value)


def assign_non_tensor_stack(tensor_dict: TensorDict, key: str, val: list[Any]) -> None:
    """Set, in place, one object per row; RowCountError if there are more or fewer."""
    rows = tensor_dict.batch_size[:1]
    if rows and len(val) != rows[0]:
        raise RowCountError(f"{key} needs one element for each of {rows[0]} rows; got {len(val)}")
    columns.put(tensor_dict, key, columns.stack(val))


def assign_non_tensor(tensor_dict: TensorDict, **kwargs: Any) -> TensorDict:
    """Set, in place, a list as one object per row and anything else as shared by all rows."""
    for key, value in kwargs.items():
        if isinstance(value, list | NonTensorStack):
            assign_non_tensor_stack(tensor_dict, key, columns.unwrapped(value))
        else:
            assign_non_tensor_data(tensor_dict, key, value)
    return tensor_dict


def unwrap_non_tensor_data(data: Any) -> Any:
    """The object inside a NonTensorData; anything else as it is."""
    return data.data if isinstance(data, NonTensorData) else data


def get_non_tensor_data(data: TensorDict, key: str, default: Any) -> Any:
    """The shared object under `key`; a tensor or stack as it is; `default` if there is no key."""
    return unwrap_non_tensor_data(data.get(key, default))


def get(tensordict: TensorDict, key: str, default: Any = None) -> Any:
    """The tensor, the shared object, or the list of one object per row; `default` if missing."""
    return columns.unwrapped(tensordict.get(key, default))


def get_keys(tensordict: TensorDict, keys: Iterable[str]) -> TensorDict:
    """Only these keys; MissingKeyError for one that is not there."""
    keys = checks.key_list("keys", keys)
    combine.require_keys(keys, tensordict.keys(), "tensordict")
    values = {key: tensordict.get(key) for key in keys}
    return columns.build(values, tensordict.batch_size, tensordict.device)


def pop(tensordict: TensorDict, key: str, default: Any = None) -> Any:
    """Like `get`, and removes the key in place."""
    value = get(tensordict, key, default)
    if key in tensordict.keys():  # noqa: SIM118
        tensordict.del_(key)
    return value


def pop_keys(tensordict: TensorDict, keys: Iterable[str]) -> TensorDict:
    """Like `get_keys`, and removes the keys in place: all of them, or none if one is missing."""
    popped = get_keys(tensordict, keys)
    for key in popped.keys():  # noqa: SIM118
        tensordict.del_(key)
    return popped


def union_tensor_dict(tensor_dict1: TensorDict, tensor_dict2: TensorDict) -> TensorDict:
    """`tensor_dict1`, to which the columns of `tensor_dict2` are added in place. ConflictError if a
    common key holds different values (NaN equals NaN): then nothing is added.
    """
    for key, value in combine.added(tensor_dict1, tensor_dict2).items():
        columns.put(tensor_dict1, key, value)
    return tensor_dict1


def assert_tensordict_eq(tensordict1: TensorDict, tensordict2: TensorDict) -> None:
    """Check that keys and values are equal; NaN equals NaN. BatchError names what differs first."""
    left, right = combine.unwrapped(tensordict1), combine.unwrapped(tensordict2)
    if left.keys() != right.keys():
        raise BatchError(f"key set diffs. Got {set(right)} vs {set(left)}")
    for key, a in left.items():
        if type(a) is not type(b := right[key]):
            raise BatchError(f"The type of {key} must be the same. Got {type(a)} vs {type(b)}")
        if not combine.equal(a, b):
            raise BatchError(f"The values of {key} must be equal: {combine.difference(a, b)}")


def contiguous(data: TensorDict) -> TensorDict:
    """The same values with every tensor contiguous; those that are already are shared."""
    return columns.map_leaves(
        data, lambda value: value.contiguous() if isinstance(value, torch.Tensor) else value
    )


def maybe_fix_3d_position_ids(data: TensorDict) -> None:
    """Restore, in place, the ragged dim of `data["position_ids"]` with rows (axes, length).

    Some versions of torch and tensordict lose it on the way through pickle or `consolidate`.
    """
    ids: Any = data.get("position_ids", None)
    if not columns.is_jagged(ids) or ids._ragged_idx != 1:  # type: ignore[attr-defined]
        return
    values, offsets = ids.values(), ids.offsets()  # type: ignore[attr-defined]
    if values.dim() == 2 and values.shape[1] == int(offsets[-1]):
        data.set("position_ids", columns.jagged(values, offsets, 2))


# Rows


def concat_nested_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All rows of all jagged tensors, as one jagged tensor; BatchError if they do not fit."""
    if not all(map(columns.is_jagged, tensors)):
        raise BatchTypeError("all tensors must be jagged; use torch.cat for others")
    return columns.cat(tensors)  # type: ignore[no-any-return]


def concat_tensordict(data: list[TensorDict]) -> TensorDict:
    """All rows of all TensorDicts, in new memory.

    Of an object that all rows share, the first TensorDict's stays, as in veRL; use
    `assign_non_tensor_stack` for values that differ. If no TensorDict has a batch dim, this is
    `concat_tensordict_with_none_bsz`. BatchError if they do not go together.
    """
    return concat_batches(data)  # type: ignore[return-value]


def concat_tensordict_with_none_bsz(data: list[TensorDict]) -> TensorDict:
    """The first of several TensorDicts without batch dim: they have no rows to join."""
    if any(td.batch_size for td in data):
        raise RowCountError("all must have batch_size=[]; concat_tensordict joins rows")
    return concat_tensordict(data)


def chunk_tensordict(td: TensorDict, chunks: int) -> list[TensorDict]:
    """Exactly `chunks` TensorDicts of equally many consecutive rows, which are views. ChunkError if
    the rows do not divide.
    """
    return columns.split(td, checks.equal_sizes(columns.rows(td, "td"), chunks))


def index_select_tensor_dict(
    batch: TensorDict, indices: torch.Tensor | list[int] | np.ndarray[Any, Any]
) -> TensorDict:
    """Copy the rows at `indices` (one dim; may repeat, be negative, or be a boolean mask).
    RowIndexError for a row that is not there.
    """
    index: Any = checks.normalize_index(indices, columns.rows(batch, "batch"))
    return columns.take(batch, index)  # type: ignore[no-any-return]


def make_iterator(
    tensordict: TensorDict,
    mini_batch_size: int,
    epochs: int,
    seed: int | None = None,
    dataloader_kwargs: dict[str, Any] | None = None,
) -> Iterator[TensorDict]:
    """Mini-batches (copies) of `mini_batch_size` rows, `epochs` times over.

    In order, unless `dataloader_kwargs` (for torch's DataLoader) has `shuffle=True`; `seed` makes
    that repeatable. BatchError if the rows do not divide, and `drop_last` is not given.
    """
    options = mini_batch_size, epochs, seed, dataloader_kwargs
    picks = checks.mini_batches(columns.rows(tensordict, "tensordict"), *options)
    return (columns.take(tensordict, index) for index in picks)
