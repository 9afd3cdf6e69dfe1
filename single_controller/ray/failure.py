"""Waiting for ranks, and what ended the wait: on which rank a call failed first, why, and what the
other ranks are doing. While a wait is long, a thread logs how things stand.

What a failure means for the group is left to `hosts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from single_controller.errors import (
    GroupBrokenError,
    SingleControllerError,
    WorkerDiedError,
    WorkerError,
)
from single_controller.ray.process import (
    ProcessInfo,
    beside,
    collective,
    read_logs,
    read_stacks,
)

__all__ = [
    "GONE",
    "CallDroppedError",
    "CallSite",
    "StaysError",
    "Wait",
    "all_arrived",
    "diagnose",
    "died",
    "get_all",
    "get_ours",
    "not_ready",
    "note_last_words",
    "ours",
    "own_death",
    "raised",
    "session",
    "shown_seconds",
    "stacks_of",
    "standing",
    "stuck_ranks",
    "translate",
]

_logger = logging.getLogger(__name__)

GONE = (
    "Ray was shut down in this process, and this is of the time before: ray.init(), and make a new "
    "group; detached ones can be attached to again"
)

_MOST_NAMED = 8
_LONGEST_S = 1e9  # Ray cannot count for ever
_LOOK_S = 1.0  # how often an `await` looks whether Ray is still there
_LOG_S = 60.0
_EVERY_S = 0.5
_GRACE_S = 0.5  # how long the other ranks of a failed call get to finish, or to go on, twice
_NODE_S = 3.0  # how long another node may take to answer
_DEATHS = RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError


def session() -> tuple[str, str] | None:
    """Which `ray.init()` this is, by node and job; None without one. Nearly all of Ray's functions
    would start it where it is not: whatever was made in a session asks this before it uses any.
    """
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def shown_seconds(seconds: float | None) -> str:
    """For messages: to the millisecond, without zeros behind."""
    return f"{round(seconds or 0, 3):g}"


# Whether this library reads what Ray has: `Answer`s as such, and not the values, which others get.
# Ray has no way to tell that to what it unpickles.
ours: ContextVar[bool] = ContextVar("ours", default=False)


class StaysError(SingleControllerError, RayError):
    """Somebody asked Ray for a value that stays with its worker."""

    def __init__(self, title: str) -> None:
        super().__init__(
            f"what {title} returned stays with its worker, and Ray does not have it: a method of a "
            "group that is passed the handle gets the value. Unless it is yielded, handle.get() "
            "fetches it, and a task of Ray's that is passed [handle], within a list, can get() it"
        )


def get_all(
    refs: Sequence[Any], timeout_s: float | None, what: str, ranks: Sequence[int]
) -> list[Any]:
    """`ray.get(refs, timeout=timeout_s)`; the references are of `ranks`, which do `what`.

    Raises:
        GroupBrokenError: Ray was shut down.
    """
    refs = list(refs)
    if not ray.is_initialized():
        raise GroupBrokenError(GONE)
    counted = None if timeout_s is None or timeout_s > _LONGEST_S else timeout_s
    with Wait(lambda: standing(refs, what, ranks)):
        return list(get_ours(refs, counted))


def get_ours(refs: Any, timeout_s: float | None) -> Any:
    """What `ray.get` gives; of values of any kind, their `Answer`s."""
    token = ours.set(True)
    try:
        return ray.get(refs, timeout=timeout_s)
    finally:
        ours.reset(token)


async def all_arrived(
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
        failed = not isinstance(future.exception(), StaysError | None)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(note, failed)

    # The values are left: to read them as they are to be read, `get` has to.
    for ref in refs:
        ref.future().add_done_callback(tell)
    deadline = time.monotonic() + (_LONGEST_S if timeout_s is None else timeout_s)
    with Wait(lambda: standing(refs, what, ranks)):
        while not well.done() and ray.is_initialized():
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                break
            await asyncio.wait([well], timeout=min(seconds, _LOOK_S))
    return well.done() and well.result()


def not_ready(refs: Sequence[Any], timeout_s: float) -> list[int]:
    """Which of the references, by their places, are not ready within `timeout_s`."""
    left = _pending(refs, timeout_s)
    return [i for i, ref in enumerate(refs) if ref in left]


def _pending(refs: Sequence[Any], timeout_s: float) -> set[Any]:
    _, left = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s, fetch_local=False)
    return set(left)


def standing(refs: Sequence[Any], what: str, ranks: Sequence[int]) -> str:
    """How things stand where `ranks`, whose references these are, do `what`."""
    if not ray.is_initialized():
        raise GroupBrokenError(GONE)
    pending = _pending(refs, 0)
    left = [str(rank) for rank, ref in zip(ranks, refs, strict=True) if ref in pending]
    named = ", ".join([*left[:_MOST_NAMED], "…"] if len(left) > _MOST_NAMED else left)
    waits = f", waiting for {named}" if left else ""
    return f"{what}: {len(refs) - len(left)} of {len(refs)} ranks ready{waits}"


class Wait:
    """Within this context something is waited for. After a minute, then after two, four, eight …, a
    thread logs how things stand: it asks `tell`, and what that raises says that there is nothing
    to say.
    """

    def __init__(self, tell: Callable[[], str]) -> None:
        self._tell, self._began, self._log_s = tell, time.monotonic(), _LOG_S

    def __enter__(self) -> None:
        global _started
        with _lock:
            _waits.add(self)
            if not _started:
                threading.Thread(target=_watch, daemon=True, name="waiting").start()
                _started = True

    def __exit__(self, *_: object) -> None:
        with _lock:
            _waits.discard(self)
        self._tell = str  # what it asks is let go of here: in that thread, Ray may be ending

    def look(self) -> None:
        """Log what is due."""
        seconds = time.monotonic() - self._began
        if seconds < self._log_s:
            return
        self._log_s = 2 * seconds
        with contextlib.suppress(Exception):  # what it asks is gone
            if standing := self._tell():
                _logger.warning("still waiting after %.0f s: %s", seconds, standing)


_lock = threading.Lock()
_started = False
_waits: weakref.WeakSet[Wait] = weakref.WeakSet()  # one that was interrupted is gone of itself


def _watch() -> None:
    pause = threading.Event()
    while not pause.wait(_EVERY_S):
        with _lock:
            waits = [*_waits]
        while waits:  # none is held on to until the next look
            waits.pop().look()


class CallDroppedError(Exception):
    """The caller cancelled a call before its turn came."""


@dataclass(frozen=True)
class CallSite:
    """Where a call runs."""

    role: str
    method: str
    rank: int
    node_ip: str
    pid: int


def translate(error: Exception, site: CallSite) -> Exception:
    """The error to raise on the driver for what Ray raised about a call."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, WorkerError):
        return cause
    at = site.node_ip, site.pid
    if isinstance(cause, WorkerDiedError) and (cause.node_ip, cause.pid) == at:
        cause.rank = site.rank  # as this group numbers it
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


def note_last_words(death: WorkerDiedError, process: ProcessInfo) -> None:
    """Have the error show the last lines that the process wrote; one that asked for its end has
    said so itself.
    """
    if death.exit_code is None:
        death.log_tail = beside(read_logs, [process], _NODE_S)[0] or ""


def own_death(error: Exception, processes: Mapping[int, ProcessInfo]) -> TypeGuard[WorkerDiedError]:
    """Whether it is the death of one of these, by rank, and not of one whose batch they read."""
    if not isinstance(error, WorkerDiedError) or (own := processes.get(error.rank)) is None:
        return False
    return (error.node_ip, error.pid) == (own.node_ip, own.pid)


def diagnose(
    error: Exception,
    refs: Sequence[Any],
    sites: Sequence[CallSite],
    processes: Mapping[int, ProcessInfo],
) -> Exception:
    """The first cause of a failed call, from every rank that has finished within a grace period;
    ranks that wait in a collective are its `stuck`.

    A death counts before an exception, an earlier exception before a later one: peers fail
    because of the first cause, usually with a broken connection.

    Args:
        processes: of all ranks, where those that do not finish can be looked at.
    """
    at = dict(zip(refs, sites, strict=True))
    stuck: dict[int, str] = {}
    if pending := _pending(refs, _GRACE_S):
        ranks = {at[ref].rank for ref in pending} & processes.keys()
        stuck = stuck_ranks({rank: processes[rank] for rank in sorted(ranks)})
        pending = _pending(refs, 0 if stuck else _GRACE_S)
    failed = {ref: raised(ref) for ref in at if ref not in pending}
    errors = [translate(found, at[ref]) for ref, found in failed.items() if found is not None]
    first = min(
        errors or [translate(error, sites[0])],
        key=lambda error: (
            not own_death(error, processes),
            not isinstance(error, WorkerDiedError),
            getattr(error, "when", float("inf")),
        ),
    )
    if isinstance(first, WorkerError):
        first.failed_ranks = max(1, len(errors))
        first.stuck = stuck
        if own_death(first, processes):
            note_last_words(first, processes[first.rank])
    return first


def raised(ref: Any) -> Exception | None:
    """What a call that has finished raised. Errors are small, and come to the caller at once: what
    is not here is an output, of another node. One that is here is looked at, and not copied.
    """
    # Where it was not imported, there are no batches.
    read_as: Any = getattr(sys.modules.get("protocol.wire"), "read_as", contextlib.nullcontext)
    try:
        with read_as("view"):
            get_ours(ref, 0)
    except GetTimeoutError:
        return None
    except Exception as error:
        return error.with_traceback(None)  # whose frames would hold the caller's arguments
    return None


def stacks_of(processes: Mapping[int, ProcessInfo]) -> dict[int, str]:
    """By rank, what each process does, or why it does not say."""
    found = beside(read_stacks, list(processes.values()), _NODE_S)
    return {
        rank: text or f"no stack: node {process.node_ip} did not answer"
        for (rank, process), text in zip(processes.items(), found, strict=True)
    }


def stuck_ranks(processes: Mapping[int, ProcessInfo]) -> dict[int, str]:
    """The ranks that wait in a collective, and a moment later in the same one; their stacks."""
    found = {rank: collective(stacks) for rank, stacks in stacks_of(processes).items()}
    before = {rank: stack for rank, stack in found.items() if stack}
    if before:
        time.sleep(_GRACE_S)
    now = stacks_of({rank: processes[rank] for rank in before})
    return {rank: stacks for rank, stacks in now.items() if collective(stacks) == before[rank]}
