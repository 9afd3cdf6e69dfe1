"""Waiting for ranks and resources in one call of Ray's, while `progress` says what is not ready."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from single_controller.base.progress import waiting
from single_controller.errors import GroupBrokenError

__all__ = ["GONE", "arrived", "countable", "get", "missing", "placed", "session"]

GONE = (
    "Ray was shut down in this process, and this is of the time before: ray.init(), and make a new "
    "group; detached ones can be attached to again"
)

_MOST_NAMED = 8
_LONGEST_S = 1e9
_LOOK_S = 1.0  # how often an `await` looks whether Ray is still there


def session() -> tuple[str, str] | None:
    """Which `ray.init()` this is, by node and job; None without one. Nearly all of Ray's functions
    would start it where it is not: whatever was made in a session asks this before it uses any.
    """
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def countable(timeout_s: float | None) -> float | None:
    """The same for Ray, which cannot count for ever: None from 30 years on."""
    return None if timeout_s is None or timeout_s > _LONGEST_S else timeout_s


def get(refs: Sequence[Any], timeout_s: float | None, what: str, ranks: Sequence[int]) -> list[Any]:
    """`ray.get(refs, timeout=timeout_s)`; the references are of `ranks`, which do `what`.

    Raises:
        GroupBrokenError: Ray was shut down.
    """
    refs = list(refs)
    if not ray.is_initialized():
        raise GroupBrokenError(GONE)
    with waiting(lambda: _standing(refs, what, ranks)):
        return list(ray.get(refs, timeout=countable(timeout_s)))


async def arrived(
    refs: Sequence[Any], timeout_s: float | None, what: str, ranks: Sequence[int]
) -> bool:
    """Wait on the running event loop until all are here, one has failed, or the time is up;
    whether all are here. No thread waits.
    """
    loop, left = asyncio.get_running_loop(), len(refs)
    well: asyncio.Future[bool] = loop.create_future()

    def note(failed: bool) -> None:
        nonlocal left
        left -= 1
        if (failed or not left) and not well.done():
            well.set_result(not failed)

    def tell(future: Future[Any]) -> None:  # in a thread of Ray's
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(note, future.exception() is not None)

    # The values are left: to read them as they are to be read, `get` has to.
    for ref in refs:
        ref.future().add_done_callback(tell)
    deadline = time.monotonic() + (_LONGEST_S if timeout_s is None else timeout_s)
    with waiting(lambda: _standing(list(refs), what, ranks)):
        while not well.done() and ray.is_initialized():
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                break
            await asyncio.wait([well], timeout=min(seconds, _LOOK_S))
    return well.done() and well.result()


def missing(refs: Sequence[Any], timeout_s: float, what: str) -> list[int]:
    """The ranks, whose references these are in order, that are not ready within `timeout_s`."""
    refs, ranks = list(refs), range(len(refs))
    with waiting(lambda: _standing(refs, what, ranks)):
        return _awaited(refs, ranks, timeout_s)


def placed(group: PlacementGroup, timeout_s: float, what: str) -> bool:
    """Whether a placement group has its resources within `timeout_s`."""
    with waiting(lambda: what):
        return bool(group.wait(timeout_s))


def _awaited(refs: list[Any], ranks: Sequence[int], seconds: float | None) -> list[int]:
    _, pending = ray.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)
    left = set(pending)
    return [rank for rank, ref in zip(ranks, refs, strict=True) if ref in left]


def _standing(refs: list[Any], what: str, ranks: Sequence[int]) -> str:
    if not ray.is_initialized():
        raise GroupBrokenError(GONE)
    left = _awaited(refs, ranks, 0)
    named = ", ".join(map(str, left[:_MOST_NAMED])) + (" …" if len(left) > _MOST_NAMED else "")
    waits = f", waiting for {named}" if left else ""
    return f"{what}: {len(refs) - len(left)} of {len(refs)} ranks ready{waits}"
