"""The error tree of calls, groups and placement; that of batches is in `protocol.errors`."""

from __future__ import annotations

import contextlib
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
    "WorkerDiedError",
    "WorkerError",
    "check_seconds",
]


class SingleControllerError(Exception):
    """Base of every error this package raises on purpose."""


class RegistrationError(SingleControllerError, TypeError, AssertionError):
    """A worker class or a `register` call cannot be used as it is written."""


class UnknownMethodError(SingleControllerError, AttributeError):
    """A group was asked for a method that its role does not register."""


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
        self.pending_ranks, self.stacks = tuple(pending_ranks), dict(stacks or {})

    def __str__(self) -> str:
        return str(self.args[0]) + _shown(self.stacks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.pending_ranks, self.stacks)


_LEARNT = ("rank", "log_tail", "failed_ranks", "stuck")


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
    log_tail: str = ""
    failed_ranks: int = 1
    stuck: Mapping[int, str] = {}
    _pickled_cause = b""

    def __init__(self, message: str, **where: Any) -> None:
        Exception.__init__(self, message)  # not the next in line: that may be the cause's type
        self._where = where
        self.__dict__.update(where)

    def __str__(self) -> str:
        text, more = f"{self.args[0]}", self.failed_ranks - 1
        if more:
            text += f"\n({more} other rank{'s' * (more > 1)} failed as well.)"
        text += self._details()
        if self.stuck:
            text += f"\n\nRanks {[*self.stuck]} waited for it in a collective and were ended:"
        return text + _shown(self.stuck)

    def _details(self) -> str:
        return f"\n\n{self.remote_traceback.rstrip()}" if self.remote_traceback else ""

    def __reduce__(self) -> tuple[Any, ...]:
        learnt = {name: getattr(self, name) for name in _LEARNT}
        where = {**self._where, **learnt}
        if self._pickled_cause:
            return _rebuilt, (self.args[0], where, self._pickled_cause)
        return functools.partial(type(self), **where), (self.args[0],)

    @staticmethod
    def wrap(
        cause: BaseException, dumps: Callable[[Any], bytes] = pickle.dumps, **where: Any
    ) -> WorkerError:
        """The error to raise for `cause`: a `WorkerError` that is also a `type(cause)`.

        `dumps` pickles the cause's type and state; one that knows classes of the driver's own
        program, as cloudpickle does, lets it be caught as such there.
        """
        text = type(cause).__name__
        with contextlib.suppress(Exception):
            text = f"{text}: {cause}".removesuffix(": ")
        message = "{role}.{method} failed on rank {rank} (node {node_ip}, pid {pid}): "
        where["remote_traceback"] = _shortened(where["remote_traceback"], 20_000)
        return _rebuilt(message.format(**where) + _shortened(text), where, _pickled(cause, dumps))


class WorkerDiedError(WorkerError):
    """A worker's process ended while it was needed. `remote_traceback` is what Ray knows of it.

    `exit_code` is what its code asked for by `sys.exit`; None where it ended otherwise.
    """

    exit_code: int | None = None

    def _details(self) -> str:
        said = super()._details() if self.exit_code is None else ""  # else the message says all
        log = textwrap.indent(self.log_tail, "  ")
        return said + (f"\n\nThe last lines that it wrote:\n{log}" if log else "")


def _shown(stacks: Mapping[int, str]) -> str:
    shown = [f"\nrank {rank} (most recent call first):\n{text}" for rank, text in stacks.items()]
    return "\n".join(["", *shown]) if shown else ""


def _shortened(text: str, limit: int = 2_000) -> str:
    """Keep both ends: small errors travel with Ray's control messages, large ones do not."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}\n… cut …\n{text[-half:]}"


def _pickled(cause: BaseException, dumps: Callable[[Any], bytes]) -> bytes:
    """Type, arguments and attributes of `cause`, or its type alone where the rest is too much: not
    itself, since pickle calls its constructor, which may take other arguments.
    """
    args = (
        OSError.__reduce__(cause)[1] if isinstance(cause, OSError) else cause.args
    )  # and its file
    forms: Any = ((type(cause), args, vars(cause)), (type(cause), (), {}))
    for parts in forms:
        with contextlib.suppress(Exception):
            if len(pickled := dumps(parts)) < 50_000:
                return pickled
    return b""


def _rebuilt(message: str, where: Mapping[str, Any], pickled: bytes) -> WorkerError:
    """A `WorkerError` of the cause's type too, where that type is known here and allows it."""

    def build(error_type: Any) -> Any:
        made = cause_type.__new__(error_type, *args)
        native = next(base for base in cause_type.__mro__ if base.__module__ == "builtins")
        native.__init__(made, *args)  # such as OSError's errno, not in __dict__
        made.__dict__.update(state)
        return made

    error, cause = WorkerError.__new__(WorkerError), None
    with contextlib.suppress(Exception):  # a class that is not known here, or cannot be built so
        cause_type, args, state = pickle.loads(pickled)
        cause = build(cause_type)
        special = StopIteration | StopAsyncIteration  # Python gives raising them a meaning
        if isinstance(cause, Exception) and not isinstance(cause, special):
            error = build(_both(cause_type))
            error._pickled_cause = pickled
    WorkerError.__init__(error, message, **where)
    error.__cause__ = cause
    return error


@functools.cache
def _both(cause_type: Any) -> type[WorkerError]:
    body = {"__module__": __name__, "__doc__": WorkerError.__doc__}
    return type(f"WorkerError[{cause_type.__name__}]", (WorkerError, cause_type), body)


def check_seconds(name: str, value: Any, optional: bool = True) -> None:
    """Raise ValueError for what is no time: seconds that may be 0 or, where `optional`, None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (value >= 0 if number else optional and value is None):
        wanted = "at least 0, or None" if optional else "at least 0"
        raise ValueError(f"{name} must be seconds, {wanted}; got {value!r}")
