"""How a batch crosses a process boundary: tensors and numeric arrays leave as out-of-band pickle-5
buffers, memory that several of them show only once. What carries the bytes is left to the caller.

On arrival a reader chooses (`read_as`) between private writable memory and views of the buffers.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from math import prod
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_non_tensor

from protocol import columns
from protocol.columns import Unbuilt, build, is_plain, stack
from protocol.device_memory import LentTensor, lend

__all__ = [
    "Message",
    "Reading",
    "pack",
    "pack_value",
    "read_as",
    "reading",
    "unpack",
    "unpack_value",
]

Reading: TypeAlias = Literal["own", "join", "view"]
_Array: TypeAlias = "np.ndarray[Any, Any]"
_Payload: TypeAlias = "tuple[Any, ...]"
_Sizes: TypeAlias = "tuple[int, ...]"

# A pickler calls into a batch with nothing but the batch: the rest has no other way there.
_reading: ContextVar[Reading] = ContextVar("_reading", default="own")
_sending: ContextVar[Message | None] = ContextVar("_sending", default=None)


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


def pack(
    batch: TensorDict | Unbuilt | None,
    non_tensor_batch: Mapping[str, _Array],
    meta_info: Mapping[str, Any],
) -> _Payload:
    """A picklable value from which `unpack` builds the same batch in another process.

    Nothing is copied here for contiguous CPU tensors: pickle them with protocol 5 and a
    `buffer_callback` before they change. Columns that are views of one another cross once, as do
    those of all batches packed within one `Message`. Tensors below the top level of meta_info and
    inside object columns are left to the pickler. An array deeper in an object than a row of a
    column may arrive read-only, as pickle leaves it.
    """
    sent = _sending.get() or Message()
    return (
        sent.pack(batch),
        {key: sent.pack(column) for key, column in non_tensor_batch.items()},
        {key: sent.pack(value) for key, value in meta_info.items()},
    )


def unpack(payload: _Payload) -> tuple[Any, dict[str, _Array], dict[str, Any]]:
    """The `(batch, non_tensor_batch, meta_info)` that were packed, on the CPU.

    Every buffer is copied once into private writable memory, except a bytearray, which is taken
    over: pickle makes a fresh one for each in-band buffer, and who passes one out of band gives it
    away. `read_as` changes that.
    """
    how, (batch, arrays, meta) = reading(), payload
    return (
        _unpacked(batch, how),
        {key: _unpacked(column, how) for key, column in arrays.items()},
        {key: _unpacked(value, _apart(how)) for key, value in meta.items()},
    )


def pack_value(value: object) -> object | None:
    """The same for one tensor or TensorDict, wherever a pickler meets it; None: not for us."""
    if isinstance(value, torch.Tensor):
        ours = value.is_nested or (type(value) is torch.Tensor and is_plain(value))
    else:
        ours = isinstance(value, TensorDict)
    return (_sending.get() or Message()).pack(value) if ours else None


def unpack_value(packed: object) -> Any:
    """What `pack_value` packed; memory as for `unpack`."""
    return _unpacked(packed, _apart(reading()))


def _apart(how: Reading) -> Reading:
    """The same for what is not a column, and so not copied by whoever joins columns."""
    return "own" if how == "join" else how


class Message:
    """What is sent together, entered as a context: its tensors may share memory, which then
    crosses once. They arrive independent of each other all the same.

    With `lends`, memory on a device is not sent but lent: `lent` are these loans.
    """

    def __init__(self, lends: bool = False) -> None:
        self.lent: list[LentTensor] = []
        self._lends = lends
        self._memories: dict[int, _Memory] = {}  # by id of their buffer
        self._blocks: dict[int, list[tuple[int, int, _Memory]]] = {}  # by storage: start, stop
        self._offsets: dict[Hashable, list[Any]] = {}
        self._alive: list[torch.Tensor] = []  # whose ids are keys above

    def __enter__(self) -> Message:
        self._token = _sending.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _sending.reset(self._token)

    def holds(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether unpacking will see to it that this buffer's bytes become private."""
        return id(buffer) in self._memories

    def pack(self, value: object) -> object:
        """A value, or what `_unpacked` makes it of."""
        if isinstance(value, torch.Tensor):
            if columns.is_strided(value):
                elements, shapes = columns.strided_parts(value.detach())
                return _Packed(_strided, (self._tensor(elements), shapes), value.requires_grad)
            if value.is_nested:
                values, offsets, ragged_idx = columns.jagged_parts(value.detach())
                mark = columns.ragged_mark(value)
                if mark not in self._offsets:
                    self._offsets[mark] = [self._tensor(offsets)]
                    self._alive.append(value)
                parts = self._tensor(values), self._offsets[mark], ragged_idx
                return _Packed(_jagged, parts, value.requires_grad)
            return self._tensor(value) if is_plain(value) else value
        if type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.itemsize:
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            memory, offset, _ = self._placed(_shown(flat))
            return _Packed(_numbers, (memory, offset, value.dtype, value.shape))
        if isinstance(value, NonTensorStack):
            return _Packed(_objects, (value.tolist(), None))
        if is_non_tensor(value):
            return _Packed(_objects, (value.data, tuple(value.batch_size)))  # type: ignore[attr-defined]
        if isinstance(value, (TensorDictBase, Unbuilt)):
            lazy = isinstance(value, Unbuilt)
            of = value.tensors if isinstance(value, Unbuilt) else dict(value.items())
            # Large ones first: smaller ones may be views of them.
            order = sorted(of, key=lambda key: -getattr(of[key], "nbytes", 0))
            found = {key: self.pack(of[key]) for key in order}
            names = [*getattr(value, "names", ())]
            form = tuple(value.batch_size), any(names) and names, value.device is not None, lazy
            return _Packed(_tensordict, ({key: found[key] for key in of}, *form))
        return value

    def _tensor(self, tensor: torch.Tensor) -> _Packed | LentTensor:
        """A dense one as a view of a block, without the bytes that expanding it pretends."""
        if self._lends and (loan := lend(tensor)):
            self.lent.append(loan)
            return loan
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        real = tensor.detach().as_subclass(torch.Tensor)
        expanded = [d for d, step in enumerate(tensor.stride()) if step == 0 and shape[d] > 1]
        for dim in expanded:
            real = real.narrow(dim, 0, 1)
        memory, offset, steps = self._placed(real)
        if expanded:
            steps = tuple(0 if d in expanded else step for d, step in enumerate(steps))
        return _Packed(_dense, (memory, dtype, shape, steps, offset), tensor.requires_grad)

    def _placed(self, tensor: torch.Tensor) -> tuple[_Memory, int, _Sizes]:
        """In which block a tensor is, at which element and with which strides."""
        size, steps, start = tensor.element_size(), tensor.stride(), tensor.data_ptr()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, steps, strict=True))
        stop = start + (last + 1) * size
        as_it_is = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        blocks = self._blocks.setdefault(tensor.untyped_storage().data_ptr(), [])
        for first, end, memory in blocks if as_it_is else ():
            if first <= start and stop <= end and not (start - first) % size:
                return memory, (start - first) // size, steps
        memory = _Memory(pickle.PickleBuffer(columns.flat_bytes(tensor).numpy().data))
        self._memories[id(memory.data)] = memory
        if as_it_is and tensor.is_contiguous() and tensor.numel():
            blocks.append((start, stop, memory))
        return memory, 0, _contiguous(tensor.shape)


class _Memory:
    """A block of bytes. Several tensors may be views of it; it crosses once."""

    __slots__ = ("_taken", "data")

    def __init__(self, data: Any) -> None:
        self.data = data  # a PickleBuffer; on arrival whatever the pickler has in its place
        self._taken = False  # given to a tensor that owns it now

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _Memory, (self.data if operator.index(protocol) >= 5 else bytearray(self.data),)

    def bytes(self, how: Reading) -> _Array:
        """The bytes, flat: private and writable if "own".

        numpy allocates: it asks the kernel for large pages, and a copy takes a third of the time.
        """
        source: _Array = np.frombuffer(self.data, np.uint8)
        if how != "own" and source.__array_interface__["data"][0] % 16 == 0:
            return source
        if isinstance(self.data, bytearray) and not self._taken:
            self._taken = True
            return source
        private: _Array = source.copy()
        return private


class _Packed(NamedTuple):
    """What arrives in place of a value: the function that makes it again, and of what."""

    make: Callable[..., Any]
    parts: tuple[Any, ...]
    requires_grad: bool = False

    def unpack(self, how: Reading) -> Any:
        made = self.make(how, *self.parts)
        return made.requires_grad_() if self.requires_grad else made


def _unpacked(value: Any, how: Reading) -> Any:
    if isinstance(value, (_Packed, LentTensor)):
        return value.unpack(how)
    if type(value) is np.ndarray and value.dtype.kind == "O" and how != "view":
        for at, item in enumerate(value.flat):  # pickle makes arrays views of the buffers
            if type(item) is np.ndarray and not item.flags.writeable:
                value.flat[at] = item.copy()
    return value


def _dense(
    how: Reading, memory: _Memory, name: str, shape: _Sizes, steps: _Sizes, offset: int
) -> torch.Tensor:
    """A tensor on the CPU, contiguous if "own"."""
    dtype: torch.dtype = getattr(torch, name)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    size = prod(shape) * dtype.itemsize
    part = size != memoryview(memory.data).nbytes or steps != _contiguous(shape)
    flat = _shown(memory.bytes("view" if part else how))
    whole = len(flat) // dtype.itemsize * dtype.itemsize  # it may hold bytes of another view
    tensor = flat[:whole].view(dtype).as_strided(shape, steps, offset)
    if part and how == "own":
        empty = torch.from_numpy(np.empty(size, np.uint8))
        return empty.view(dtype).view(shape).copy_(tensor)
    return tensor


def _contiguous(shape: _Sizes) -> _Sizes:
    """The strides of a contiguous tensor that is not empty."""
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1][: len(shape)]


def _numbers(
    how: Reading, memory: _Memory, offset: int, dtype: np.dtype[Any], shape: _Sizes
) -> _Array:
    flat = _dense(how, memory, "uint8", (prod(shape) * dtype.itemsize,), (1,), offset)
    array: _Array = flat.numpy().view(dtype).reshape(shape)
    if how == "view":
        array.flags.writeable = False
    return array


def _shown(source: _Array) -> torch.Tensor:
    return torch.from_numpy(source if source.flags.writeable else np.asarray(_Writable(source)))


class _Writable:
    """Shows a read-only array to torch, which warns about those, as if it could be written."""

    def __init__(self, source: _Array) -> None:
        self.source = source  # keeps the memory alive
        address, _ = source.__array_interface__["data"]
        self.__array_interface__ = {**source.__array_interface__, "data": (address, False)}


def _jagged(how: Reading, values: Any, offsets: list[Any], ragged_idx: int) -> torch.Tensor:
    """`offsets` is one list for all columns that have them in common, and then holds one tensor: or
    torch would not let these be combined.
    """
    if not isinstance(offsets[0], torch.Tensor):
        offsets[0] = offsets[0].unpack(how)
    return columns.jagged(values.unpack(how), offsets[0], ragged_idx)


def _strided(how: Reading, elements: Any, shapes: Any) -> torch.Tensor:
    return columns.from_strided_parts(elements.unpack("join"), shapes)  # which copies them


def _objects(how: Reading, value: Any, batch_size: tuple[int, ...] | None) -> Any:
    """One that all rows share, or a list of one per row."""
    return stack(value) if batch_size is None else NonTensorData(value, batch_size=batch_size)


def _tensordict(
    how: Reading,
    packed: Mapping[Any, object],
    batch_size: tuple[int, ...],
    names: Any,
    has_device: bool,
    lazy: bool,
) -> TensorDict | Unbuilt:
    values = {key: _unpacked(value, how) for key, value in packed.items()}
    found = (value.device for value in values.values() if isinstance(value, torch.Tensor))
    device = next(found, torch.device("cpu")) if has_device else None
    if lazy:
        return Unbuilt(values, batch_size, device)
    batch = build(values, batch_size, device)
    batch.names = names or None
    return batch
