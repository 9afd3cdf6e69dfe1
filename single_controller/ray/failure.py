"""What went wrong with a call, on which rank, and what the other ranks are doing.

Waiting for a call is left to `calls`; what a failure means for the group, to `hosts`.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from single_controller.errors import WorkerDiedError, WorkerError
from single_controller.ray.host import CallDroppedError
from single_controller.ray.nodes import beside
from single_controller.ray.process import ExitWatch, ProcessInfo, read_logs, read_stacks
from single_controller.ray.stacks import collective, readable

__all__ = [
    "CallSite",
    "Diagnosis",
    "diagnose",
    "died",
    "dumps",
    "explain_death",
    "raised",
    "stuck_ranks",
    "translate",
]

_GRACE_S = 0.5  # how long the other ranks of a failed call get to finish, twice
_NODE_S = 3.0  # how long another node may take to answer
_EXIT_S = 1.0  # how long a process that Ray calls dead may take to be gone

_DEATHS = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    WorkerCrashedError,
)


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
    """The first cause of a failed call, and the ranks that had not finished a moment later.

    `stuck` are those of them, with their stacks, that wait in a collective. `own_death`: the cause
    is the death of a rank of this group, not of one elsewhere whose batch it was to read.
    """

    error: Exception
    own_death: bool
    running: tuple[tuple[int, Any], ...]
    stuck: Mapping[int, str] = field(default_factory=dict)


def translate(error: Exception, site: CallSite) -> Exception:
    """The error to raise on the driver for what Ray raised about a call."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, WorkerError):
        return cause
    if isinstance(cause, CallDroppedError):
        return CancelledError(f"{site.role}.{site.method} was cancelled on rank {site.rank}")
    if isinstance(error, _DEATHS):
        return died(site, str(error))
    where: dict[str, Any] = {**vars(site), "remote_traceback": str(error), "when": time.time()}
    return WorkerError.wrap(cause if isinstance(cause, Exception) else error, **where)


def died(site: CallSite, said: str) -> WorkerDiedError:
    """The error to raise for a process that ended, `said` being what Ray knows of it."""
    return WorkerDiedError(
        f"{site.role}.{site.method}: rank {site.rank} (node {site.node_ip}, pid {site.pid}) "
        "died or cannot be reached",
        **vars(site),
        remote_traceback=said,
        when=time.time(),
    )


def diagnose(
    error: Exception,
    refs: Sequence[Any],
    sites: Sequence[CallSite],
    processes: Mapping[int, ProcessInfo],
) -> Diagnosis:
    """Why a call failed, from every rank that has finished within a grace period.

    A death counts before an exception, an earlier exception before a later one: peers fail
    because of the first cause, usually with a broken connection.

    Args:
        processes: of all ranks, where those that do not finish can be looked at.
    """
    pending = _pending(refs, _GRACE_S)
    before: dict[int, str | None] = {}
    if pending:
        before = _collectives(_looked_at(processes, pending, refs, sites))
        pending = _pending(refs, _GRACE_S)
    stuck = _still_stuck(before, _looked_at(processes, pending, refs, sites))
    errors: list[Exception] = []
    for ref, site in zip(refs, sites, strict=True):
        if ref not in pending and (failed := raised(ref)) is not None:
            errors.append(translate(failed, site))
    if not errors:
        errors = [translate(error, sites[0])]
    own = {(process.node_ip, process.pid) for process in processes.values()}
    first = min(errors, key=lambda error: (not _died_in(own, error), *_order(error)))
    if isinstance(first, WorkerError):
        first.failed_ranks = len(errors)
        first.stuck = stuck
    running = tuple(
        (site.rank, ref) for ref, site in zip(refs, sites, strict=True) if ref in pending
    )
    return Diagnosis(first, _died_in(own, first), running, stuck)


def raised(ref: Any) -> Exception | None:
    """What a call that has finished raised. Errors are small, and come to the caller at once: what
    is not here is an output, of another node. One that is here is looked at, and not copied.
    """
    try:
        with read_as("view") if (read_as := _read_as()) else nullcontext():
            ray.get(ref, timeout=0)
    except GetTimeoutError:
        return None
    except Exception as error:
        return error
    return None


def _read_as() -> Any:
    """`protocol.wire.read_as`, where there may be batches."""
    return getattr(sys.modules.get("protocol.wire"), "read_as", None)


def _died_in(own: Container[tuple[str, int]], error: Exception) -> bool:
    return isinstance(error, WorkerDiedError) and (error.node_ip, error.pid) in own


def _order(error: Exception) -> tuple[bool, float]:
    return not isinstance(error, WorkerDiedError), getattr(error, "when", float("inf"))


def _pending(refs: Sequence[Any], timeout_s: float) -> set[Any]:
    _, left = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s, fetch_local=False)
    return set(left)


def _looked_at(
    processes: Mapping[int, ProcessInfo],
    pending: Iterable[Any],
    refs: Sequence[Any],
    sites: Sequence[CallSite],
) -> dict[int, ProcessInfo]:
    ranks = [site.rank for ref, site in zip(refs, sites, strict=True) if ref in pending]
    return {rank: processes[rank] for rank in ranks if rank in processes}


def dumps(processes: Mapping[int, ProcessInfo]) -> dict[int, str]:
    """By rank, what faulthandler says of each process, or why there is nothing."""
    found = beside(read_stacks, list(processes.values()), _NODE_S)
    return {
        rank: text or f"no stack: node {process.node_ip} did not answer"
        for (rank, process), text in zip(processes.items(), found, strict=True)
    }


def stuck_ranks(processes: Mapping[int, ProcessInfo]) -> dict[int, str]:
    """The ranks that wait in a collective, in the same one for half a second; their stacks."""
    before = _collectives(processes)
    if any(before.values()):
        time.sleep(_GRACE_S)
    return _still_stuck(before, processes)


def _collectives(processes: Mapping[int, ProcessInfo]) -> dict[int, str | None]:
    return {rank: collective(dump) for rank, dump in dumps(processes).items()}


def _still_stuck(
    before: Mapping[int, str | None], processes: Mapping[int, ProcessInfo]
) -> dict[int, str]:
    suspects = {
        rank: processes[rank] for rank, found in before.items() if found and rank in processes
    }
    return {
        rank: readable(dump)
        for rank, dump in dumps(suspects).items()
        if collective(dump) == before[rank]
    }


def explain_death(
    error: WorkerDiedError, process: ProcessInfo, watch: ExitWatch | None
) -> WorkerDiedError:
    """The same error with how the process ended, and the last lines that it wrote, unless that
    process has said so itself.
    """
    if error.exit_code is not None:
        return error
    code = watch.exit_code(_EXIT_S) if watch else None
    log = (beside(read_logs, [process], _NODE_S)[0] or "").rstrip()
    if code is None and "temporarily unavailable" in error.remote_traceback:
        return error
    how, code = _ending(error.remote_traceback, log, code)
    where = {**error._where, "exit_code": code, "log_tail": log}
    explained = WorkerDiedError(
        error.args[0].replace("died or cannot be reached", f"died: it {how}"), **where
    )
    explained.failed_ranks, explained.stuck = error.failed_ranks, error.stuck
    return explained


def _ending(said: str, log: str, code: int | None) -> tuple[str, int | None]:
    """How a process ended, from what Ray says, what it wrote, and its code, if that is known."""
    if "low on memory" in said or "memory usage threshold" in said:
        return "was ended by Ray because its node was short of memory", code
    if re.search(r"node (has died|was terminated|died)|Node .* died", said):
        return "was lost with its node", code
    told = re.search(r"exit code (-?\d+)", said)
    if code is None and told and "connection error" not in said:
        code = int(told[1])
    if "SIGTERM" in said:
        return "was ended by signal SIGTERM", code
    if code is not None and code < 0:
        return f"was killed by signal {_signal_name(-code)}", code
    if code is not None:
        return f"exited with code {code}", code
    fatal = re.search(r"\*\*\* (SIG[A-Z]+) received", log)
    if fatal:
        return f"was killed by signal {fatal[1]}", code
    return "ended without a word, as after kill -9, a lack of memory or os._exit", code


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
