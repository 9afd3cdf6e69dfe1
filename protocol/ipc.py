"""Tensors on a device lent to other processes of the same machine, which map the memory instead of
receiving bytes: CUDA's interprocess handles. What a batch is made of is left to `wire`, how long a
loan lasts to whoever lends.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from protocol.errors import BatchError

__all__ = ["LentTensor", "can_lend", "lend"]

# Places in rebuild_cuda_tensor's arguments.
_DEVICE, _HANDLE, _COUNTER, _COUNTER_OFFSET = 6, 7, 11, 12


class LentTensor(NamedTuple):
    """A picklable claim on a tensor, for any number of receivers in other processes.

    The lender keeps the tensor, unchanged, until all of them have read it, and then ends the loan.
    """

    device: str  # the device's UUID
    arguments: tuple[Any, ...]

    def view(self) -> torch.Tensor:
        """The lender's memory as a tensor of the current device, after all that the lender had
        computed up to `lend`. Another device of this process is copied from.

        Raises:
            BatchError: the lender is gone, or its memory cannot be mapped here.
        """
        here = torch.cuda.current_device()
        seen = [_uuid(index) for index in range(torch.cuda.device_count())]
        arguments = list(self.arguments)
        # One that this process does not see is mapped as a peer's memory of its own.
        arguments[_DEVICE] = seen.index(self.device) if self.device in seen else here
        try:
            tensor: torch.Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise BatchError(
                f"memory on device {self.device} cannot be mapped here: the process that made the "
                f"batch is gone, or the devices cannot read each other ({error})"
            ) from error
        return tensor.to(torch.device("cuda", here))

    def end(self) -> None:
        """In the lender: nobody will read it any more.

        Torch counts one receiver, and would keep the memory of a dropped tensor for good if there
        were none or several; so the count is set to zero.
        """
        if self.arguments[_HANDLE] is not None:
            _write_counter(self.arguments, 0)


def can_lend(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be mapped by other processes, and given back afterwards."""
    return tensor.is_cuda and _counters_are_known(tensor.device.index)


def lend(tensor: torch.Tensor) -> LentTensor:
    """A claim on a dense tensor. Copies nothing and waits for nothing."""
    _, arguments = reduce_tensor(tensor.detach())  # type: ignore[no-untyped-call]
    return LentTensor(_uuid(tensor.device.index), arguments)


# Torch's counters of receivers are in shared memory, 64 bit each, behind a header.
_HEADER, _COUNT = 64, struct.Struct("q")


def _counter_file(arguments: Sequence[Any]) -> tuple[Path, int]:
    name = arguments[_COUNTER].decode().lstrip("/")
    return Path("/dev/shm", name), _HEADER + _COUNT.size * arguments[_COUNTER_OFFSET]


def _read_counter(arguments: Sequence[Any]) -> int:
    path, position = _counter_file(arguments)
    with path.open("rb") as file:
        file.seek(position)
        count: int = _COUNT.unpack(file.read(_COUNT.size))[0]
        return count


def _write_counter(arguments: Sequence[Any], count: int) -> None:
    path, position = _counter_file(arguments)
    with path.open("r+b") as file:
        file.seek(position)
        file.write(_COUNT.pack(count))


@cache
def _counters_are_known(device: int) -> bool:
    """Whether this torch keeps its counters where they are looked for: seen on one of them."""
    try:
        _, arguments = reduce_tensor(torch.zeros(1, device=torch.device("cuda", device)))  # type: ignore[no-untyped-call]
        known = _read_counter(arguments) == 1
        if known:
            _write_counter(arguments, 0)
    except (OSError, AttributeError, struct.error):
        return False
    return known


@cache
def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
