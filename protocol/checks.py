"""What a caller may pass, and which rows it names: indices, sizes of shards, mini-batches. A check
returns the argument, or says what it must be and what came."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from protocol.errors import BatchError, BatchTypeError, ChunkError, RowCountError, RowIndexError

__all__ = [
    "Index",
    "balanced_sizes",
    "check_sizes",
    "count",
    "equal_sizes",
    "key_list",
    "list_of",
    "mini_batches",
    "normalize_index",
    "padded",
    "padded_sizes",
    "short",
    "wrong",
]

Index: TypeAlias = "slice | Sequence[int] | Sequence[bool] | np.ndarray[Any, Any] | torch.Tensor"
_T = TypeVar("_T")


def short(value: object, width: int = 80) -> str:
    """The repr of a value on one line, cut to `width` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def wrong(name: str, wanted: str, value: object) -> BatchTypeError:
    return BatchTypeError(f"{name} must be {wanted}; got {type(value).__name__} {short(value)}")


def list_of(kind: type[_T], name: str, values: Iterable[object]) -> list[_T]:
    found = list[_T]()
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise wrong(f"{name}[{i}]", f"of type {kind.__name__}", value)
        found.append(value)
    return found


def count(name: str, value: Any, least: int = 0) -> int:
    """A whole number, also of numpy or torch, as an int that is at least `least`."""
    if (whole := operator.index(value)) < least:
        raise BatchError(f"{name} must be at least {least}; got {whole}")
    return whole


def key_list(name: str, keys: Iterable[Any] | None) -> list[Any]:
    """Keys, each once; none for None. The letters of a single string would be taken for keys."""
    if isinstance(keys, str):
        raise wrong(name, "a list of keys", keys)
    return list(dict.fromkeys(keys or ()))


def normalize_index(index: Index, rows: int) -> torch.Tensor | slice:
    """An index of several rows as a slice, or as int64 positions; both not negative."""
    if isinstance(index, slice):
        start, stop, step = index.indices(rows)
        if step < 0:
            return torch.tensor(range(start, stop, step), dtype=torch.int64)
        return slice(start, max(start, stop), step)
    if not isinstance(index, (list, np.ndarray, torch.Tensor)):
        raise BatchTypeError(
            f"Indexing with {type(index)} is not supported: rows are selected by an int, slice, "
            "list, ndarray or tensor, and a column is batch.batch[key]"
        )
    at = index if isinstance(index, torch.Tensor) else torch.from_numpy(np.array(index))
    # A uint8 tensor is refused: torch reads it as a mask, numpy as positions.
    whole = not at.numel() or not (at.is_floating_point() or at.is_complex())
    if at.dim() != 1 or not whole or at.dtype == torch.uint8:
        raise BatchTypeError(
            "an index must be one list of integers or booleans; got "
            f"{tuple(at.shape)} of {at.dtype}; make a mask with .bool()"
        )
    if at.dtype == torch.bool:
        if len(at) != rows:
            raise RowIndexError(f"a mask needs one entry per row: {rows} rows, {len(at)} entries")
        return at.nonzero().flatten()
    at = at.to(torch.int64)
    bad = at[(at < -rows) | (at >= rows)]
    if len(bad):
        raise RowIndexError(f"index {int(bad[0])} is out of range for a batch of {rows} rows")
    return torch.where(at < 0, at + rows, at)


def _parts(parts: int) -> int:
    if (whole := operator.index(parts)) < 1:
        raise ChunkError(f"a batch is split into at least one chunk; got {whole}")
    return whole


def equal_sizes(rows: int, parts: int) -> list[int]:
    """`parts` equal sizes that sum to `rows`; ChunkError if it does not divide."""
    if rows % (parts := _parts(parts)):
        raise ChunkError(
            f"only support equal chunk. Got size of DataProto {rows} and chunk {parts}."
        )
    return [rows // parts] * parts


def balanced_sizes(rows: int, parts: int) -> list[int]:
    """`parts` sizes that sum to `rows` and differ by at most one, larger ones first."""
    size, larger = divmod(rows, parts := _parts(parts))
    return [size + 1] * larger + [size] * (parts - larger)


def padded_sizes(rows: int, parts: int) -> list[int]:
    """`parts` equal sizes, the smallest that together hold `rows`."""
    parts = _parts(parts)
    return [-(-rows // parts)] * parts


def padded(rows: int, count: int, first: bool = False) -> torch.Tensor:
    """All rows, and the last one `count` more times, or the first."""
    if count < 0 or (count and not rows):
        raise RowCountError(f"a batch of {rows} rows cannot be padded by {count} rows")
    return torch.cat([torch.arange(rows), torch.full((count,), 0 if first else rows - 1)])


def check_sizes(sizes: Sequence[int], rows: int) -> None:
    if sum(sizes) != rows or min(sizes, default=0) < 0:
        raise RowCountError(f"sizes must sum to {rows} rows; got {list(sizes)}")


def mini_batches(
    rows: int, size: int, epochs: int, seed: int | None, options: Mapping[str, Any] | None
) -> Iterator[torch.Tensor]:
    """The row numbers of each mini-batch; the same as veRL's for the same seed and options."""
    size, epochs = count("mini_batch_size", size, least=1), count("epochs", epochs)
    options = options or {}
    if rows % size and "drop_last" not in options:
        raise BatchError(
            f"{rows} % {size} != 0: mini_batch_size must divide the rows, or pass "
            'dataloader_kwargs={"drop_last": True} to leave the rest out'
        )
    if not rows:  # a sampler refuses to shuffle nothing
        return iter(())
    loader: DataLoader[int] = DataLoader(
        range(rows),  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=torch.tensor,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )
    return chain.from_iterable(repeat(loader, epochs))
