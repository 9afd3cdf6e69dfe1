"""How a batch crosses a process boundary: tensors and numeric arrays leave as out-of-band pickle-5
buffers. What carries the bytes is left to the caller.

On arrival a reader chooses (`read_as`) between private writable memory and views of the buffers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_non_tensor

from protocol import columns
from protocol.columns import Numbers, Unbuilt, build, is_plain, stack
from protocol.device_memory import Loans, borrow

__all__ = [
    "Message",
    "Reading",
    "Tensors",
    "pack",
    "pack_value",
    "read_as",
    "reading",
    "unpack",
    "unpack_value",
]

Reading: TypeAlias = Literal["own", "join", "view"]
_Array: TypeAlias = "np.ndarray[Any, Any]"
_Packed: TypeAlias = "tuple[Any, ...]"  # the name of what makes a value again, and of what
# A buffer in a list: pickle keeps one list one. Several tensors may show it.
_Memory: TypeAlias = "list[Any]"
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
    protocol: int = 5,
) -> tuple[_Packed, dict[str, _Packed], dict[str, _Packed]]:
    """A picklable value from which `unpack` builds the same batch in another process.

    Nothing is copied here for contiguous CPU tensors: pickle them with protocol 5 and a
    `buffer_callback` before they change. The same tensor in several columns crosses once, also in
    all batches packed within one `Message`. Tensors below the top level of meta_info and inside
    object columns are left to the pickler. An array deeper in an object than a row of a column may
    arrive read-only, as pickle leaves it.
    """
    sent = _sending.get()
    if sent is None or sent.paused or protocol < 5:
        sent = Message(protocol=protocol)
    return (
        sent.pack(batch),
        {key: sent.pack(column) for key, column in non_tensor_batch.items()},
        {key: sent.pack(value) for key, value in meta_info.items()},
    )


def unpack(
    batch: _Packed, arrays: Mapping[str, _Packed], meta: Mapping[str, _Packed]
) -> tuple[Any, dict[str, _Array], dict[str, Any]]:
    """The `(batch, non_tensor_batch, meta_info)` that were packed, on the CPU.

    Every buffer is copied once into private writable memory, except a bytearray, which is taken
    over: pickle makes a fresh one for each in-band buffer, and who passes one out of band gives it
    away. `read_as` changes that.
    """
    how = reading()
    return (
        _unpacked(batch, how),
        {key: _unpacked(column, how) for key, column in arrays.items()},
        {key: _unpacked(value, _apart(how)) for key, value in meta.items()},
    )


class Tensors(list[Any]):
    """Tensors, and what else is with them: several times sooner packed than one by one."""


def pack_value(value: object) -> object | None:
    """The same for one tensor or TensorDict, wherever a pickler meets it; None: not for us."""
    if isinstance(value, torch.Tensor):
        ours = columns.is_jagged(value) or (type(value) is torch.Tensor and is_plain(value))
    else:
        ours = isinstance(value, TensorDict | Tensors)
    return (_sending.get() or Message()).pack(value) if ours else None


def unpack_value(packed: Any) -> Any:
    """What `pack_value` packed; memory as for `unpack`."""
    return _unpacked(packed, _apart(reading()))


def _apart(how: Reading) -> Reading:
    """The same for what is not a column, and so not copied by whoever joins columns."""
    return "own" if how == "join" else how


class Message:
    """What is sent together, entered as a context: the same memory crosses once, and tensors arrive
    independent of each other all the same.

    With `lends`, memory on a device is not sent but lent: `lent` are tensors to keep until it has
    been read. Its pickler has it `paused` at what may call other picklers; those below protocol 5
    never add to it.
    """

    def __init__(self, lends: bool = False, protocol: int = 5) -> None:
        self.lent: list[torch.Tensor] = []
        self.paused = False
        self._loans, self._protocol = Loans() if lends else None, protocol
        self.buffers: dict[int, Any] = {}  # by id: those whose bytes unpacking makes private
        # By address or id what was packed before, and what keeps that from being used again.
        self._known: dict[Hashable, tuple[_Memory, torch.Tensor]] = {}

    def __enter__(self) -> Message:
        self._token = _sending.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _sending.reset(self._token)
        if self._loans is not None:
            self._loans.complete()

    def pack(self, value: Any) -> _Packed:
        """What `_unpacked` makes the value of."""
        if isinstance(value, torch.Tensor) and (columns.is_jagged(value) or is_plain(value)):
            if value.requires_grad:
                return "leaf", self.pack(value.detach())
            if not columns.is_jagged(value):
                return self._tensor(value)
            values, offsets, ragged_idx = columns.jagged_parts(value)
            mark = columns.ragged_mark(value)
            if mark not in self._known:
                self._known[mark] = [self._tensor(offsets)], value
            return "jagged", self._tensor(values), self._known[mark][0], ragged_idx
        if type(value) is np.ndarray and value.dtype.kind == "O":
            return "rows", [*value.flat], value.shape
        if type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.itemsize:
            name: Any = value.dtype.str  # which does not tell the fields of a row
            name = name if np.dtype(name) == value.dtype else value.dtype
            flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            return "numbers", name, value.shape, self._memory(flat)
        if isinstance(value, NonTensorStack):
            return "objects", value.tolist(), None
        if is_non_tensor(value):
            return "objects", value.data, tuple(value.batch_size)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, (TensorDictBase, Unbuilt)):
            lazy = isinstance(value, Unbuilt)
            of = value.tensors() if isinstance(value, Unbuilt) else dict(value.items())
            names = [*getattr(value, "names", ())]
            form = tuple(value.batch_size), any(names) and names, value.device is not None, lazy
            return "tensordict", {key: self.pack(column) for key, column in of.items()}, *form
        if type(value) is Tensors:
            return "tensors", [self.pack(item) for item in value]
        return "value", value

    def _tensor(self, tensor: torch.Tensor) -> _Packed:
        """A dense one; without a copy where its elements are in order on the CPU."""
        if self._loans is not None and (claim := self._loans.claim(tensor)):
            self.lent.append(tensor)
            return "lent", *claim
        real = tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)
        name, shape = str(real.dtype).removeprefix("torch."), tuple(real.shape)
        if not (real.is_cpu and real.is_contiguous()) or real.is_conj() or real.is_neg():
            return "dense", name, shape, self._memory(columns.flat_bytes(real).numpy())
        where = real.data_ptr(), real.nbytes
        if where not in self._known:
            flat = real if real.dtype in columns.NUMBERS else columns.flat_bytes(real)
            self._known[where] = self._memory(flat.numpy()), real
        return "dense", name, shape, self._known[where][0]

    def _memory(self, array: Any) -> _Memory:
        buffer = pickle.PickleBuffer(array) if self._protocol >= 5 else bytearray(array.data)
        self.buffers[id(buffer)] = buffer
        return [buffer]


def _made(packed: _Packed, how: Reading) -> Any:
    return _MAKERS[packed[0]](how, *packed[1:])


def _unpacked(packed: _Packed, how: Reading) -> Any:
    return columns.tensor(_made(packed, how))


def _dense(how: Reading, name: str, shape: _Sizes, memory: _Memory) -> Numbers:
    """A tensor on the CPU."""
    dtype: torch.dtype = getattr(torch, name)
    kind = columns.NUMBERS.get(dtype) or f"i{dtype.itemsize}"
    return Numbers(_array(how, kind, shape, memory), dtype)


def _array(how: Reading, dtype: Any, shape: _Sizes, memory: _Memory) -> _Array:
    """Private and writable if "own", read-only if "view".

    numpy allocates: it asks the kernel for large pages, and a copy takes a third of the time.
    """
    data = memory[0]
    array: _Array = np.ndarray(shape, dtype, data)
    if how == "own" and isinstance(data, bytearray):
        memory[0] = memoryview(data)  # who comes next copies it
    elif how == "own" or not array.flags.aligned:
        array = array.copy()
    if how == "view":
        array.flags.writeable = False
    return array


def _rows(how: Reading, values: list[Any], shape: _Sizes) -> _Array:
    """An array of objects. Pickle makes arrays among them views of the buffers."""
    for at, value in enumerate(values):
        if how != "view" and type(value) is np.ndarray and not value.flags.writeable:
            values[at] = value.copy()
    return columns.as_object_array(values).reshape(shape)


def _jagged(how: Reading, values: _Packed, offsets: list[Any], ragged_idx: int) -> torch.Tensor:
    """`offsets` is one list for all columns that have them in common, and then holds one tensor: or
    torch would not let these be combined.
    """
    if not isinstance(offsets[0], torch.Tensor):
        offsets[0] = _unpacked(offsets[0], how)
    return columns.jagged(_unpacked(values, how), offsets[0], ragged_idx)


def _objects(how: Reading, value: Any, batch_size: tuple[int, ...] | None) -> Any:
    """One that all rows share, or a list of one per row."""
    return stack(value) if batch_size is None else NonTensorData(value, batch_size=batch_size)


def _tensordict(
    how: Reading,
    packed: Mapping[Any, _Packed],
    batch_size: tuple[int, ...],
    names: Any,
    has_device: bool,
    lazy: bool,
) -> TensorDict | Unbuilt:
    make = _made if lazy and how == "join" else _unpacked
    values = {key: make(value, how) for key, value in packed.items()}
    found = (value.device for value in values.values() if isinstance(value, torch.Tensor))
    device = next(found, torch.device("cpu")) if has_device else None
    if lazy:
        return Unbuilt(values, batch_size, device)
    batch = build(values, batch_size, device)
    batch.names = names or None
    return batch


# A name is pickled sooner than a function.
_MAKERS: dict[str, Callable[..., Any]] = {
    "dense": _dense,
    "jagged": _jagged,
    "leaf": lambda how, packed: _unpacked(packed, how).requires_grad_(),
    "lent": borrow,
    "numbers": _array,
    "objects": _objects,
    "rows": _rows,
    "tensordict": _tensordict,
    "tensors": lambda how, packed: [_unpacked(item, how) for item in packed],
    "value": lambda _, value: value,
}
