"""How a batch crosses a process boundary: tensors and numeric arrays leave as out-of-band pickle-5
buffers, memory that several of them show only once. What carries the bytes is left to the caller.

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
# A block of bytes, in a list: pickle keeps one list one. Several tensors may be views of it.
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
    `buffer_callback` before they change. Columns that are views of one another cross once, as do
    those of all batches packed within one `Message`. Tensors below the top level of meta_info and
    inside object columns are left to the pickler. An array deeper in an object than a row of a
    column may arrive read-only, as pickle leaves it.
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
    """What is sent together, entered as a context: its tensors may share memory, which then
    crosses once. They arrive independent of each other all the same.

    With `lends`, memory on a device is not sent but lent: `lent` are tensors to keep until it has
    been read. Its pickler has it `paused` at what may call other picklers; those below protocol 5
    never add to it.
    """

    def __init__(self, lends: bool = False, protocol: int = 5) -> None:
        self.lent: list[torch.Tensor] = []
        self.paused = False
        self._loans, self._protocol = Loans() if lends else None, protocol
        self.buffers: dict[int, Any] = {}  # by id: those whose bytes unpacking makes private
        self._blocks: dict[int, list[tuple[int, int, _Memory]]] = {}  # by storage: start, stop
        self._offsets: dict[Hashable, list[Any]] = {}
        self._alive: list[torch.Tensor] = []  # whose ids and addresses are noted above

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
            if mark not in self._offsets:
                self._offsets[mark] = [self._tensor(offsets)]
                self._alive.append(value)
            return "jagged", self._tensor(values), self._offsets[mark], ragged_idx
        if type(value) is np.ndarray and value.dtype.kind == "O":
            return "rows", [*value.flat], value.shape
        if type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.itemsize:
            flat = Numbers(np.ascontiguousarray(value).reshape(-1).view(np.uint8), torch.uint8)
            name: Any = value.dtype.str  # which does not tell the fields of a row
            name = name if np.dtype(name) == value.dtype else value.dtype
            return "numbers", name, value.shape, *self._placed(columns.tensor(flat))
        if isinstance(value, NonTensorStack):
            return "objects", value.tolist(), None
        if is_non_tensor(value):
            return "objects", value.data, tuple(value.batch_size)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, (TensorDictBase, Unbuilt)):
            lazy = isinstance(value, Unbuilt)
            of = value.tensors() if isinstance(value, Unbuilt) else dict(value.items())
            # Large ones first: smaller ones may be views of them.
            order = sorted(of, key=lambda key: -getattr(of[key], "nbytes", 0))
            found = {key: self.pack(of[key]) for key in order}
            names = [*getattr(value, "names", ())]
            form = tuple(value.batch_size), any(names) and names, value.device is not None, lazy
            return "tensordict", {key: found[key] for key in of}, *form
        if type(value) is Tensors:
            return "tensors", [self.pack(item) for item in value]
        return "value", value

    def _tensor(self, tensor: torch.Tensor) -> _Packed:
        """A dense one as a view of a block, without the bytes that expanding it pretends."""
        if self._loans is not None and (claim := self._loans.claim(tensor)):
            self.lent.append(tensor)
            return "lent", *claim
        real = tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)
        shape, steps = tuple(real.shape), real.stride()
        expanded = 0 in steps and [d for d, n in enumerate(shape) if n > 1 and not steps[d]]
        for dim in expanded or ():
            real = real.narrow(dim, 0, 1)
        memory, offset, place = self._placed(real)
        if expanded:
            size, like = real.element_size(), torch.empty(real.shape, device="meta")
            place = place or tuple(step * size for step in like.stride())
            place = tuple(0 if d in expanded else step for d, step in enumerate(place))
        return "dense", str(real.dtype).removeprefix("torch."), shape, memory, offset, place

    def _placed(self, tensor: torch.Tensor) -> tuple[_Memory, int, _Sizes | None]:
        """In which block a tensor is, at which byte and with which strides; None where it is all of
        the block, in order.
        """
        start, size, in_order = tensor.data_ptr(), tensor.element_size(), tensor.is_contiguous()
        steps, last = tensor.stride(), tensor.numel() - 1
        if not in_order:
            last = sum((n - 1) * step for n, step in zip(tensor.shape, steps, strict=True))
        stop = start + (last + 1) * size
        as_it_is = tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()
        blocks = self._blocks.setdefault(tensor.untyped_storage().data_ptr(), [])
        for first, end, memory in blocks if as_it_is else ():
            if first <= start and stop <= end and not (start - first) % size:
                all_of_it = in_order and stop - start == end - first
                return memory, start - first, None if all_of_it else tuple(s * size for s in steps)
        known = as_it_is and in_order and tensor.dtype in columns.NUMBERS
        array: Any = (tensor if known else columns.flat_bytes(tensor)).numpy()
        memory = [pickle.PickleBuffer(array) if self._protocol >= 5 else bytearray(array.data)]
        self.buffers[id(memory[0])] = memory[0]
        if as_it_is and in_order and last >= 0:
            blocks.append((start, stop, memory))
            self._alive.append(tensor)
        return memory, 0, None


def _made(packed: _Packed, how: Reading) -> Any:
    return _MAKERS[packed[0]](how, *packed[1:])


def _unpacked(packed: _Packed, how: Reading) -> Any:
    return columns.tensor(_made(packed, how))


def _dense(how: Reading, name: str, *placed: Any) -> Numbers:
    """A tensor on the CPU, contiguous if "own"."""
    dtype: torch.dtype = getattr(torch, name)
    kind = columns.NUMBERS.get(dtype) or f"i{dtype.itemsize}"
    return Numbers(_array(how, kind, *placed), dtype)


def _array(
    how: Reading, dtype: Any, shape: _Sizes, memory: _Memory, offset: int, steps: _Sizes | None
) -> _Array:
    """Part of a block: private and writable if "own", read-only if "view".

    numpy allocates: it asks the kernel for large pages, and a copy takes a third of the time.
    """
    data = memory[0]
    array: _Array = np.ndarray(shape, dtype, data, offset, steps)
    if how == "own" and steps is None and isinstance(data, bytearray):
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
