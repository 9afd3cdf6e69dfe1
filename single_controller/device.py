"""The one table of what differs between kinds of device, and roles that take turns on a device.

What CUDA alone can do names it: lending memory, in `protocol`, and telling devices apart.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CPU",
    "DEVICE_KINDS",
    "DeviceKind",
    "Turns",
    "device_kind",
    "get_device_id",
    "get_device_name",
    "get_nccl_backend",
    "get_resource_name",
    "get_torch_device",
    "get_visible_devices_keyword",
    "is_device_available",
    "move",
]


@dataclass(frozen=True)
class DeviceKind:
    """What differs between kinds of device.

    `name` is torch's, `resource` is Ray's, `visible` the environment variable that selects
    devices, `backend` the collective backend, `files` the pattern of the device files of a
    machine, `lends` whether processes can map each other's memory.
    """

    name: str
    resource: str
    visible: str
    backend: str
    files: str = ""
    lends: bool = False

    def is_available(self) -> bool:
        """Whether torch sees a device of this kind in this process."""
        import torch

        module = getattr(torch, self.name, None)  # torch loads the package that adds a kind
        return module is not None and bool(module.is_available())


CPU = DeviceKind("cpu", "CPU", "", "gloo")
DEVICE_KINDS = (
    DeviceKind("cuda", "GPU", "CUDA_VISIBLE_DEVICES", "nccl", "/dev/nvidia[0-9]*", lends=True),
    DeviceKind("npu", "NPU", "ASCEND_RT_VISIBLE_DEVICES", "hccl", "/dev/davinci[0-9]*"),
    DeviceKind("xpu", "GPU", "ONEAPI_DEVICE_SELECTOR", "xccl"),
    CPU,
)


def device_kind(name: str | None = None) -> DeviceKind:
    """The kind with torch's `name` ("cuda", also "cuda:1"); by default what this process has.

    Raises:
        ValueError: no such kind.
    """
    if name is None:
        return next(kind for kind in DEVICE_KINDS if kind.is_available())
    known = {kind.name: kind for kind in DEVICE_KINDS}
    if name.split(":")[0] not in known:
        raise ValueError(f"device_name must be one of {', '.join(known)}; got {name!r}")
    return known[name.split(":")[0]]


def get_device_name() -> str:
    """Torch's name of this process's kind of device: "cuda", "npu", "xpu" or "cpu"."""
    return device_kind().name


def get_torch_device() -> Any:
    """Torch's module for this process's devices, such as `torch.cuda` (or `torch.cpu`)."""
    import torch

    return getattr(torch, get_device_name())


def get_device_id() -> int | str:
    """The current device, as tensors' `to` takes it: its index among those that this process sees,
    or "cpu".
    """
    current: int | str = get_torch_device().current_device()
    return current


def get_nccl_backend() -> str:
    """The `torch.distributed` backend for this process's devices; gloo without accelerator."""
    return device_kind().backend


def get_resource_name() -> str:
    """What Ray calls this process's kind of device: "GPU", "NPU" or "CPU"."""
    return device_kind().resource


def get_visible_devices_keyword() -> str:
    """The environment variable that selects devices; without an accelerator CUDA's, as in veRL."""
    return device_kind().visible or DEVICE_KINDS[0].visible


def is_device_available() -> bool:
    """Whether this process sees an accelerator."""
    return device_kind() is not CPU


def move(owner: object, device: Any) -> None:
    """Move the modules and optimizers among an object's attributes to a device, in place.

    Parameters keep their identity, so optimizers and `DistributedDataParallel` stay valid; a
    module of FSDP2 gives up its gathered parameters first. Memory that is free afterwards goes
    back to the device.

    Args:
        owner: usually a worker.
        device: a `torch.device` or its name.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    device = torch.device(device)
    for value in vars(owner).values():
        if isinstance(value, torch.nn.Module):
            for part in value.modules():
                if callable(reshard := getattr(part, "reshard", None)):
                    reshard()
            value.to(device)
        elif isinstance(value, torch.optim.Optimizer):
            for state in value.state.values():
                for key, entry in state.items():
                    if isinstance(entry, torch.Tensor) and entry.dim():
                        state[key] = entry.to(device)
    if device.type == CPU.name:
        gc.collect()
        for kind in {torch.accelerator.current_accelerator()} - {None}:
            getattr(torch, kind.type).empty_cache()


class Turns:
    """Of the roles of a process that take turns, at most one is on the device at a time."""

    def __init__(self) -> None:
        self._workers: dict[str, Any] = {}
        self.any = False  # where none does, nobody needs to ask
        self._resident: str | None = None

    def add(self, role: str, worker: Any) -> None:
        """Take note of a role that was just built, and off the device if it takes turns."""
        if worker.takes_turns:
            self._workers[role], self.any = worker, True
            worker.offload()

    def take(self, role: str) -> None:
        """Bring a role to the device, after the one that was there has left it.

        If `onload` raises, such as for want of memory, no role counts as being there.
        """
        if role == self._resident or role not in self._workers:
            return
        if self._resident is not None:
            self._workers[self._resident].offload()
            self._resident = None
        self._workers[role].onload()
        self._resident = role
