"""Memory on a device: lent to other processes of the same machine, which map it instead of
receiving bytes (CUDA's interprocess handles), and staged on its way to the CPU.

Mapping costs more than reading, and weights are the same memory every step. So a reader keeps a
storage mapped from the second message on that lends it, until a message says that it is gone.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from functools import cache, lru_cache
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from protocol.errors import BatchError

__all__ = ["Loans", "borrow", "settle", "to_host"]

# Of a storage: its number, the handle of the allocation that it is in, its bytes, and from which
# byte on.
_Shared: TypeAlias = "tuple[int, bytes, int, int]"
# Of a message: the lender's process, by id and by name; the message's number, and those of storages
# from before that have their memory; and one that readers keep mapped whatever they read.
_Lender: TypeAlias = "tuple[int, str, int, frozenset[int], _Shared]"

# In a lender. Of storages and messages alike, so that it tells which came first.
_numbers = count()


class _Share:
    """A storage that other processes may map, as long as it keeps its memory."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        _, handle, size, offset, *counter = storage._share_cuda_()[:6]  # type: ignore[no-untyped-call]
        # Torch counts one receiver, and would keep the memory when the lender drops it, until that
        # one says that it is done. Who borrows here does not have torch count.
        counters, at = _counters(counter[0]), _HEADER + len(_ONE) * counter[1]
        if counters[at : at + len(_ONE)] != _ONE:
            raise RuntimeError("torch does not keep its counters of receivers where it did")
        counters[at : at + len(_ONE)] = bytes(len(_ONE))
        self.told: _Shared = next(_numbers), _one_object(handle), size, offset
        self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def holds(self) -> bool:
        """Whether the storage has the memory that was shared: it may be gone, or resized."""
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None or not storage.nbytes():
            return False
        return not torch._C._has_Standard_Deleter(storage._cdata)


_shares: dict[int, _Share] = {}  # by the storage's address, which is not used again before it goes

# Torch's counters of receivers are in shared memory, 64 bit each, behind a header.
_HEADER, _ONE = 64, (1).to_bytes(8, "little")


@lru_cache(1)
def _counters(handle: bytes) -> mmap.mmap:
    with Path("/dev/shm", handle.decode().lstrip("/")).open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


@lru_cache(1024)
def _one_object(handle: bytes) -> bytes:
    """Which pickle sends once."""
    return handle


def _shared(storage: torch.UntypedStorage) -> _Shared | None:
    """None if others cannot map it: it is not of torch's allocator, or itself another process's, or
    this torch counts in another place.
    """
    if storage._cdata not in _shares:
        try:
            _shares[storage._cdata] = _Share(storage)
        except (OSError, RuntimeError, ValueError):
            return None
    return _shares[storage._cdata].told


@cache
def _anchor(device: int) -> tuple[torch.Tensor, _Shared | None]:
    """A small tensor that is never freed: where nothing of a card is mapped, mapping takes 5 ms."""
    tensor = torch.zeros(1, device=torch.device("cuda", device))
    return tensor, _shared(tensor.untyped_storage())


@cache
def _name() -> str:
    return os.urandom(16).hex()


class Loans:
    """What one message lends: claims on tensors, for any number of readers in other processes. The
    lender keeps the tensors, unchanged, until all have read them.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._lenders: dict[int, _Lender | None] = {}  # by device

    def claim(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """What `borrow` makes a dense tensor of; None if other processes cannot map its memory.
        Copies nothing.
        """
        if not tensor.is_cuda or tensor.is_conj() or tensor.is_neg():
            return None
        device, storage = tensor.device.index, tensor.untyped_storage()
        if device not in self._lenders:
            self._lenders[device] = self._lender(device)
        lender = self._lenders[device]
        shared = lender and (_shared(storage) if storage.nbytes() else ())
        if shared is None:
            return None
        place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return lender, shared, tensor.dtype, *place

    def complete(self) -> None:
        """Wait for what the lender had computed when it made the last claim."""
        for device in self._lenders:
            torch.cuda.current_stream(device).synchronize()

    def _lender(self, device: int) -> _Lender | None:
        _, anchor = _anchor(device)
        for key in [key for key, share in _shares.items() if not share.holds()]:
            del _shares[key]
        alive = frozenset(share.told[0] for share in _shares.values())
        return anchor and (os.getpid(), _name(), self._number, alive, anchor)


class _Mapped:
    """In a reader: the storages of one lender that are mapped, by their number."""

    def __init__(self, pid: int, name: str) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._told: _Lender | None = None
        with suppress(OSError):  # it has ended, or the kernel does not tell
            args = os.pidfd_open(pid), name
            threading.Thread(target=_await_end, args=args, daemon=True, name="lender").start()

    def storage(self, lender: _Lender, shared: _Shared) -> torch.UntypedStorage:
        if self._told is not lender:
            self._told = lender
            _, _, message, alive, anchor = lender
            for gone in [n for n in self.storages if n < message and n not in alive]:
                del self.storages[gone]
            self._map(anchor)
        return self._map(shared)

    def _map(self, shared: _Shared) -> torch.UntypedStorage:
        number, *memory = shared
        if number not in self.storages:
            where = torch.cuda.current_device(), *memory
            made = torch.UntypedStorage._new_shared_cuda(*where, _NO_COUNTER, 0, b"", False)
            self.storages[number] = made
        return self.storages[number]


_NO_COUNTER = b"/no/counter"  # a name that no file there can have: torch counts nothing down
_lock = threading.RLock()  # of all below
_lenders: dict[str, _Mapped] = {}
_borrowed: list[tuple[ref[torch.Tensor], int]] = []  # and which device was current
_passing: list[tuple[_Mapped, int]] = []  # storages that no message lent before


def _await_end(process: int, name: str) -> None:
    """Let go of what is mapped of a process's memory when it has ended."""
    wait([process])
    os.close(process)
    _lenders.pop(name, None)


def borrow(
    how: str,
    lender: _Lender,
    shared: _Shared | tuple[()],
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    steps: tuple[int, ...],
) -> torch.Tensor:
    """A lent tensor on the current device: a copy if `how` is "own", else the lender's memory
    itself. Who borrows calls `settle` before the lender may free it.

    Raises:
        BatchError: the lender is gone, or its memory cannot be mapped here.
    """
    here = torch.device("cuda", torch.cuda.current_device())
    if not shared:
        return torch.empty_strided(shape, steps, dtype=dtype, device=here)
    pid, name, message, *_ = lender
    with _lock:
        if name not in _lenders:
            _lenders[name] = _Mapped(pid, name)
        mapped = _lenders[name]
        try:
            storage = mapped.storage(lender, shared)
        except RuntimeError as error:
            raise BatchError(
                f"device memory of process {pid} cannot be mapped here: that process, which made "
                f"what is read, is gone, or the devices cannot read each other ({error})"
            ) from error
        seen = torch.empty(0, dtype=dtype, device=storage.device)
        seen.set_(storage, offset, shape, steps)
        _borrowed.append((ref(seen), here.index))
        if shared[0] > message:
            _passing.append((mapped, shared[0]))
    if seen.device != here:  # mapped when another one was current
        return seen.to(here)
    return seen.clone() if how == "own" else seen


def settle() -> None:
    """Wait until all that was borrowed has been read by what the current stream was given so far,
    and let go of what is mapped for the first time. Does nothing where nothing was borrowed.
    """
    if not _borrowed:
        return
    with _lock:
        for device in {device for _, device in _borrowed}:
            torch.cuda.current_stream(device).synchronize()
        _borrowed[:] = [one for one in _borrowed if one[0]() is not None]  # of calls that go on
        for mapped, number in _passing:
            mapped.storages.pop(number, None)
        _passing.clear()


_CHUNK = 16 << 20  # bytes; smaller tensors go the plain way
_BUFFERS = 4  # copies under way at a time
_staging = threading.Lock()


def to_host(flat: torch.Tensor) -> torch.Tensor:
    """A flat uint8 tensor as pageable CPU memory; itself if it is there already.

    It goes by way of a few pinned buffers: a plain copy into fresh memory waits for every page and
    was measured ten times slower.
    """
    if flat.device.type == "cpu" or flat.numel() < _CHUNK:
        return flat.cpu()
    with _staging:
        buffers = _pinned()
        return flat.cpu() if buffers is None else _staged(flat, buffers)


@cache
def _pinned() -> tuple[torch.Tensor, ...] | None:
    """This process's staging buffers; None where memory cannot be pinned."""
    try:
        return tuple(
            torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)
        )
    except RuntimeError:
        return None


def _staged(flat: torch.Tensor, buffers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """While the device fills some buffers, others are emptied into the result."""
    whole = torch.empty(flat.shape, dtype=torch.uint8)
    sources, targets = torch.split(flat, _CHUNK), torch.split(whole, _CHUNK)
    stream = torch.accelerator.current_stream(flat.device)
    filled = [torch.Event(flat.device) for _ in buffers]
    for chunk in range(len(sources) + len(buffers)):
        at, done = chunk % len(buffers), chunk - len(buffers)
        if done >= 0:
            filled[at].synchronize()
            targets[done].copy_(buffers[at][: len(targets[done])])
        if chunk < len(sources):
            buffers[at][: len(sources[chunk])].copy_(sources[chunk], non_blocking=True)
            filled[at].record(stream)
    return whole
