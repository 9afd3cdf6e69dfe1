"""What went wrong with a call, on which rank, and whether the other ranks are still busy.

Waiting and marking the group is left to `calls` and `hosts`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayTaskError,
    WorkerCrashedError,
)

from single_controller.errors import WorkerDiedError, WorkerError
from single_controller.ray.host import CallDroppedError

__all__ = ["CallSite", "Diagnosis", "diagnose", "translate"]

_GRACE_S = 1.0  # how long the other ranks of a failed call get to finish


@dataclass(frozen=True)
class CallSite:
    """Where a call runs."""

    role: str
    method: str
    rank: int
    node_ip: str
    pid: int


@dataclass(frozen=True)
class Diagnosis:
    """The first cause of a failed call, and the ranks that had not finished a moment later."""

    error: Exception
    died: bool
    running: tuple[tuple[int, Any], ...]


def translate(error: Exception, site: CallSite) -> Exception:
    """The error to raise on the driver for what Ray raised about a call."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, WorkerError):
        return cause
    if isinstance(cause, CallDroppedError):
        return CancelledError(f"{site.role}.{site.method} was cancelled on rank {site.rank}")
    where: dict[str, Any] = {**vars(site), "remote_traceback": str(error), "when": time.time()}
    if isinstance(error, ActorDiedError | ActorUnavailableError | WorkerCrashedError):
        return WorkerDiedError(
            f"{site.role}.{site.method}: rank {site.rank} (node {site.node_ip}, pid {site.pid}) "
            "died or cannot be reached",
            **where,
        )
    return WorkerError.wrap(cause if isinstance(cause, Exception) else error, **where)


def diagnose(error: Exception, refs: Sequence[Any], sites: Sequence[CallSite]) -> Diagnosis:
    """Why a call failed, from every rank that has finished within a grace period.

    A death counts before an exception, an earlier exception before a later one: peers fail
    because of the first cause, usually with a broken connection.
    """
    _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=_GRACE_S, fetch_local=False)
    errors: list[Exception] = []
    for ref, site in zip(refs, sites, strict=True):
        if ref not in pending:
            try:
                ray.get(ref, timeout=0)
            except Exception as failed:
                errors.append(translate(failed, site))
    if not errors:
        errors = [translate(error, sites[0])]
    first = min(errors, key=_order)
    if isinstance(first, WorkerError):
        first.failed_ranks = len(errors)
    running = tuple(
        (site.rank, ref) for ref, site in zip(refs, sites, strict=True) if ref in pending
    )
    return Diagnosis(first, any(isinstance(e, WorkerDiedError) for e in errors), running)


def _order(error: Exception) -> tuple[bool, float]:
    return not isinstance(error, WorkerDiedError), getattr(error, "when", float("inf"))
