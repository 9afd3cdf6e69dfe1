"""What a node looks like from inside, seen by an actor on it; judging it is left to `doctor`."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import ray

from single_controller.device import DEVICE_KINDS

__all__ = ["PACKAGES", "NodeProbe", "NodeReport"]

PACKAGES = ("ray", "torch", "tensordict", "numpy", "safetensors")
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class NodeReport:
    """One node. Memory is in bytes, `devices` counts device files by Ray's resource name, `clock`
    is in seconds since the epoch, `disk` is the one of `session`, where Ray writes what it cannot
    keep in memory.
    """

    versions: Mapping[str, str]
    shm_total: int
    shm_free: int
    devices: Mapping[str, int]
    open_files: int
    clock: float
    session: str
    disk_total: int
    disk_free: int


class NodeProbe:
    """Looks around on its node, and tries connections to others."""

    def look(self) -> NodeReport:
        """This node, now."""
        shared = shutil.disk_usage(_SHARED_MEMORY) if os.path.isdir(_SHARED_MEMORY) else None
        session = _session()
        disk = shutil.disk_usage(session)
        counts = {k.resource: len(glob.glob(k.files)) for k in DEVICE_KINDS if k.files}
        return NodeReport(
            versions=_versions(),
            shm_total=shared.total if shared else 0,
            shm_free=shared.free if shared else 0,
            devices={name: count for name, count in counts.items() if count},
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            clock=time.time(),
            session=session,
            disk_total=disk.total,
            disk_free=disk.free,
        )

    def clock(self) -> float:
        """Seconds since the epoch on this node."""
        return time.time()

    def listen(self) -> int:
        """A port on which this process takes connections from now on."""
        self._socket = socket.socket()
        self._socket.bind(("", 0))
        self._socket.listen(1024)
        return int(self._socket.getsockname()[1])

    def unreachable(
        self, addresses: Sequence[tuple[str, int]], timeout_s: float = 3
    ) -> list[tuple[str, str]]:
        """Those (ip, port) that do not take a connection from here: their ip, and why."""
        failed = []
        for address in addresses:
            try:
                with contextlib.closing(socket.create_connection(address, timeout_s)):
                    pass
            except OSError as error:
                failed.append((address[0], str(error)))
        return failed

    def size(self, array: Any) -> int:
        """Bytes of an array that came through the object store."""
        return int(array.nbytes)


def _session() -> str:
    """Ray's folder for this node's logs and spilled objects."""
    node: Any = ray._private.worker._global_node  # pyright: ignore[reportAttributeAccessIssue]
    return str(node.get_session_dir_path()) if node else tempfile.gettempdir()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
