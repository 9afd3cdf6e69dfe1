"""Blocks of memory on their way: how one tensor or array leaves as a buffer, which others may
share, and arrives as private memory or a view. What a batch is made of is left to `wire`."""

from __future__ import annotations

import pickle
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from protocol.columns import flat_bytes, ragged_mark
from protocol.ipc import LentTensor, can_lend, lend

__all__ = [
    "Memory",
    "Message",
    "PackedArray",
    "PackedTensor",
    "Reading",
    "message",
    "read_as",
    "reading",
    "unpack_array",
    "unpack_offsets",
    "unpack_tensor",
]

_Buffer: TypeAlias = "pickle.PickleBuffer | bytes | bytearray | memoryview"
Reading: TypeAlias = Literal["own", "join", "view"]

_reading: ContextVar[Reading] = ContextVar("_reading", default="own")
_sending: ContextVar[Message | None] = ContextVar("_sending", default=None)
_NONE = np.empty(0, np.uint8)


class Memory:
    """A block of bytes. Several tensors may be views of it; it crosses once."""

    __slots__ = ("data", "offsets", "taken")

    def __init__(self, data: _Buffer) -> None:
        self.data = data
        self.taken = False  # given to a tensor that owns it now
        self.offsets: dict[Any, torch.Tensor] = {}  # what `unpack_offsets` made of it

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, (self.data,)


class PackedTensor(NamedTuple):
    """A dense tensor as a strided view of a block."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements from the start of the memory
    memory: Memory
    requires_grad: bool


class PackedArray(NamedTuple):
    """An array of numbers in a block of its own."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    memory: Memory


class Message:
    """What is sent together, entered as a context: its tensors may share memory, which then
    crosses once. They arrive independent of each other all the same.

    With `lends`, memory on a device is not sent but lent: `lent` are these loans.
    """

    def __init__(self, lends: bool = False) -> None:
        self._lends = lends
        self.lent: list[LentTensor] = []
        self._blocks: dict[int, list[tuple[int, int, Memory]]] = {}  # by storage: start, stop
        self._copies: dict[tuple[Any, ...], Memory] = {}
        self._offsets: dict[Hashable, PackedTensor | LentTensor] = {}
        self._alive: list[Any] = []  # addresses stay theirs while the message lives
        self._buffers: set[int] = set()

    def __enter__(self) -> Message:
        self._token = _sending.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _sending.reset(self._token)

    def holds(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether unpacking will see to it that this buffer's bytes become private."""
        return id(buffer) in self._buffers

    def tensor(self, tensor: torch.Tensor) -> PackedTensor | LentTensor:
        """A dense one, without the bytes that expanding it pretends."""
        if self._lends and can_lend(tensor):
            self.lent.append(lend(tensor))
            return self.lent[-1]
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        grad = tensor.requires_grad
        tensor = tensor.detach().as_subclass(torch.Tensor)
        expanded = [d for d, step in enumerate(tensor.stride()) if step == 0 and shape[d] > 1]
        for dim in expanded:
            tensor = tensor.narrow(dim, 0, 1)
        stride, offset, memory = self._place(tensor)
        stride = tuple(0 if dim in expanded else step for dim, step in enumerate(stride))
        return PackedTensor(dtype, shape, stride, offset, memory, grad)

    def offsets(self, offsets: torch.Tensor, column: torch.Tensor) -> PackedTensor | LentTensor:
        """Those of a jagged column: one tensor for all columns that have them in common."""
        mark = ragged_mark(column)
        if mark not in self._offsets:
            self._offsets[mark] = self.tensor(offsets)
            self._alive.append(column)
        return self._offsets[mark]

    def array(self, array: np.ndarray[Any, Any]) -> PackedArray:
        """Of a dtype without objects."""
        key = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)
        if key not in self._copies:
            flat = np.ascontiguousarray(array).reshape(-1)
            self._copies[key] = self._block(flat.view(np.uint8))
            self._alive.append(array)
        return PackedArray(array.dtype, array.shape, self._copies[key])

    def _place(self, tensor: torch.Tensor) -> tuple[tuple[int, ...], int, Memory]:
        """`(stride, offset, memory)` where a tensor without expanded dims is found."""
        size, stride = tensor.element_size(), tensor.stride()
        here = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        if here and tensor.numel():
            start = tensor.data_ptr()
            last = sum((n - 1) * step for n, step in zip(tensor.shape, stride, strict=True))
            stop = start + (last + 1) * size
            blocks = self._blocks.setdefault(tensor.untyped_storage().data_ptr(), [])
            for first, end, memory in blocks:
                if first <= start and stop <= end and not (start - first) % size:
                    return stride, (start - first) // size, memory
            if tensor.is_contiguous():
                memory = self._block(flat_bytes(tensor).numpy())
                blocks.append((start, stop, memory))
                return _contiguous(tensor.shape), 0, memory
        bits = tensor.is_conj(), tensor.is_neg()
        key = tensor.device, tensor.data_ptr(), tensor.shape, stride, tensor.dtype, bits
        if not tensor.numel() or key not in self._copies:
            self._copies[key] = self._block(flat_bytes(tensor).numpy())
            self._alive.append(tensor)
        return _contiguous(tensor.shape), 0, self._copies[key]

    def _block(self, flat: np.ndarray[Any, Any]) -> Memory:
        buffer = pickle.PickleBuffer(flat.data)
        memory = Memory(buffer)
        self._buffers.add(id(buffer))
        self._alive.append(memory)
        return memory


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def message() -> Message:
    """The message that is being sent now, or a new one."""
    return _sending.get() or Message()


@contextmanager
def read_as(how: Reading) -> Generator[None, None, None]:
    """Within this context, what is unpacked is

    - "own": private and writable (the default);
    - "join": views of the received buffers, for a reader that copies the columns at once. What
      is not a column (meta_info, arrays in object columns) is private all the same;
    - "view": views of the received buffers, for a reader that promises not to write. The memory
      may be shared with other processes; arrays are read-only, which torch does not know.

        with read_as("join"):
            shards = [pickle.loads(data, buffers=buffers) for data, buffers in received]
        whole = DataProto.concat(shards)  # the only copy
    """
    token = _reading.set(how)
    try:
        yield
    finally:
        _reading.reset(token)


def reading() -> Reading:
    """How what arrives here now is to be read; a source of rows honours it, too."""
    return _reading.get()


def unpack_array(packed: PackedArray, how: Reading) -> np.ndarray[Any, Any]:
    """The array, read-only in a "view"."""
    flat = _bytes(packed.memory, how)
    if not flat.size:
        return np.empty(packed.shape, packed.dtype)
    array = flat.view(packed.dtype).reshape(packed.shape)
    if how == "view":
        array.flags.writeable = False
    return array


def unpack_offsets(packed: PackedTensor | LentTensor, how: Reading) -> torch.Tensor:
    """The offsets of a jagged tensor: one tensor for all that share them, or torch would not let
    these be combined.
    """
    known = (packed if isinstance(packed, LentTensor) else packed.memory).offsets
    key = None if isinstance(packed, LentTensor) else packed[:4]
    if key not in known:
        known[key] = unpack_tensor(packed, how)
    return known[key]


def unpack_tensor(packed: PackedTensor | LentTensor, how: Reading) -> torch.Tensor:
    """The tensor, contiguous if "own": on the CPU, one that is lent on the current device.

    A loan ends with the call that reads it, so only who copies at once gets a view of it.
    """
    if isinstance(packed, LentTensor):
        return packed.view() if how == "join" else packed.view().clone()
    dtype: torch.dtype = getattr(torch, packed.dtype)
    if 0 in packed.shape:
        return torch.empty(packed.shape, dtype=dtype, requires_grad=packed.requires_grad)
    size = memoryview(packed.memory.data).nbytes // dtype.itemsize
    stride, numel = _contiguous(packed.shape), np.prod(packed.shape, dtype=np.int64)
    if how == "own" and (numel != size or packed.stride != stride):  # a part, or expanded
        shown = _torch(_bytes(packed.memory, "view"))
        tensor = torch.from_numpy(np.empty(int(numel) * dtype.itemsize, np.uint8)).view(dtype)
        tensor = tensor.view(packed.shape)
        tensor.copy_(_strided(shown, dtype, packed))
    else:
        tensor = _strided(_torch(_bytes(packed.memory, how)), dtype, packed)
    return tensor.requires_grad_(packed.requires_grad)


def _strided(flat: torch.Tensor, dtype: torch.dtype, packed: PackedTensor) -> torch.Tensor:
    whole = flat.numel() // dtype.itemsize * dtype.itemsize  # it may hold bytes of another view
    return flat[:whole].view(dtype).as_strided(packed.shape, packed.stride, packed.offset)


def _bytes(memory: Memory, how: Reading) -> np.ndarray[Any, Any]:
    """The bytes, flat: private and writable if "own".

    numpy allocates: it asks the kernel for large pages, and a copy takes a third of the time.
    """
    data = memoryview(memory.data)
    source: np.ndarray[Any, Any] = np.frombuffer(data, np.uint8) if data.nbytes else _NONE
    if how != "own" and source.ctypes.data % 16 == 0:
        return source
    if isinstance(memory.data, bytearray) and not memory.taken:
        memory.taken = True
        return source
    private: np.ndarray[Any, Any] = source.copy()
    return private


def _torch(source: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(source if source.flags.writeable else np.asarray(_Writable(source)))


class _Writable:
    """Shows a read-only array to torch, which warns about those, as if it could be written."""

    def __init__(self, source: np.ndarray[Any, Any]) -> None:
        self.source = source  # keeps the memory alive
        address, _ = source.__array_interface__["data"]
        self.__array_interface__ = {**source.__array_interface__, "data": (address, False)}
