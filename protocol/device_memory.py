"""Memory on a device: lent to other processes of the same machine, which map it instead of
receiving bytes (CUDA's interprocess handles), and staged on its way to the CPU.
"""

from __future__ import annotations

import struct
import threading
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from protocol.errors import BatchError

__all__ = ["LentTensor", "lend", "to_host"]

_Arguments: TypeAlias = "tuple[Any, ...]"  # those of torch's rebuild_cuda_tensor

# Places in rebuild_cuda_tensor's arguments.
_DEVICE, _HANDLE, _COUNTER, _COUNTER_OFFSET = 6, 7, 11, 12

_anchors: dict[str, torch.Tensor] = {}  # by device: what this process keeps mapped


class LentTensor:
    """A picklable claim on a tensor, for any number of receivers in other processes.

    The lender keeps the tensor, unchanged, until all of them have read it, and then ends the loan.
    `device` is the device's UUID, `anchor` a tensor of the lender's that is never freed.
    """

    def __init__(self, device: str, arguments: _Arguments, anchor: _Arguments) -> None:
        self.device, self.arguments, self.anchor = device, arguments, anchor
        self._mapped: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LentTensor, (self.device, self.arguments, self.anchor)

    def unpack(self, how: str) -> torch.Tensor:
        """The tensor on the current device. A loan ends with the call that reads it, so only who
        copies at once ("join") gets a view of it.
        """
        seen = self.view()  # from another device it is a copy already
        return seen.clone() if how != "join" and seen is self._mapped else seen

    def view(self) -> torch.Tensor:
        """The lender's memory as a tensor of the current device, after all that the lender had
        computed up to `lend`. Another device of this process is copied from.

        It stays mapped as long as this claim is there, and with it all tensors of a message: the
        last one that goes can cost as much as 5 ms, which the next one pays again. So the anchor
        of a device stays mapped for good.

        Raises:
            BatchError: the lender is gone, or its memory cannot be mapped here.
        """
        if self._mapped is None:
            if self.device not in _anchors:
                _anchors[self.device] = self._map(self.anchor)
            self._mapped = self._map(self.arguments)
        return self._mapped.to(torch.device("cuda", torch.cuda.current_device()))

    def _map(self, arguments: _Arguments) -> torch.Tensor:
        seen = [_uuid(index) for index in range(torch.cuda.device_count())]
        # One that this process does not see is mapped as a peer's memory of its own.
        known = self.device in seen
        at = seen.index(self.device) if known else torch.cuda.current_device()
        here = (*arguments[:_DEVICE], at, *arguments[_DEVICE + 1 :])
        try:
            return rebuild_cuda_tensor(*here)  # type: ignore[no-untyped-call, no-any-return]
        except RuntimeError as error:
            raise BatchError(
                f"memory on device {self.device} cannot be mapped here: the process that made the "
                f"batch is gone, or the devices cannot read each other ({error})"
            ) from error

    def end(self) -> None:
        """In the lender: nobody will read it any more.

        Torch counts one receiver, and would keep the memory of a dropped tensor for good if there
        were none or several; so the count is set to zero.
        """
        if self.arguments[_HANDLE] is not None:
            _counter(self.arguments, 0)


def lend(tensor: torch.Tensor) -> LentTensor | None:
    """A claim on a dense tensor; None if its memory cannot be mapped by other processes and given
    back afterwards. Copies nothing and waits for nothing.
    """
    anchor = _anchor(tensor.device.index) if tensor.is_cuda else None
    if anchor is None:
        return None
    _, arguments = reduce_tensor(tensor.detach())  # type: ignore[no-untyped-call]
    return LentTensor(_uuid(tensor.device.index), arguments, anchor[1])


# Torch's counters of receivers are in shared memory, 64 bit each, behind a header.
_HEADER, _COUNT = 64, struct.Struct("q")


def _counter(arguments: _Arguments, count: int | None = None) -> int:
    """How many receivers torch counts, or from now on counts."""
    path = Path("/dev/shm", arguments[_COUNTER].decode().lstrip("/"))
    with path.open("rb" if count is None else "r+b") as file:
        file.seek(_HEADER + _COUNT.size * arguments[_COUNTER_OFFSET])
        if count is None:
            count = int(_COUNT.unpack(file.read(_COUNT.size))[0])
        else:
            file.write(_COUNT.pack(count))
        return count


@cache
def _anchor(device: int) -> tuple[torch.Tensor, _Arguments] | None:
    """A small tensor that others may map for good; None if this torch does not keep its counters
    of receivers where they are looked for, or its allocator's memory cannot be mapped by others.
    """
    tensor = torch.zeros(1, device=torch.device("cuda", device))
    try:
        _, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
        known = _counter(arguments) == 1
        if known:
            _counter(arguments, 0)
    except (OSError, AttributeError, RuntimeError, struct.error):
        return None
    return (tensor, arguments) if known else None


@cache
def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


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
