"""Tensors as plain tuples of names, shapes and bytes, for serializers that know no torch (msgpack);
how a batch crosses a process boundary is left to `wire`."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import TensorDict

from protocol import checks
from protocol.columns import (
    flat_bytes,
    from_rows,
    is_nested,
    is_strided,
    jagged,
    jagged_parts,
    strided,
)
from protocol.errors import BatchError, BatchTypeError
from protocol.keyed import leaves

__all__ = [
    "deserialize_single_tensor",
    "deserialize_tensordict",
    "serialize_single_tensor",
    "serialize_tensordict",
]

_Serialized: TypeAlias = "tuple[str, tuple[int, ...], memoryview]"


def serialize_single_tensor(obj: torch.Tensor) -> _Serialized:
    """`(dtype, shape, bytes)` of a dense tensor; the bytes are a view of a contiguous CPU tensor.

    >>> serialize_single_tensor(torch.zeros(2, 3))[:2]
    ('float32', (2, 3))
    """
    if not isinstance(obj, torch.Tensor) or obj.layout is not torch.strided or obj.is_nested:
        raise BatchTypeError(
            f"a dense tensor is needed, got {type(obj).__name__}: "
            "serialize_tensordict also takes nested ones"
        )
    data = flat_bytes(obj).numpy().data
    return str(obj.dtype).removeprefix("torch."), tuple(obj.shape), data


def deserialize_single_tensor(arr: Any) -> torch.Tensor:
    """The tensor that `serialize_single_tensor` took apart, in its own writable memory."""
    try:
        dtype, shape, data = arr
        flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        if not flat.numel():
            return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        return flat.view(getattr(torch, dtype)).reshape(tuple(shape))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise BatchError(
            f"this is not (dtype, shape, bytes) of a tensor: {checks.short(arr)}: {error}"
        ) from error


def serialize_tensordict(
    batch: TensorDict,
) -> tuple[tuple[int, ...], str | None, dict[str, tuple[Any, ...]]]:
    """`(batch_size, device, tensors)`, each tensor as `serialize_single_tensor` makes it.

    A nested tensor becomes `("jagged", [row, ...])` or `("strided", [row, ...])` by its layout, or
    `("jagged", values, offsets, ragged_idx)` where the rows would not tell its ragged dim.
    """
    tensors: dict[str, tuple[Any, ...]] = {}
    for key, tensor in leaves(checks.tensordict("batch", batch)).items():
        tensors[key] = _nested(tensor) if is_nested(tensor) else serialize_single_tensor(tensor)
    device = None if batch.device is None else str(batch.device)
    return tuple(batch.batch_size), device, tensors


def deserialize_tensordict(arr: Any) -> TensorDict:
    """The TensorDict that `serialize_tensordict` took apart."""
    try:
        batch_size, device, tensors = arr
        known: dict[tuple[int, ...], torch.Tensor] = {}
        columns = {key: _column(packed, known) for key, packed in tensors.items()}
        return TensorDict(columns, tuple(batch_size), device=device)
    except BatchError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BatchError(
            f"this is not (batch_size, device, tensors) of a TensorDict: {checks.short(arr)}: "
            f"{error}"
        ) from error


def _column(packed: Any, known: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Equal offsets become the same ones, for torch to let the columns be combined."""
    if packed[0] not in ("jagged", "strided"):
        return deserialize_single_tensor(packed)
    if len(packed) == 2:
        rows = [deserialize_single_tensor(row) for row in packed[1]]
        if packed[0] == "strided":
            return strided(rows, torch.empty(0))
        values, offsets, ragged_idx = jagged_parts(from_rows(rows, 1))
    else:
        values, offsets = map(deserialize_single_tensor, packed[1:3])
        ragged_idx = packed[3]
    return jagged(values, known.setdefault(tuple(offsets.tolist()), offsets), ragged_idx)


def _nested(tensor: torch.Tensor) -> tuple[Any, ...]:
    if is_strided(tensor):
        return "strided", [serialize_single_tensor(row) for row in tensor.detach().unbind()]
    values, offsets, ragged_idx = jagged_parts(tensor.detach())
    if ragged_idx == 1 and tensor.size(0):
        rows = torch.split(values, offsets.diff().tolist())
        return "jagged", [serialize_single_tensor(row) for row in rows]
    return "jagged", serialize_single_tensor(values), serialize_single_tensor(offsets), ragged_idx
