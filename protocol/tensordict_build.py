"""How values get into a TensorDict and out again: as tensors, as one object per row, or as one for
all rows. Cutting and joining rows is left to `tensordict_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, is_non_tensor

from protocol import checks, columns, tensordict_rows
from protocol.errors import BatchError, BatchTypeError, ConflictError, RowCountError
from protocol.keyed import items, require_same_keys
from protocol.nested import nested_tensor_from_tensor_list

__all__ = [
    "assign_non_tensor",
    "assign_non_tensor_data",
    "assign_non_tensor_stack",
    "get_tensordict",
    "join_kinds",
    "list_of_dict_to_tensordict",
    "split_kinds",
    "unwrap_non_tensor_data",
]


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
        BatchTypeError: a value of another type, or a list of tensors.
        ConflictError: a key is in both.
        RowCountError: the values differ in rows, or a tensor has no dim.
    """
    tensor_dict = checks.mapping("tensor_dict", tensor_dict)
    shared = checks.mapping("non_tensor_dict", non_tensor_dict)
    for key in (*tensor_dict, *shared):
        checks.named("a key", key)
    if both := sorted(set(tensor_dict) & set(shared)):
        raise ConflictError(f"keys may be in tensor_dict or in non_tensor_dict; both have {both}")
    rows: int | None = None
    values: dict[str, Any] = {}
    for key, value in tensor_dict.items():
        values[key] = _column(key, value)
        count = _count(key, value)
        if rows is None:
            rows = count
        elif count != rows:
            raise RowCountError(
                f"Batch size of tensor {key} is not consistent with other tensors. "
                f"Expected {rows}, got {count}"
            )
    size = torch.Size([] if rows is None else [rows])
    for key, value in shared.items():
        values[key] = NonTensorData(unwrap_non_tensor_data(value), batch_size=size)
    return tensordict_rows.build(values, size)


def _column(key: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor | NonTensorStack):
        return value
    if not isinstance(value, list | np.ndarray):
        raise BatchTypeError(
            f"{key} -> {type(value)} isn't of 'torch.Tensor | list | np.ndarray' type; "
            "a value that all rows share belongs in non_tensor_dict"
        )
    if _count(key, value) and any(isinstance(element, torch.Tensor) for element in value):
        raise BatchTypeError(
            f"{key}: Passing a list makes the data NonTensorStack, which doesn't support "
            "torch.Tensor. Please convert to numpy first, or build one column with torch.stack "
            "or nested_tensor_from_tensor_list"
        )
    return tensordict_rows.stack(list(value))


def _count(key: str, value: Any) -> int:
    if getattr(value, "ndim", 1) == 0:
        raise RowCountError(f"{key} needs rows along dim 0; got a 0-dim value")
    return value.size(0) if isinstance(value, torch.Tensor) else len(value)


def list_of_dict_to_tensordict(list_of_dicts: list[dict[str, Any]]) -> TensorDict:
    """One row per dict. Tensors become a jagged column, 0-dim ones a dense column of their values.

    The column is jagged also when the rows happen to have one shape, so that its layout does not
    depend on the data. Anything but tensors becomes one Python object per row.

    Raises:
        BatchError: no dict, or the tensors of a key do not go together.
        MissingKeyError: a dict lacks a key, or has one that the first lacks.
    """
    if not checks.list_of(object, "list_of_dicts", list_of_dicts):
        raise BatchError("list_of_dicts must have at least one dict, to know the keys; got none")
    rows = [checks.mapping(f"list_of_dicts[{i}]", row) for i, row in enumerate(list_of_dicts)]
    require_same_keys(rows, "dicts", "row")
    columns_of = {key: [row[key] for row in rows] for key in rows[0]}
    return tensordict_rows.build(
        {key: _column_of_rows(key, values) for key, values in columns_of.items()}, [len(rows)]
    )


def _column_of_rows(key: str, rows: list[Any]) -> Any:
    if not all(isinstance(row, torch.Tensor) for row in rows):
        return tensordict_rows.stack(rows)
    if all(row.dim() == 0 for row in rows):
        return torch.stack(rows)
    try:
        return nested_tensor_from_tensor_list(rows)
    except BatchError as error:
        raise BatchError(f"key {key!r}: {error}") from error


def assign_non_tensor_data(tensor_dict: TensorDict, key: str, val: Any) -> None:
    """Set, in place, one object that all rows share."""
    size = checks.tensordict("tensor_dict", tensor_dict).batch_size
    value: Any = NonTensorData(unwrap_non_tensor_data(val), batch_size=size)
    tensor_dict.set(checks.named("key", key), value)


def assign_non_tensor_stack(tensor_dict: TensorDict, key: str, val: list[Any]) -> None:
    """Set, in place, one object per row.

    Raises:
        RowCountError: not one element per row.
    """
    val = list(checks.list_of(object, checks.named("key", key), val))
    if (
        checks.tensordict("tensor_dict", tensor_dict).batch_size
        and len(val) != tensor_dict.batch_size[0]
    ):
        raise RowCountError(
            f"{key} needs one element for each of {tensor_dict.batch_size[0]} rows; got {len(val)}"
        )
    tensordict_rows.put(tensor_dict, key, tensordict_rows.stack(val))


def assign_non_tensor(tensor_dict: TensorDict, **kwargs: Any) -> TensorDict:
    """Set, in place, a list as one object per row and anything else as shared by all rows.

    Raises:
        RowCountError: a list without one element per row.
    """
    for key, value in kwargs.items():
        if isinstance(value, list | NonTensorStack):
            elements = value.tolist() if isinstance(value, NonTensorStack) else value
            assign_non_tensor_stack(tensor_dict, key, elements)
        else:
            assign_non_tensor_data(tensor_dict, key, value)
    return tensor_dict


def unwrap_non_tensor_data(data: Any) -> Any:
    """The object inside a NonTensorData; anything else as it is."""
    return data.data if isinstance(data, NonTensorData) else data


def split_kinds(
    batch: TensorDict,
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """`(tensors, arrays, shared)` of a TensorDict; the arrays are of dtype object."""
    tensors: dict[str, Any] = {}
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    shared: dict[str, Any] = {}
    for key, value in items(batch):
        if isinstance(value, NonTensorStack):
            arrays[key] = columns.as_object_array(value.tolist())
        elif is_non_tensor(value):
            shared[key] = value.data
        else:
            tensors[key] = value
    return tensors, arrays, shared


def join_kinds(
    tensors: Mapping[Any, Any],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    shared: Mapping[str, Any],
    rows: int,
    device: torch.device | None = None,
) -> TensorDict:
    """The TensorDict that `split_kinds` takes apart again.

    Raises:
        ConflictError: a key occurs twice.
    """
    source = dict(tensors)
    stacks = {key: tensordict_rows.stack(list(array)) for key, array in arrays.items()}
    whole = {key: NonTensorData(value, batch_size=[rows]) for key, value in shared.items()}
    for part in (stacks, whole):
        twice = sorted(source.keys() & part.keys())
        if twice:
            raise ConflictError(
                f"{twice} occur twice among batch, non_tensor_batch and meta_info, but in a "
                "TensorDict each key is unique: rename or pop one of them"
            )
        source.update({_string(key): value for key, value in part.items()})
    return tensordict_rows.build(source, [rows], device)


def _string(key: object) -> str:
    return checks.instance(str, "a key of non_tensor_batch or meta_info in a TensorDict", key)
