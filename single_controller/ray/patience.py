"""Waiting for ranks and resources, with a line on a terminal that says what is not ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup

from single_controller.base.progress import patiently

__all__ = ["countable", "get", "missing", "placed"]

_MOST_NAMED = 8
_LONGEST_S = 1e9


def countable(timeout_s: float | None) -> float | None:
    """The same for Ray, which cannot count for ever: None from 30 years on."""
    return None if timeout_s is None or timeout_s > _LONGEST_S else timeout_s


def get(refs: Sequence[Any], timeout_s: float | None, what: str, ranks: Sequence[int]) -> list[Any]:
    """`ray.get(refs, timeout=timeout_s)`; the references are of `ranks`, which do `what`."""
    refs = list(refs)

    def attempt(seconds: float | None) -> list[Any]:
        return list(ray.get(refs, timeout=seconds))

    limit = countable(timeout_s)
    return patiently(attempt, GetTimeoutError, limit, lambda: _standing(refs, what, ranks))


def missing(refs: Sequence[Any], timeout_s: float, what: str) -> list[int]:
    """The ranks, whose references these are in order, that are not ready within `timeout_s`."""
    refs, ranks = list(refs), range(len(refs))

    def attempt(seconds: float | None) -> list[int]:
        left = _awaited(refs, ranks, seconds)
        if left:
            raise TimeoutError
        return left

    try:
        return patiently(attempt, TimeoutError, timeout_s, lambda: _standing(refs, what, ranks))
    except TimeoutError:
        return _awaited(refs, ranks, 0)


def placed(group: PlacementGroup, timeout_s: float, what: str) -> bool:
    """Whether a placement group has its resources within `timeout_s`."""

    def attempt(seconds: float | None) -> bool:
        if not group.wait(timeout_s if seconds is None else seconds):
            raise TimeoutError
        return True

    try:
        return patiently(attempt, TimeoutError, timeout_s, lambda: what)
    except TimeoutError:
        return False


def _awaited(refs: list[Any], ranks: Sequence[int], seconds: float | None) -> list[int]:
    _, pending = ray.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)
    left = set(pending)
    return [rank for rank, ref in zip(ranks, refs, strict=True) if ref in left]


def _standing(refs: list[Any], what: str, ranks: Sequence[int]) -> str:
    left = _awaited(refs, ranks, 0)
    named = ", ".join(map(str, left[:_MOST_NAMED])) + (" …" if len(left) > _MOST_NAMED else "")
    waits = f", waiting for {named}" if left else ""
    return f"{what}: {len(refs) - len(left)} of {len(refs)} ranks ready{waits}"
