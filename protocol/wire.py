"""How a batch crosses a process boundary: tensors and numeric arrays leave as out-of-band pickle-5
buffers and arrive as private writable memory. What carries the bytes is left to the caller."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_non_tensor

from protocol.columns import flat_bytes, jagged, jagged_parts
from protocol.errors import BatchError
from protocol.tensordict_rows import build, stack

__all__ = [
    "WIRE_VERSION",
    "borrow",
    "pack",
    "pack_tensordict",
    "unpack",
    "unpack_tensordict",
]

WIRE_VERSION = 1

_Payload: TypeAlias = "tuple[Any, ...]"
_Buffer: TypeAlias = "pickle.PickleBuffer | bytes | bytearray | memoryview"

_borrowing: ContextVar[bool] = ContextVar("_borrowing", default=False)


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    sent: tuple[int, ...]  # like shape, but 1 where the dim was expanded
    data: _Buffer
    requires_grad: bool


class _Jagged(NamedTuple):
    values: _Tensor
    offsets: _Tensor
    ragged_idx: int
    requires_grad: bool


class _Array(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: _Buffer


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
    `buffer_callback` before they change. Tensors below the top level of meta_info and inside object
    columns are pickled the ordinary way. An array deeper in an object than a row of a column may
    arrive read-only, as pickle leaves it.
    """
    payload = (
        WIRE_VERSION,
        None if batch is None else _encode(batch),
        {key: _encode(column) for key, column in non_tensor_batch.items()},
        {key: _encode(value) for key, value in meta_info.items()},
    )
    return payload if protocol >= 5 else _in_band(payload)


def unpack(
    payload: _Payload,
) -> tuple[TensorDict | None, dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The `(batch, non_tensor_batch, meta_info)` that were packed, on the CPU.

    Every buffer is copied once into private writable memory, except a bytearray, which is taken
    over: pickle makes a fresh one for each in-band buffer, and who passes one out of band gives it
    away. Under `borrow()` nothing is copied.

    Raises:
        BatchError: the payload was packed by another version of this library.
    """
    batch, arrays, meta = _check(payload)
    return (
        None if batch is None else _decode(batch),
        {key: _decode(column) for key, column in arrays.items()},
        {key: _decode(value) for key, value in meta.items()},
    )


def pack_tensordict(batch: TensorDict, protocol: int = pickle.HIGHEST_PROTOCOL) -> _Payload:
    """`pack` for a bare TensorDict, which may hold non-tensor data and other TensorDicts."""
    payload = (WIRE_VERSION, _encode(batch))
    return payload if protocol >= 5 else _in_band(payload)


def unpack_tensordict(payload: _Payload) -> TensorDict:
    """The TensorDict that `pack_tensordict` packed; memory and errors as for `unpack`."""
    (batch,) = _check(payload)
    return _decode(batch)  # type: ignore[no-any-return]


@contextmanager
def borrow() -> Iterator[None]:
    """Within this context, unpacked tensors and arrays are views of the received buffers.

    For a reader that copies at once (concatenation) or promises not to write: the memory may be
    shared with other processes and read-only, which torch does not check.

        with borrow():
            shards = [pickle.loads(data, buffers=buffers) for data, buffers in received]
        whole = DataProto.concat(shards)  # the only copy
    """
    token = _borrowing.set(True)
    try:
        yield
    finally:
        _borrowing.reset(token)


def _check(payload: _Payload) -> _Payload:
    if payload[0] != WIRE_VERSION:
        raise BatchError(
            f"a batch arrived in wire format {payload[0]!r}, but this process reads "
            f"{WIRE_VERSION}: install the same version of this library on every node"
        )
    return payload[1:]


def _encode(value: object) -> object:
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            values, offsets, ragged_idx = jagged_parts(value.detach())
            grad = value.requires_grad
            return _Jagged(_encode_tensor(values), _encode_tensor(offsets), ragged_idx, grad)
        return _encode_tensor(value) if _is_plain(value) else value
    if type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.itemsize:
        flat = np.ascontiguousarray(value).reshape(-1)
        return _Array(value.dtype, value.shape, pickle.PickleBuffer(flat.view(np.uint8).data))
    if isinstance(value, NonTensorStack):
        return _PerRow(value.tolist())
    if is_non_tensor(value):
        return _Shared(value.data, tuple(value.batch_size))  # type: ignore[attr-defined]
    if isinstance(value, TensorDictBase):
        columns = {key: _encode(value.get(key)) for key in value.keys()}  # noqa: SIM118
        names = list(value.names) if any(value.names) else None
        return _TensorDict(columns, tuple(value.batch_size), value.device is not None, names)
    return value


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is one block of numbers in memory (not sparse, meta, distributed, ...)."""
    return (
        value.layout is torch.strided
        and value.device.type != "meta"
        and not value.is_quantized
        and type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def _encode_tensor(tensor: torch.Tensor) -> _Tensor:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    requires_grad = tensor.requires_grad
    tensor = tensor.detach().as_subclass(torch.Tensor)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    sent = tuple(tensor.shape)
    data = pickle.PickleBuffer(flat_bytes(tensor).numpy().data)
    return _Tensor(dtype, shape, sent, data, requires_grad)


def _decode(value: Any) -> Any:
    if isinstance(value, _Tensor):
        return _decode_tensor(value)
    if isinstance(value, _Jagged):
        values, offsets = _decode_tensor(value.values), _decode_tensor(value.offsets)
        return jagged(values, offsets, value.ragged_idx).requires_grad_(value.requires_grad)
    if isinstance(value, _Array):
        data = _bytes(value.data)
        if not data.numel():
            return np.empty(value.shape, value.dtype)
        return data.numpy().view(value.dtype).reshape(value.shape)
    if type(value) is np.ndarray and value.dtype.kind == "O" and not _borrowing.get():
        _own_rows(value)
    if isinstance(value, _Shared):
        return NonTensorData(value.value, batch_size=value.batch_size)
    if isinstance(value, _PerRow):
        return stack(value.values)
    if isinstance(value, _TensorDict):
        columns = {key: _decode(column) for key, column in value.columns.items()}
        device = torch.device("cpu") if value.has_device else None
        batch = build(columns, value.batch_size, device)
        batch.names = value.names
        return batch
    return value


def _own_rows(column: np.ndarray[Any, Any]) -> None:
    """Replace the arrays in an object column, which pickle makes views of the received buffers."""
    for index, item in np.ndenumerate(column):
        if type(item) is np.ndarray and not item.flags.writeable:
            column[index] = item.copy()


def _decode_tensor(packed: _Tensor) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, packed.dtype)
    data = _bytes(packed.data)
    if not data.numel():
        return torch.empty(packed.shape, dtype=dtype, requires_grad=packed.requires_grad)
    tensor = data.view(dtype).reshape(packed.sent)
    if packed.sent != packed.shape:
        tensor = tensor.expand(packed.shape).contiguous()
    return tensor.requires_grad_(packed.requires_grad)


def _bytes(buffer: _Buffer) -> torch.Tensor:
    """The buffer as a flat uint8 tensor: private and writable unless borrowed."""
    source = np.frombuffer(memoryview(buffer), np.uint8)
    if isinstance(buffer, bytearray) or not source.size:
        return torch.from_numpy(source) if source.size else torch.empty(0, dtype=torch.uint8)
    if _borrowing.get() and source.ctypes.data % 16 == 0:
        return torch.from_numpy(np.asarray(_Writable(source)))
    private = torch.empty(source.size, dtype=torch.uint8)
    private.numpy()[:] = source
    return private


class _Writable:
    """Shows a read-only array to torch, which warns about those, as if it could be written."""

    def __init__(self, source: np.ndarray[Any, Any]) -> None:
        self.source = source  # keeps the memory alive
        address, _ = source.__array_interface__["data"]
        self.__array_interface__ = {**source.__array_interface__, "data": (address, False)}


def _in_band(value: Any) -> Any:
    """The payload for pickle protocols that know no buffers: every buffer becomes a bytearray."""
    if isinstance(value, pickle.PickleBuffer):
        return bytearray(value)
    if isinstance(value, dict):
        return {key: _in_band(item) for key, item in value.items()}
    if isinstance(value, (_Tensor, _Jagged, _Array, _TensorDict)):
        return type(value)(*map(_in_band, value))
    return tuple(map(_in_band, value)) if type(value) is tuple else value
