"""Bytes that leave a device, by way of a few pinned buffers: a plain copy into fresh memory waits
for every page and was measured ten times slower. Everything else about a tensor is left to others.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

__all__ = ["to_host"]

_CHUNK = 16 << 20  # bytes; smaller tensors go the plain way
_BUFFERS = 4  # copies under way at a time

_lock = threading.Lock()


def to_host(flat: torch.Tensor) -> torch.Tensor:
    """A flat uint8 tensor as pageable CPU memory; itself if it is there already."""
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

    def fill(chunk: int) -> None:
        at = chunk % len(buffers)
        buffers[at][: len(sources[chunk])].copy_(sources[chunk], non_blocking=True)
        filled[at].record(stream)

    for chunk in range(min(len(buffers), len(sources))):
        fill(chunk)
    for chunk, target in enumerate(targets):
        at = chunk % len(buffers)
        filled[at].synchronize()
        target.copy_(buffers[at][: len(target)])
        if chunk + len(buffers) < len(sources):
            fill(chunk + len(buffers))
    return whole
