"""Which physical device a rank has, and whose memory it can read. Naming kinds of device is left to
`device`, giving devices to processes to Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from single_controller.device import DeviceKind
from single_controller.errors import ResourceError

__all__ = ["DeviceIdentity", "check_devices", "identify"]


_P2P_READ = 0  # NVML_P2P_CAPS_INDEX_READ, which pynvml has as a tuple that no call takes


@dataclass(frozen=True)
class DeviceIdentity:
    """A device by its UUID, on a node. `peers` are others of the node that it can read."""

    node_id: str
    uuid: str
    peers: frozenset[str] = frozenset()

    def reads(self, other: DeviceIdentity) -> bool:
        """Whether a process on this device can map memory of a process on the other one."""
        return self.node_id == other.node_id and other.uuid in {self.uuid, *self.peers}


def identify(kind: DeviceKind, index: int, node_id: str) -> DeviceIdentity | None:
    """The device that torch calls `kind.name:index` in this process; None if it has no UUID."""
    if not kind.lends:
        return None
    import torch

    module = getattr(torch, kind.name)
    if not module.is_available():
        return None
    uuid = str(module.get_device_properties(index).uuid)
    return DeviceIdentity(node_id, uuid, _peers(uuid))


def _peers(uuid: str) -> frozenset[str]:
    """Asked of the driver, since a process does not see the devices of others."""
    try:
        from ray._private.thirdparty.pynvml import pynvml as nvml
    except ImportError:  # this Ray keeps it elsewhere
        return frozenset()
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        found = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
        return frozenset(
            other
            for other, handle in found.items()
            if other != uuid and uuid in found and _can_read(nvml, found[uuid], handle)
        )
    except nvml.NVMLError:  # no such driver, or one that does not say: then nobody is read
        return frozenset()


def _can_read(nvml: Any, reader: Any, other: Any) -> bool:
    status = nvml.nvmlDeviceGetP2PStatus(reader, other, _P2P_READ)
    return bool(status == nvml.NVML_P2P_STATUS_OK)


def _text(uuid: Any) -> str:
    return (uuid.decode() if isinstance(uuid, bytes) else str(uuid)).removeprefix("GPU-")


def check_devices(devices: Sequence[DeviceIdentity | None], per_process: float) -> None:
    """Raise ResourceError where ranks share a device though each was to have its own.

    Args:
        devices: by rank; None where it is not known.
        per_process: how much of a device each process asked for; less than 1 allows sharing.
    """
    ranks: dict[DeviceIdentity, list[int]] = {}
    for rank, device in enumerate(devices):
        if device is not None:
            ranks.setdefault(device, []).append(rank)
    shared = {device.uuid: there for device, there in ranks.items() if len(there) > 1}
    if shared and per_process >= 1:
        table = "; ".join(f"{uuid}: ranks {there}" for uuid, there in shared.items())
        raise ResourceError(
            f"each rank was to have a device of its own, and some share one ({table}). Variables "
            "such as CUDA_VISIBLE_DEVICES or RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES let them "
            "see the same devices: unset these, or allow sharing with gpus_per_process=0.5"
        )
