"""The error tree of calls, groups and placement; that of batches is in `protocol.errors`."""

from __future__ import annotations

import functools
import pickle
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "CallTimeoutError",
    "CollectiveError",
    "DispatchError",
    "GroupBrokenError",
    "RegistrationError",
    "ResourceError",
    "SendError",
    "SharedMemoryWriteError",
    "SingleControllerError",
    "UnknownMethodError",
    "UnknownRoleError",
    "WorkerDiedError",
    "WorkerError",
]


class SingleControllerError(Exception):
    """Base of every error this package raises on purpose."""


class RegistrationError(SingleControllerError, TypeError, AssertionError):
    """A worker class or a `register` call cannot be used as it is written."""


class UnknownMethodError(SingleControllerError, AttributeError):
    """A group was asked for a method that its role does not register."""


class UnknownRoleError(SingleControllerError, ValueError, AssertionError):
    """A role was asked for that the hosts do not hold."""


class DispatchError(SingleControllerError, ValueError, AssertionError):
    """Arguments cannot be split over the ranks, or outputs cannot be merged.

    It is also an AssertionError because programs written for veRL catch that.
    """


class SendError(SingleControllerError, TypeError):
    """An argument cannot be pickled, so no rank was sent anything."""


class ResourceError(SingleControllerError, RuntimeError):
    """The cluster cannot hold what was asked for, or did not free it in time."""


class CollectiveError(SingleControllerError, RuntimeError):
    """Ranks that share one process were to communicate, which they could only do at once."""


class SharedMemoryWriteError(SingleControllerError, RuntimeError):
    """A method wrote into tensors or arrays that others read: arguments that it was registered to
    read only, or a result that it had given away.
    """


class GroupBrokenError(SingleControllerError, RuntimeError):
    """The group is closed, or a rank died or is stuck, so that it takes no more calls."""


class CallTimeoutError(SingleControllerError, TimeoutError):
    """A call did not finish in time.

    Attributes: `pending_ranks`, which were still running, and by rank their Python `stacks` as
    they were then.
    """

    def __init__(
        self, message: str, pending_ranks: Sequence[int], stacks: Mapping[int, str] | None = None
    ) -> None:
        Exception.__init__(self, message)
        self.pending_ranks = tuple(pending_ranks)
        self.stacks = dict(stacks or {})

    def __str__(self) -> str:
        return str(self.args[0]) + _show_stacks(self.stacks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.pending_ranks, self.stacks)


class WorkerError(SingleControllerError, RuntimeError):
    """A worker raised. It can be caught as the exception type that the worker raised, too.

    Attributes: `role`, `method`, `rank`, `node_ip`, `pid`, `remote_traceback` (text), `when`
    (seconds since the epoch on the worker's node), `log_tail` (the last lines that its process
    wrote), `failed_ranks` (how many ranks failed in the same call, this one included) and
    `stuck` (by rank, the stacks of those that waited for it in a collective and were ended).
    """

    role: str
    method: str
    rank: int
    node_ip: str
    pid: int
    remote_traceback: str
    when: float
    log_tail: str
    failed_ranks: int
    stuck: Mapping[int, str]

    def __init__(self, message: str, **where: Any) -> None:
        Exception.__init__(self, message)  # not the next in line: that may be the cause's type
        self._where = where
        self.log_tail = ""
        self.failed_ranks = 1
        self.stuck = {}
        for name, value in where.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        more = self.failed_ranks - 1
        others = f"\n({more} other rank{'s' * (more > 1)} failed as well.)" if more else ""
        return f"{self.args[0]}{others}{self._details()}{self._ended()}"

    def _details(self) -> str:
        return f"\n\n{self.remote_traceback.rstrip()}" if self.remote_traceback else ""

    def _ended(self) -> str:
        if not self.stuck:
            return ""
        waited = f"\n\nRanks {list(self.stuck)} waited for it in a collective and were ended:"
        return waited + _show_stacks(self.stuck)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._rebuild, (self.args[0], self._where)

    @classmethod
    def _rebuild(cls, message: str, where: Mapping[str, Any]) -> WorkerError:
        return cls(message, **where)

    @staticmethod
    def wrap(
        cause: BaseException, dumps: Callable[[Any], bytes] = pickle.dumps, **where: Any
    ) -> WorkerError:
        """The error to raise for `cause`: a `WorkerError` that is also a `type(cause)`.

        `dumps` pickles the cause's type and state; one that knows classes of the driver's own
        program, as cloudpickle does, lets it be caught as such there.
        """
        try:
            text = str(cause)
        except Exception:
            text = ""
        what = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
        message = (
            f"{where['role']}.{where['method']} failed on rank {where['rank']} "
            f"(node {where['node_ip']}, pid {where['pid']}): {_shorten(what)}"
        )
        where["remote_traceback"] = _shorten(where["remote_traceback"], 20_000)
        return _rebuild_worker_error(message, where, _pickled(cause, dumps))


class WorkerDiedError(WorkerError):
    """A worker's process ended while it was needed. `remote_traceback` is what Ray knows of it.

    `exit_code` is what it exited with, or minus the signal that killed it; None where nobody
    knows.
    """

    exit_code: int | None = None

    def _details(self) -> str:
        log = self.log_tail
        return "\n\nThe last lines that it wrote:\n" + textwrap.indent(log, "  ") if log else ""


def _show_stacks(stacks: Mapping[int, str]) -> str:
    shown = [f"\nrank {rank} (most recent call first):\n{text}" for rank, text in stacks.items()]
    return "\n".join(["", *shown]) if shown else ""


def _shorten(text: str, limit: int = 2_000) -> str:
    """Keep both ends: small errors travel with Ray's control messages, large ones do not."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}\n… cut …\n{text[-half:]}"


def _native(cause_type: Any) -> Any:
    return next(base for base in cause_type.__mro__ if base.__module__ == "builtins")


def _pickled(cause: BaseException, dumps: Callable[[Any], bytes]) -> bytes:
    """Type, arguments and attributes of `cause`, or its type alone where the rest is too much.

    Not `cause` itself: pickle calls its constructor, which may take other arguments.
    """
    args = _native(type(cause)).__reduce__(cause)[1]  # OSError's has the file name, args has not
    forms: list[tuple[Any, ...]] = [(type(cause), args, vars(cause)), (type(cause), (), {})]
    for parts in forms:
        try:
            pickled = dumps(parts)
        except Exception:
            continue
        if len(pickled) < 50_000:
            return pickled
    return b""


def _build(error_type: Any, cause_type: Any, args: Any, state: Any) -> Any:
    error = cause_type.__new__(error_type, *args)
    _native(cause_type).__init__(error, *args)  # such as OSError's errno, kept outside __dict__
    error.__dict__.update(state)
    return error


def _rebuild_worker_error(message: str, where: Mapping[str, Any], pickled: bytes) -> WorkerError:
    """A `WorkerError` of the cause's type too, where that type is known here and allows it."""
    error: Any
    try:
        cause_type, args, state = pickle.loads(pickled)
        cause = _build(cause_type, cause_type, args, state)
        error_type = _dual_type(cause_type)
        if error_type is WorkerError:
            error = WorkerError.__new__(WorkerError)
        else:
            error = _build(error_type, cause_type, args, state)
    except Exception:
        error, cause = WorkerError.__new__(WorkerError), None
    WorkerError.__init__(error, message, **where)
    error.__cause__ = cause
    error._pickled_cause = pickled
    return error  # type: ignore[no-any-return]


@functools.cache
def _dual_type(cause_type: Any) -> type[WorkerError]:
    """A `WorkerError` that is a `cause_type`, save where Python gives raising one a meaning."""
    if not issubclass(cause_type, Exception) or issubclass(
        cause_type, StopIteration | StopAsyncIteration
    ):
        return WorkerError

    def reduce(self: Any) -> tuple[Any, ...]:
        return _rebuild_worker_error, (self.args[0], self._where, self._pickled_cause)

    return type(
        f"WorkerError[{cause_type.__name__}]",
        (WorkerError, cause_type),
        {"__reduce__": reduce, "__module__": __name__, "__doc__": WorkerError.__doc__},
    )
