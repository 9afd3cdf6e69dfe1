"""Which rows an index names, and numbers that callers give as lists, arrays or tensors. Taking the
rows is left to `columns`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from numbers import Number
from typing import Any, TypeAlias

import numpy as np
import torch

from protocol.errors import BatchTypeError, RowIndexError

__all__ = ["Index", "are_whole", "normalize_index", "numbers"]

Index: TypeAlias = "slice | Sequence[int] | Sequence[bool] | np.ndarray[Any, Any] | torch.Tensor"


def normalize_index(index: Index, rows: int) -> torch.Tensor | slice:
    """Any index that selects several rows, as a slice or as int64 positions; both not negative.

    Raises:
        BatchTypeError: not a slice, list, ndarray, or tensor of integers or booleans.
        RowIndexError: a row that is not there, or a mask of another length.
    """
    if isinstance(index, slice):
        try:
            start, stop, step = index.indices(rows)
        except (TypeError, ValueError) as error:
            raise BatchTypeError(f"{index!r:.80} cannot slice rows: {error}") from None
        if step < 0:
            return torch.arange(rows)[np.arange(start, stop, step)]
        return slice(start, max(start, stop), step)
    if not isinstance(index, (list, np.ndarray, torch.Tensor)):
        raise BatchTypeError(
            f"Indexing with {type(index)} is not supported: rows are selected by an int, slice, "
            f"list, ndarray or tensor; got {index!r:.80}"
            + (f". A column is batch.batch[{index!r}]" if isinstance(index, str) else "")
        )
    at = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        at = index if isinstance(index, torch.Tensor) else torch.from_numpy(np.array(index))
    if at is None or at.is_nested or at.dim() != 1:
        shape = "" if at is None or at.is_nested else f", which has shape {tuple(at.shape)}"
        raise BatchTypeError(_wanted(index) + shape)
    if at.numel() == 0 and at.dtype != torch.bool:
        return torch.empty(0, dtype=torch.int64)
    # A uint8 tensor is refused: torch reads it as a mask, numpy as positions.
    if at.is_floating_point() or at.is_complex() or at.dtype == torch.uint8:
        raise BatchTypeError(f"{_wanted(index)} ({at.dtype}; make a mask with .bool())")
    if at.dtype == torch.bool:
        if len(at) != rows:
            raise RowIndexError(f"a mask needs one entry per row: {rows} rows, {len(at)} entries")
        return at.nonzero().flatten()
    at = at.to(torch.int64)
    bad = at[(at < -rows) | (at >= rows)]
    if len(bad):
        raise RowIndexError(f"index {int(bad[0])} is out of range for a batch of {rows} rows")
    return torch.where(at < 0, at + rows, at)


def _wanted(index: object) -> str:
    return f"an index must be one list of integers or booleans; got {index!r:.200}"


def are_whole(tensor: torch.Tensor) -> bool:
    """Whether the dtype is one of whole numbers, so not bool."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _is_complex(values: Any) -> bool:
    return bool(
        values.is_complex() if isinstance(values, torch.Tensor) else np.iscomplexobj(values)
    )


def numbers(name: str, values: object, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A list, tuple, array or tensor of numbers as a dense tensor on the CPU.

    Raises:
        BatchTypeError: it is something else, or holds something else.
    """
    fits = isinstance(values, np.ndarray) or (
        isinstance(values, torch.Tensor) and not values.is_nested
    )
    if isinstance(values, (list, tuple)):  # torch crashes on lists of some nested tensors
        fits = all(map(_is_number, values))
    if fits and not _is_complex(values):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            return torch.as_tensor(values, dtype=dtype, device="cpu")
    raise BatchTypeError(
        f"{name} must be a list, array or tensor of numbers; got {type(values).__name__} "
        f"{values!r:.80}"
    )


def _is_number(value: object) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim == 0
    return isinstance(value, (Number, np.generic))
