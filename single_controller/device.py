"""The one table of what differs between kinds of device. What CUDA alone can do names it: lending
memory (`protocol.ipc`) and telling devices apart.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CPU",
    "DEVICE_KINDS",
    "DeviceKind",
    "device_kind",
    "get_device_id",
    "get_device_name",
    "get_nccl_backend",
    "get_resource_name",
    "get_torch_device",
    "get_visible_devices_keyword",
    "is_device_available",
]


@dataclass(frozen=True)
class DeviceKind:
    """What differs between kinds of device.

    `name` is torch's, `resource` is Ray's, `visible` the environment variable that selects
    devices, `backend` the collective backend, `files` the pattern of the device files of a
    machine, `plugin` the package that adds the kind to torch, `lends` whether processes can map
    each other's memory.
    """

    name: str
    resource: str
    visible: str
    backend: str
    files: str = ""
    plugin: str | None = None
    lends: bool = False

    def is_available(self) -> bool:
        """Whether torch sees a device of this kind in this process."""
        if self.name == "cpu":
            return True
        if self.plugin is not None and importlib.util.find_spec(self.plugin) is None:
            return False
        import torch

        if self.plugin is not None:
            importlib.import_module(self.plugin)
        module = getattr(torch, self.name, None)
        return module is not None and bool(module.is_available())


CPU = DeviceKind("cpu", "CPU", "", "gloo")
DEVICE_KINDS = (
    DeviceKind("cuda", "GPU", "CUDA_VISIBLE_DEVICES", "nccl", "/dev/nvidia[0-9]*", lends=True),
    DeviceKind(
        "npu", "NPU", "ASCEND_RT_VISIBLE_DEVICES", "hccl", "/dev/davinci[0-9]*", plugin="torch_npu"
    ),
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
    for kind in DEVICE_KINDS:
        if kind.name == name.split(":")[0]:
            return kind
    known = ", ".join(kind.name for kind in DEVICE_KINDS)
    raise ValueError(f"device_name must be one of {known}; got {name!r}")


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
