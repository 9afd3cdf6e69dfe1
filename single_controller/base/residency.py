"""Which roles of a process are on its device: models and optimizers moved off it and back.

When a role is called is the host's matter.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from single_controller.device import CPU

__all__ = ["Turns", "move"]


def move(owner: object, device: Any) -> None:
    """Move the modules and optimizers among an object's attributes to a device, in place.

    Parameters keep their identity, so optimizers and `DistributedDataParallel` stay valid; a
    module of FSDP2 gives up its gathered parameters first. Memory that is free afterwards goes
    back to the device.

    Args:
        owner: usually a worker. Attributes that are lists, tuples or dicts of modules count too,
            and so do the attributes of objects that it holds, such as an engine's, one level deep.
        device: a `torch.device` or its name.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    device = torch.device(device)
    for value in _held(vars(owner), torch.nn.Module):
        if isinstance(value, torch.nn.Module):
            for part in value.modules():
                reshard = getattr(part, "reshard", None)
                if callable(reshard):
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


def _held(value: Any, module: type) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _held(item, module)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _held(item, module)
    else:
        yield value
        # A module moves whole, and another role has turns of its own.
        if not isinstance(value, (module, type)) and not hasattr(type(value), "takes_turns"):
            yield from getattr(value, "__dict__", {}).values()


class Turns:
    """Of the roles of a process that take turns, at most one is on the device at a time."""

    def __init__(self) -> None:
        self._workers: dict[str, Any] = {}
        self._resident: str | None = None

    def add(self, role: str, worker: Any) -> None:
        """Take note of a role that was just built, and off the device if it takes turns."""
        if worker.takes_turns:
            self._workers[role] = worker
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
