"""How many rows each shard gets; cutting a batch accordingly is left to its own methods."""

from __future__ import annotations

from collections.abc import Sequence

from protocol import checks
from protocol.errors import ChunkError, RowCountError

__all__ = ["balanced_sizes", "check_sizes", "equal_sizes", "padded_sizes"]


def equal_sizes(rows: int, parts: int) -> list[int]:
    """`parts` equal sizes that sum to `rows`.

    Raises:
        ChunkError: `rows` does not divide by `parts`, or there is no part.
    """
    parts = _whole(parts)
    if rows % parts:
        raise ChunkError(
            f"only support equal chunk. Got size of DataProto {rows} and chunk {parts}."
        )
    return [rows // parts] * parts


def balanced_sizes(rows: int, parts: int) -> list[int]:
    """`parts` sizes that sum to `rows` and differ by at most one, larger ones first.

    >>> balanced_sizes(5, 3)
    [2, 2, 1]

    Raises:
        ChunkError: there is no part.
    """
    parts = _whole(parts)
    size, larger = divmod(rows, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def padded_sizes(rows: int, parts: int) -> list[int]:
    """`parts` equal sizes, the smallest that together hold `rows`.

    Raises:
        ChunkError: there is no part.
    """
    parts = _whole(parts)
    return [-(-rows // parts)] * parts


def _whole(parts: object) -> int:
    whole = checks.count("chunks", parts, least=None)
    if whole < 1:
        raise ChunkError(f"a batch is split into at least one chunk; got {whole}")
    return whole


def check_sizes(sizes: Sequence[int], rows: int) -> None:
    """Raise RowCountError unless the sizes sum to `rows` and none is negative."""
    if sum(sizes) != rows or min(sizes, default=0) < 0:
        raise RowCountError(f"sizes must sum to {rows} rows; got {list(sizes)}")
