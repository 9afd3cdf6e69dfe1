"""Dicts of columns: joining the dicts of several batches, with errors that name the key; joining
single columns is left to `columns`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDictBase

from protocol import checks, columns, summary
from protocol.errors import BatchError, BatchTypeError, ConflictError, MissingKeyError

__all__ = [
    "cat_columns",
    "checked_arrays",
    "checked_tensors",
    "deciding",
    "items",
    "leaves",
    "require_keys",
    "require_same_keys",
    "union_columns",
    "union_numpy_dict",
]

_C = TypeVar("_C")


def items(batch: TensorDictBase) -> list[tuple[str, Any]]:
    """Keys and values of a TensorDict.

    Raises:
        BatchTypeError: it is a lazy stack whose rows differ in shape.
    """
    try:
        return [*batch.items()]
    except RuntimeError as error:
        raise BatchTypeError(
            "the rows of a lazy stack must have one shape per key: build a jagged column with "
            f"nested_tensor_from_tensor_list, or pad them; {checks.short(str(error), 200)}"
        ) from error


def leaves(batch: TensorDictBase, prefix: tuple[str, ...] = ()) -> dict[Any, torch.Tensor]:
    """The tensors of a TensorDict, those in nested TensorDicts under a tuple of keys.

    Raises:
        BatchTypeError: the TensorDict holds something else.
    """
    found: dict[Any, torch.Tensor] = {}
    for key, value in items(batch):
        path = (*prefix, key)
        if isinstance(value, torch.Tensor):
            found[path if prefix else key] = _with_rows("batch", key, value)
        elif isinstance(value, TensorDictBase):
            found.update(leaves(value, path))
        else:
            raise BatchTypeError(
                f"batch[{key!r}] must be a tensor, got {type(value).__name__}: put it into "
                "non_tensor_batch or meta_info, or build the batch with DataProto.from_tensordict"
            )
    return found


def checked_tensors(tensors: object) -> dict[Any, torch.Tensor]:
    """The tensors that a caller gives in a dict; none for None.

    Raises:
        BatchTypeError: something that is not a tensor, a sparse one, or a key that a TensorDict
            cannot have.
    """
    return {
        checks.named("a key of tensors", key): _with_rows(
            "tensors", key, checks.instance(torch.Tensor, f"tensors[{key!r}]", tensor)
        )
        for key, tensor in checks.mapping("tensors", tensors).items()
    }


def _with_rows(part: str, key: object, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout not in (torch.strided, torch.jagged):
        raise BatchTypeError(
            f"{part}[{key!r}] must be a strided or jagged tensor, which can be cut into rows; got "
            f"one of layout {tensor.layout}: x.to_dense() is strided"
        )
    return tensor


def checked_arrays(non_tensors: object) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that a caller gives in a dict, where a list is one object per row.

    Raises:
        BatchTypeError: something else, such as a string.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for key, values in checks.mapping("non_tensors", non_tensors).items():
        if isinstance(values, np.ndarray):
            arrays[key] = values
        elif isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
            raise BatchTypeError(
                f"non_tensors[{key!r}] must be an array or a list of one object per row; got "
                f"{type(values).__name__} {checks.short(values)}"
            )
        else:
            arrays[key] = columns.as_object_array(values)
    return arrays


def require_keys(keys: Iterable[str], part: Mapping[str, Any], name: str) -> None:
    """Raise MissingKeyError unless all keys are in this part of a batch."""
    missing = [key for key in keys if key not in part]
    if missing:
        inside = [key for key in part if isinstance(key, tuple) and key[0] in missing]
        raise MissingKeyError(
            f"no {missing} in {name}, which has the keys {list(part)}"
            + (f": name each tensor of a nested TensorDict, as {inside[0]}" if inside else "")
        )


def require_same_keys(parts: Sequence[Iterable[Any]], what: str, name: str) -> None:
    """Raise MissingKeyError unless all parts have the keys of the first."""
    first = set(parts[0])
    for i, keys in enumerate(map(set, parts)):
        if keys != first:
            lacks, adds = (sorted(map(str, some)) for some in (first - keys, keys - first))
            raise MissingKeyError(
                f"{what} must all have the same set of keys; "
                f"{name} {i} lacks {lacks} and adds {adds}, comparing {name} 0 and {name} {i}"
            )


def deciding(rows: Sequence[int], parts: Sequence[Iterable[Any]]) -> list[int]:
    """Which of several shards say what columns the whole has: those with rows. If there is none,
    those with columns; then all.
    """
    indices = range(len(rows))
    return [i for i in indices if rows[i]] or [i for i in indices if [*parts[i]]] or [*indices]


def cat_columns(shards: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Concatenate the columns of all shards, key by key.

    Raises:
        BatchError: the shards differ in keys, or a column in kind or trailing shape, or its dtypes
            have none in common.
    """
    require_same_keys(shards, "batches to concatenate", f"{name} of shard")
    whole = {}
    for key in shards[0]:
        try:
            whole[key] = columns.cat([shard[key] for shard in shards])
        except BatchError as error:
            raise BatchError(f"{name}[{key!r}]: {error}") from None
    return columns.combinable(whole, *shards)


def union_columns(a: Mapping[str, _C], b: Mapping[str, _C]) -> dict[str, _C]:
    """The columns of both, in a new dict.

    Raises:
        ConflictError: both have a key, with different values.
    """
    for key, column in b.items():
        if key in a and not columns.equal(a[key], column):
            raise ConflictError(
                f"`{key}` in tensor_dict1 and tensor_dict2 are not the same object. "
                f"{summary.difference(a[key], column)}; pop or rename one of them"
            )
    return {**a, **b}


def union_numpy_dict(
    tensor_dict1: dict[str, np.ndarray[Any, Any]], tensor_dict2: dict[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    """`tensor_dict1`, to which the keys of `tensor_dict2` are added in place.

    Raises:
        ConflictError: both have a key, with different values; then nothing is added.
        BatchTypeError: a value is not an ndarray.
    """
    for name, arrays in (("tensor_dict1", tensor_dict1), ("tensor_dict2", tensor_dict2)):
        for key, value in checks.instance(dict, name, arrays).items():
            checks.instance(np.ndarray, f"{name}[{key!r}]", value)
    tensor_dict1.update(union_columns(tensor_dict1, tensor_dict2))
    return tensor_dict1
