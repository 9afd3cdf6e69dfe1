"""Plain operations on dense tensors that torch does in more time or keeps more alive than needed;
what a column is, is left to `columns`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["cat", "deepcopy", "detached", "is_plain"]

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


def deepcopy(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """`copy.deepcopy` without autograd's graph: it refuses the tensors that autograd computed,
    and nested ones of strided layout.
    """
    memo = {} if memo is None else memo
    inside, seen = [value], set[int]()
    while inside:
        one = inside.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            refused = not one.is_leaf or (one.is_nested and one.layout is torch.strided)
            if refused and id(one) not in memo:
                memo[id(one)] = one.detach().clone().requires_grad_(one.requires_grad)
        elif isinstance(one, dict):
            inside += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            inside += one
        elif isinstance(one, np.ndarray) and one.dtype.kind == "O":
            inside += one.flat
        elif not isinstance(one, type):
            inside += getattr(one, "__dict__", {}).values()
    return copy.deepcopy(value, memo)


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is one block of numbers in memory (not sparse, meta, distributed, ...)."""
    return (
        value.layout is torch.strided
        and value.device.type != "meta"
        and not value.is_quantized
        and type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    )
