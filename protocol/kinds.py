"""The three kinds of values in one TensorDict: tensors, one object per row, one value for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, is_non_tensor

from protocol import checks
from protocol.columns import as_object_array
from protocol.errors import ConflictError
from protocol.tensordict_rows import build, stack

__all__ = ["join_kinds", "split_kinds"]


def split_kinds(
    batch: TensorDict,
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """`(tensors, arrays, shared)` of a TensorDict; the arrays are of dtype object."""
    tensors: dict[str, Any] = {}
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    shared: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, NonTensorStack):
            arrays[key] = as_object_array(value.tolist())
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
    stacks = {key: stack(list(array)) for key, array in arrays.items()}
    whole = {key: NonTensorData(value, batch_size=[rows]) for key, value in shared.items()}
    for part in (stacks, whole):
        twice = sorted(source.keys() & part.keys())
        if twice:
            raise ConflictError(
                f"{twice} occur twice among batch, non_tensor_batch and meta_info, but in a "
                "TensorDict each key is unique: rename or pop one of them"
            )
        source.update({_string(key): value for key, value in part.items()})
    return build(source, [rows], device)


def _string(key: object) -> str:
    return checks.instance(str, "a key of non_tensor_batch or meta_info in a TensorDict", key)
