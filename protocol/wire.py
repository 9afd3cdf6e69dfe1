"""How a batch crosses a process boundary: tensors and numeric arrays leave as out-of-band pickle-5
buffers, memory that several of them show only once. What carries the bytes is left to the caller.

On arrival a reader chooses (`read_as`) between private writable memory and views of the buffers.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_non_tensor

from protocol.blocks import (
    Memory,
    Message,
    PackedArray,
    PackedTensor,
    Reading,
    message,
    read_as,
    reading,
    unpack_array,
    unpack_offsets,
    unpack_tensor,
)
from protocol.columns import (
    from_strided_parts,
    is_strided,
    jagged,
    jagged_parts,
    strided_parts,
)
from protocol.dense import is_plain
from protocol.errors import BatchError
from protocol.ipc import LentTensor
from protocol.tensordict_rows import build, stack

__all__ = [
    "WIRE_VERSION",
    "Message",
    "Reading",
    "pack",
    "pack_tensordict",
    "pack_value",
    "read_as",
    "reading",
    "unpack",
    "unpack_tensordict",
    "unpack_value",
]

WIRE_VERSION = 2

_Payload: TypeAlias = "tuple[Any, ...]"


class _Jagged(NamedTuple):
    values: PackedTensor | LentTensor
    offsets: PackedTensor | LentTensor
    ragged_idx: int
    requires_grad: bool


class _Strided(NamedTuple):  # nested, too
    elements: PackedTensor | LentTensor
    shapes: list[tuple[int, ...]]
    requires_grad: bool


class _Shared(NamedTuple):  # NonTensorData: one value for all rows
    value: object
    batch_size: tuple[int, ...]


class _PerRow(NamedTuple):  # NonTensorStack: one value per row
    values: list[object]


class _TensorDict(NamedTuple):
    columns: dict[str, object]
    batch_size: tuple[int, ...]
    has_device: bool
    names: list[str] | None


def pack(
    batch: TensorDict | None,
    non_tensor_batch: Mapping[str, np.ndarray[Any, Any]],
    meta_info: Mapping[str, Any],
    protocol: int = pickle.HIGHEST_PROTOCOL,
) -> _Payload:
    """A picklable value from which `unpack` builds the same batch in another process.

    Nothing is copied here for contiguous CPU tensors: pickle them with protocol 5 and a
    `buffer_callback` before they change. Columns that are views of one another cross once, as do
    those of all batches packed within one `Message`. Tensors below the top level of meta_info and
    inside object columns are left to the pickler. An array deeper in an object than a row of a
    column may arrive read-only, as pickle leaves it.
    """
    sent = message()
    payload = (
        WIRE_VERSION,
        None if batch is None else _encode(batch, sent),
        {key: _encode(column, sent) for key, column in non_tensor_batch.items()},
        {key: _encode(value, sent) for key, value in meta_info.items()},
    )
    return payload if protocol >= 5 else _in_band(payload, {})


def unpack(
    payload: _Payload,
) -> tuple[TensorDict | None, dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The `(batch, non_tensor_batch, meta_info)` that were packed, on the CPU.

    Every buffer is copied once into private writable memory, except a bytearray, which is taken
    over: pickle makes a fresh one for each in-band buffer, and who passes one out of band gives it
    away. `read_as` changes that.

    Raises:
        BatchError: the payload was packed by another version of this library.
    """
    batch, arrays, meta = _check(payload)
    return (
        None if batch is None else _decode(batch),
        {key: _decode(column) for key, column in arrays.items()},
        {key: _decode(value, _whole()) for key, value in meta.items()},
    )


def pack_tensordict(batch: TensorDict, protocol: int = pickle.HIGHEST_PROTOCOL) -> _Payload:
    """`pack` for a bare TensorDict, which may hold non-tensor data and other TensorDicts."""
    payload = (WIRE_VERSION, _encode(batch, message()))
    return payload if protocol >= 5 else _in_band(payload, {})


def unpack_tensordict(payload: _Payload) -> TensorDict:
    """The TensorDict that `pack_tensordict` packed; memory and errors as for `unpack`."""
    (batch,) = _check(payload)
    return _decode(batch)  # type: ignore[no-any-return]


def pack_value(value: object) -> _Payload | None:
    """The same for one tensor or TensorDict, wherever a pickler meets it; None: not for us."""
    if isinstance(value, TensorDict):
        return pack_tensordict(value)
    nested = isinstance(value, torch.Tensor) and value.is_nested
    if not nested and (type(value) is not torch.Tensor or not is_plain(value)):
        return None
    return WIRE_VERSION, _encode(value, message())


def unpack_value(payload: _Payload) -> Any:
    """What `pack_value` packed; memory and errors as for `unpack`."""
    (value,) = _check(payload)
    return _decode(value, _whole())


def _whole() -> Reading:
    """The same, for what is not a column."""
    return "view" if reading() == "view" else "own"


def _check(payload: _Payload) -> _Payload:
    if payload[0] != WIRE_VERSION:
        raise BatchError(
            f"a batch arrived in wire format {payload[0]!r}, but this process reads "
            f"{WIRE_VERSION}: install the same version of this library on every node"
        )
    return payload[1:]


def _encode(value: object, sent: Message) -> object:
    if isinstance(value, torch.Tensor):
        if is_strided(value):
            elements, shapes = strided_parts(value.detach())
            return _Strided(sent.tensor(elements), shapes, value.requires_grad)
        if value.is_nested:
            values, offsets, ragged_idx = jagged_parts(value.detach())
            grad = value.requires_grad
            return _Jagged(sent.tensor(values), sent.offsets(offsets, value), ragged_idx, grad)
        return sent.tensor(value) if is_plain(value) else value
    if type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.itemsize:
        return sent.array(value)
    if isinstance(value, NonTensorStack):
        return _PerRow(value.tolist())
    if is_non_tensor(value):
        return _Shared(value.data, tuple(value.batch_size))  # type: ignore[attr-defined]
    if isinstance(value, TensorDictBase):
        columns = {key: value.get(key) for key in value.keys()}  # noqa: SIM118
        # Large ones first: smaller ones may be views of them.
        order = sorted(columns, key=lambda key: -getattr(columns[key], "nbytes", 0))
        packed = {key: _encode(columns[key], sent) for key in order}
        names = list(value.names) if any(value.names) else None
        return _TensorDict(
            {key: packed[key] for key in columns},
            tuple(value.batch_size),
            value.device is not None,
            names,  # pyright: ignore[reportArgumentType]
        )
    return value


def _decode(value: Any, how: Reading | None = None) -> Any:
    how = how or reading()
    if isinstance(value, PackedTensor | LentTensor):
        return unpack_tensor(value, how)
    if isinstance(value, _Jagged):
        values, offsets = unpack_tensor(value.values, how), unpack_offsets(value.offsets, how)
        return jagged(values, offsets, value.ragged_idx).requires_grad_(value.requires_grad)
    if isinstance(value, _Strided):
        elements = unpack_tensor(value.elements, "join")
        return from_strided_parts(elements, value.shapes).requires_grad_(value.requires_grad)
    if isinstance(value, PackedArray):
        return unpack_array(value, how)
    if type(value) is np.ndarray and value.dtype.kind == "O" and how != "view":
        _own_rows(value)
    if isinstance(value, _Shared):
        return NonTensorData(value.value, batch_size=value.batch_size)
    if isinstance(value, _PerRow):
        return stack(value.values)
    if isinstance(value, _TensorDict):
        columns = {key: _decode(column, how) for key, column in value.columns.items()}
        found = {c.device for c in columns.values() if isinstance(c, torch.Tensor)}
        device = next(iter(found), torch.device("cpu")) if value.has_device else None
        batch = build(columns, value.batch_size, device)
        batch.names = value.names
        return batch
    return value


def _own_rows(column: np.ndarray[Any, Any]) -> None:
    """Replace the arrays in an object column, which pickle makes views of the received buffers."""
    for index, item in np.ndenumerate(column):
        if type(item) is np.ndarray and not item.flags.writeable:
            column[index] = item.copy()


def _in_band(value: Any, seen: dict[int, Memory]) -> Any:
    """The payload for pickle protocols that know no buffers: every buffer becomes a bytearray."""
    if isinstance(value, Memory):
        return seen.setdefault(id(value), Memory(bytearray(value.data)))
    if isinstance(value, dict):
        return {key: _in_band(item, seen) for key, item in value.items()}
    if isinstance(value, (PackedTensor, _Jagged, _Strided, PackedArray, _TensorDict)):
        return type(value)(*(_in_band(item, seen) for item in value))
    return tuple(_in_band(item, seen) for item in value) if type(value) is tuple else value
