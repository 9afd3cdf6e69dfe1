"""What a batch looks like, in words: keys, kinds, shapes and differences; never all of its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from protocol import columns
from protocol.checks import short
from protocol.columns import Column

__all__ = ["data_info", "diff", "difference", "eq_note", "overview"]


def overview(
    name: str,
    rows: int,
    tensors: Mapping[Any, Column],
    arrays: Mapping[str, Column],
    meta_info: Mapping[str, Any],
) -> str:
    """A repr: rows, the kind and shape of each column, and meta_info cut short."""
    lines = [f"{name}(rows={rows}"]
    for title, part in (("batch", tensors), ("non_tensor_batch", arrays)):
        lines += [f"  {title}[{key!r}]: {columns.describe(part[key])}" for key in part]
    lines += [f"  meta_info[{key!r}]: {short(value)}" for key, value in meta_info.items()]
    return "\n".join(lines) + ("\n)" if len(lines) > 1 else ")")


def data_info(
    tensors: Mapping[Any, torch.Tensor], arrays: Mapping[str, Column], meta_info: Mapping[str, Any]
) -> str:
    """The text of `DataProto.get_data_info`."""
    lines = ["batch"]
    for key, tensor in tensors.items():
        lines.append(f"  {key}: {tuple(tensor.shape)} ({tensor.dtype}) {tensor.device}")
    lines.append("non_tensor_batch")
    for key, array in arrays.items():
        lines.append(f"  {key}: ndarray{array.shape} ({array.dtype})")
    lines.append("meta_info")
    lines += [f"  {key}: {_kind(value)}" for key, value in meta_info.items()]
    return "\n".join(lines)


def _kind(value: object) -> str:
    """`list[int]`, `dict[str: float]`, `ndarray(2,) (int64)` or the name of the type."""
    name = type(value).__name__
    if isinstance(value, list):
        return f"list[{_kind(value[0])}]" if value else "list"
    if isinstance(value, tuple):
        return f"tuple({', '.join(map(_kind, value))})"
    if isinstance(value, dict) and value:
        key, item = next(iter(value.items()))
        return f"dict[{_kind(key)}: {_kind(item)}]"
    if isinstance(value, np.ndarray):
        return f"ndarray{value.shape} ({value.dtype})"
    return name


def diff(part: str, a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[str]:
    """One line for each key under which two dicts differ."""
    lines = [f"{part}[{key!r}]: only here" for key in a if key not in b]
    lines += [f"{part}[{key!r}]: only there" for key in b if key not in a]
    for key, value in a.items():
        if key in b and not columns.equal(value, b[key]):
            lines.append(f"{part}[{key!r}]: {difference(value, b[key])}")
    return lines


def difference(a: object, b: object) -> str:
    """How two unequal values differ, in one line: their kinds, or the first row that differs."""
    if not isinstance(a, (torch.Tensor, np.ndarray)) or not isinstance(b, type(a)):
        return f"{short(a)} here, {short(b)} there{eq_note(a)}"
    if columns.describe(a) != columns.describe(b) or a.ndim == 0 or not _has_rows(a):
        return f"{columns.describe(a)} here, {columns.describe(b)} there"
    differ = [
        i for i in range(columns.rows(a)) if not columns.equal(*(columns.row(c, i) for c in (a, b)))
    ]
    if not differ:
        return f"same rows of {columns.describe(a)}, laid out differently"
    row, count = differ[0], f"{len(differ)} of {columns.rows(a)} rows differ"
    x, y = (_flat(columns.row(column, row)) for column in (a, b))
    for i, (here, there) in enumerate(zip(x, y, strict=False)):
        if not columns.equal(here, there):
            at = f"row {row}" if len(x) == 1 else f"row {row} element {i}"
            values = f"{short(here, 40)} here, {short(there, 40)} there"
            return f"{count}, first {at}: {values}{eq_note(here)}"
    return f"{count}, first row {row}: {len(x)} elements here, {len(y)} there"


def _has_rows(value: Any) -> bool:
    return isinstance(value, np.ndarray) or value.layout in (torch.strided, torch.jagged)


def eq_note(value: object) -> str:
    """What to add where values differ and equality means little: the class of one has no `__eq__`,
    and what pickle would save of it differs, or cannot be pickled.
    """
    inside, seen = [value], set()
    while inside:
        one = inside.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            inside += one.values()
        elif isinstance(one, (list, tuple)):
            inside += one
        elif columns.lacks_eq(one) and one is not None:
            name = type(one).__qualname__
            return (
                f" ({name} has no __eq__, and is not the same object or saved as the same pickle)"
            )
    return ""


def _flat(row: Any) -> list[Any]:
    """The elements of one row; an object is one element."""
    if isinstance(row, torch.Tensor):
        return row.flatten().tolist()
    return row.ravel().tolist() if isinstance(row, np.ndarray) else [row]
