"""Which rows go where: mini-batches in the order that a DataLoader chooses, and rows spread by
weight. Cutting a batch accordingly is left to its own methods."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from protocol import checks
from protocol.errors import BatchError

__all__ = ["balance", "mini_batches"]


def mini_batches(
    rows: int, size: int, epochs: int, seed: int | None, options: Mapping[str, Any] | None
) -> Iterator[torch.Tensor]:
    """The row numbers of each mini-batch; the same as veRL's for the same seed and options.

    Raises:
        BatchError: the rows do not divide by `size` and `drop_last` is not given, or an option is
            not for the caller to set.
    """
    size = checks.count("mini_batch_size", size, least=1)
    epochs = checks.count("epochs", epochs)
    seed = None if seed is None else checks.count("seed", seed, least=None)
    options = checks.mapping("dataloader_kwargs", options)
    taken = {"dataset", "batch_size", "collate_fn", "generator"} & options.keys()
    if taken:
        raise BatchError(
            f"dataloader_kwargs must not have {sorted(taken)}: use mini_batch_size and seed"
        )
    if rows % size and "drop_last" not in options:
        raise BatchError(
            f"{rows} % {size} != 0: mini_batch_size must divide the rows, or pass "
            'dataloader_kwargs={"drop_last": True} to leave the rest out'
        )
    return _mini_batches(rows, size, epochs, seed, options)


def _mini_batches(
    rows: int, size: int, epochs: int, seed: int | None, options: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    if not rows:  # a sampler refuses to shuffle nothing
        return
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    try:
        loader: DataLoader[int] = DataLoader(
            range(rows),  # type: ignore[arg-type]
            batch_size=size,
            collate_fn=torch.tensor,
            generator=generator,
            **options,
        )
        for _ in range(epochs):
            yield from loader
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BatchError(
            f"torch's DataLoader cannot choose mini-batches of {size} from {rows} rows with "
            f"dataloader_kwargs={checks.short(dict(options))}: {error}"
        ) from error


def balance(weights: Sequence[float], parts: int) -> list[list[int]]:
    """Spread positions over parts of about equal weight: heaviest first, each to the lightest part.

    >>> balance([5, 1, 1, 3], 2)
    [[0], [1, 2, 3]]
    """
    lightest = [(0.0, 0, part) for part in range(parts)]  # a heap: weight, count, part
    members: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        weight, count, part = lightest[0]
        members[part].append(i)
        heapq.heapreplace(lightest, (weight + weights[i], count + 1, part))
    return [sorted(part) for part in members]
