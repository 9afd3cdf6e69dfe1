"""Plain operations on dense tensors that torch does in more time or keeps more alive than needed;
what a column is, is left to `columns`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["cat", "detached"]

_LARGE = 1 << 22  # bytes from which numpy asks for large pages


def cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """`torch.cat` into memory that numpy allocates: it asks the kernel for large pages, without
    which most of the time goes into page faults.
    """
    first = tensors[0]
    large = sum(tensor.nbytes for tensor in tensors) >= _LARGE
    if not large or first.device.type != "cpu" or any(t.requires_grad for t in tensors):
        return torch.cat(list(tensors), dim)
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    out = torch.from_numpy(np.empty(math.prod(shape) * first.element_size(), np.uint8))
    return torch.cat(list(tensors), dim, out=out.view(first.dtype).view(shape))


def detached(value: Any) -> Any:
    """A tensor in the same memory that autograd knows no history of; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)
