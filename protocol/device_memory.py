"""Memory on a device: lent to other processes of the same machine, which map it instead of
receiving bytes (CUDA's interprocess handles), and staged on its way to the CPU.

Mapping costs more than reading, and weights are the same memory every step. So a reader keeps a
storage mapped from the second message on that lends it, as long as it has its memory: each message
says which of its lender's have. Memory is mapped with the device that is current then, whichever
card it is on, and whether the process sees that card or not.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
from contextlib import suppress
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from protocol.errors import BatchError

__all__ = ["Loans", "borrow", "settle", "to_host"]

# Of a storage: its number, the handle of the allocation that it is in, its bytes, from which byte
# on, and whether to keep it mapped.
_Shared: TypeAlias = "tuple[int, bytes, int, int, bool]"
# Of a message: the lender's process, by id and by name; the message's number, and those of storages
# from before that have their memory; and one that readers keep mapped whatever they read.
_Lender: TypeAlias = "tuple[int, str, int, frozenset[int], _Shared]"

# In a lender. Of storages and messages alike, so that it tells which came first.
_numbers = count()


class _Share:
    """A storage that other processes may map, as long as it keeps its memory."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        _, self.handle, self.size, self.offset, *counter = storage._share_cuda_()[:6]  # type: ignore[no-untyped-call]
        self.number, self.stays = next(_numbers), False
        self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        # Torch counts one receiver, and would keep the memory when the lender drops it, until that
        # one says that it is done. Who borrows here does not have torch count.
        counters, at = _counters(counter[0]), _HEADER + _COUNT.size * counter[1]
        if _COUNT.unpack_from(counters, at) != (1,):
            raise RuntimeError("torch does not keep its counters of receivers where it did")
        _COUNT.pack_into(counters, at, 0)

    def holds(self) -> bool:
        """Whether the storage has the memory that was shared: it may be gone, or resized."""
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None or not storage.nbytes():
            return False
        return not torch._C._has_Standard_Deleter(storage._cdata)


_shares: dict[int, _Share] = {}  # by the storage's address, which is not used again before it goes

# Torch's counters of receivers are in shared memory, 64 bit each, behind a header.
_HEADER, _COUNT = 64, struct.Struct("q")


@lru_cache(1)
def _counters(handle: bytes) -> mmap.mmap:
    with Path("/dev/shm", handle.decode().lstrip("/")).open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


class Loans:
    """What one message lends: claims on tensors, for any number of readers in other processes. The
    lender keeps the tensors, unchanged, until all have read them.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._lenders: dict[int, _Lender | None] = {}  # by device
        self._handles: dict[bytes, bytes] = {}  # pickle sends one object once

    def claim(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """What `borrow` makes a dense tensor of; None if other processes cannot map its memory.
        Copies nothing.
        """
        if not tensor.is_cuda or tensor.is_conj() or tensor.is_neg():
            return None
        device = tensor.device.index
        if device not in self._lenders:
            self._lenders[device] = self._lender(device)
        lender = self._lenders[device]
        shared = lender and self._shared(tensor.untyped_storage())
        if shared is None:
            return None
        place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return lender, shared, tensor.dtype, *place

    def complete(self) -> None:
        """Wait for what the lender had computed when it made the last claim."""
        for device in self._lenders:
            torch.cuda.current_stream(device).synchronize()

    def _lender(self, device: int) -> _Lender | None:
        anchor = _anchor(device)
        if anchor is None:
            return None
        for key in [key for key, share in _shares.items() if not share.holds()]:
            del _shares[key]
        numbers = frozenset(share.number for share in _shares.values())
        pid, name = os.getpid(), _name()
        return pid, name, self._number, numbers, self._told(anchor[1])

    def _shared(self, storage: torch.UntypedStorage) -> _Shared | tuple[()] | None:
        if not storage.nbytes():
            return ()
        share = _shares.get(storage._cdata)
        if share is None:  # those that hold no more are gone since `_lender`
            try:
                share = _shares[storage._cdata] = _Share(storage)
            except RuntimeError:  # not of torch's allocator, or itself another process's
                return None
        share.stays = share.stays or share.number < self._number
        return self._told(share)

    def _told(self, share: _Share) -> _Shared:
        handle = self._handles.setdefault(share.handle, share.handle)
        return share.number, handle, share.size, share.offset, share.stays


@cache
def _name() -> str:
    return os.urandom(16).hex()


@cache
def _anchor(device: int) -> tuple[torch.Tensor, _Share] | None:
    """A small tensor that is never freed; None if this torch does not keep its counters of
    receivers where they are looked for, or its allocator's memory cannot be mapped by others.

    Where nothing of a card is mapped, the first mapping takes some 5 ms.
    """
    tensor = torch.zeros(1, device=torch.device("cuda", device))
    try:
        share = _Share(tensor.untyped_storage())
    except (OSError, AttributeError, RuntimeError, ValueError, struct.error):
        return None
    share.stays = True
    _shares[tensor.untyped_storage()._cdata] = share
    return tensor, share


class _Mapped:
    """In a reader: the storages of one lender that are mapped, by their number."""

    def __init__(self, pid: int, name: str) -> None:
        self.storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}  # and whether it stays
        self._told: _Lender | None = None
        with suppress(OSError):  # it has ended, or the kernel does not tell
            process = os.pidfd_open(pid)
            args = process, name
            threading.Thread(target=_await_end, args=args, daemon=True, name="lender").start()

    def storage(self, lender: _Lender, shared: _Shared) -> torch.UntypedStorage:
        if self._told is not lender:
            self._told = lender
            _, _, number, alive, anchor = lender
            for old in [n for n in [*self.storages] if n < number and n not in alive]:
                self.storages.pop(old, None)
            self._map(anchor)
        return self._map(shared)

    def _map(self, shared: _Shared) -> torch.UntypedStorage:
        number, handle, size, offset, stays = shared
        found, kept = self.storages.get(number, (None, False))
        if found is None:
            where = torch.cuda.current_device(), handle, size, offset
            found = torch.UntypedStorage._new_shared_cuda(*where, _NO_COUNTER, 0, b"", False)
        if stays or not kept:
            self.storages[number] = found, stays
        return found


_NO_COUNTER = b"/no/counter"  # a name that no file there can have: torch counts nothing down
_mapping = threading.Lock()
_lenders: dict[str, _Mapped] = {}
_borrowed: list[tuple[ref[torch.Tensor], int]] = []  # and which device was current


def _await_end(process: int, name: str) -> None:
    """Let go of what is mapped of a process's memory when it has ended."""
    ended = select.poll()
    ended.register(process, select.POLLIN)
    ended.poll()
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
    pid, name, *_ = lender
    try:
        with _mapping:
            if name not in _lenders:
                _lenders[name] = _Mapped(pid, name)
            storage = _lenders[name].storage(lender, shared)
    except RuntimeError as error:
        raise BatchError(
            f"device memory of process {pid} cannot be mapped here: that process, which made what "
            f"is read, is gone, or the devices cannot read each other ({error})"
        ) from error
    seen = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, steps)
    _borrowed.append((ref(seen), here.index))
    if seen.device != here:  # mapped when another one was current
        return seen.to(here)
    return seen.clone() if how == "own" else seen


def settle() -> None:
    """Wait until all that was borrowed has been read by what the current stream was given so far,
    and let go of mappings that do not stay. Does nothing where nothing was borrowed.
    """
    if _borrowed:
        seen = [*_borrowed]
        for device in {device for _, device in seen}:
            torch.cuda.current_stream(device).synchronize()
        del _borrowed[: len(seen)]
        _borrowed.extend(one for one in seen if one[0]() is not None)  # of calls that go on
        for lender in [*_lenders.values()]:
            for number in [n for n, (_, stays) in [*lender.storages.items()] if not stays]:
                lender.storages.pop(number, None)


_CHUNK = 16 << 20  # bytes; smaller tensors go the plain way
_BUFFERS = 4  # copies under way at a time

_lock = threading.Lock()


def to_host(flat: torch.Tensor) -> torch.Tensor:
    """A flat uint8 tensor as pageable CPU memory; itself if it is there already.

    It goes by way of a few pinned buffers: a plain copy into fresh memory waits for every page and
    was measured ten times slower.
    """
    if flat.device.type == "cpu" or flat.numel() < _CHUNK:
        return flat.cpu()
    with _lock:
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
