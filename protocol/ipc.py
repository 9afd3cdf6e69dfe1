"""Tensors on a device lent to other processes of the same machine, which map the memory instead of
receiving bytes: CUDA's interprocess handles. What a batch is made of is left to `wire`, how long a
loan lasts to whoever lends.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from protocol.errors import BatchError

__all__ = ["LentTensor", "can_lend", "lend"]

_Arguments: TypeAlias = "tuple[Any, ...]"

_anchors: dict[str, torch.Tensor] = {}  # by device: what this process keeps mapped

# Places in rebuild_cuda_tensor's arguments.
_DEVICE, _HANDLE, _COUNTER, _COUNTER_OFFSET = 6, 7, 11, 12


class LentTensor:
    """A picklable claim on a tensor, for any number of receivers in other processes.

    The lender keeps the tensor, unchanged, until all of them have read it, and then ends the loan.

    Args:
        device: the device's UUID.
        arguments: those of torch's `rebuild_cuda_tensor`.
        anchor: the same for a tensor that the lender never frees.
    """

    def __init__(self, device: str, arguments: _Arguments, anchor: _Arguments) -> None:
        self.device, self.arguments, self.anchor = device, arguments, anchor
        self._mapped: torch.Tensor | None = None
        self.offsets: dict[Any, torch.Tensor] = {}  # what `unpack_offsets` made of it

    def __reduce__(self) -> tuple[Any, ...]:
        return LentTensor, (self.device, self.arguments, self.anchor)

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
            _write_counter(self.arguments, 0)


def can_lend(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be mapped by other processes, and given back afterwards."""
    return tensor.is_cuda and _anchor(tensor.device.index) is not None


def lend(tensor: torch.Tensor) -> LentTensor:
    """A claim on a dense tensor. Copies nothing and waits for nothing."""
    _, arguments = reduce_tensor(tensor.detach())  # type: ignore[no-untyped-call]
    anchor = _anchor(tensor.device.index)
    assert anchor is not None, "can_lend says which tensors can be lent"
    return LentTensor(_uuid(tensor.device.index), arguments, anchor.arguments)


# Torch's counters of receivers are in shared memory, 64 bit each, behind a header.
_HEADER, _COUNT = 64, struct.Struct("q")


def _counter_file(arguments: _Arguments) -> tuple[Path, int]:
    name = arguments[_COUNTER].decode().lstrip("/")
    return Path("/dev/shm", name), _HEADER + _COUNT.size * arguments[_COUNTER_OFFSET]


def _read_counter(arguments: _Arguments) -> int:
    path, position = _counter_file(arguments)
    with path.open("rb") as file:
        file.seek(position)
        count: int = _COUNT.unpack(file.read(_COUNT.size))[0]
        return count


def _write_counter(arguments: _Arguments, count: int) -> None:
    path, position = _counter_file(arguments)
    with path.open("r+b") as file:
        file.seek(position)
        file.write(_COUNT.pack(count))


class _Anchor(NamedTuple):
    tensor: torch.Tensor
    arguments: _Arguments


@cache
def _anchor(device: int) -> _Anchor | None:
    """A small tensor that others may map for good; None if this torch does not keep its counters
    of receivers where they are looked for, or its allocator's memory cannot be mapped by others.
    """
    tensor = torch.zeros(1, device=torch.device("cuda", device))
    try:
        _, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
        known = _read_counter(arguments) == 1
        if known:
            _write_counter(arguments, 0)
    except (OSError, AttributeError, RuntimeError, struct.error):
        return None
    return _Anchor(tensor, arguments) if known else None


@cache
def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
