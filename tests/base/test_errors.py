"""Errors that cross processes: what they tell, and what they can be caught as."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

import single_controller
from single_controller import errors
from single_controller.errors import (
    CallTimeoutError,
    DispatchError,
    GroupBrokenError,
    RegistrationError,
    ResourceError,
    SingleControllerError,
    UnknownMethodError,
    WorkerDiedError,
    WorkerError,
)

WHERE: dict[str, Any] = {
    "role": "actor",
    "method": "update",
    "rank": 3,
    "node_ip": "10.0.0.7",
    "pid": 4711,
    "remote_traceback": "Traceback on the worker: line 12\n",
    "when": 12.5,
}


class RuntimeWithTwoError(RuntimeError):
    """Its constructor takes two arguments, and its base is one that WorkerError has too."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


class KeywordOnlyError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code


class NoTextError(ValueError):
    def __str__(self) -> str:
        raise KeyError("broken")


class NoReduceError(ValueError):
    def __reduce__(self) -> Any:
        raise TypeError("not me")


JSON = json.JSONDecodeError("Expecting value", "{", 1)  # which has no `args` to make it from
CAUSES: list[Exception] = [
    ValueError("bad value"),
    KeyError("k"),
    RuntimeError("CUDA out of memory"),
    AssertionError(),
    FileNotFoundError(2, "No such file", "/data/x"),
    TimeoutError("late"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    JSON,
    RuntimeWithTwoError(3, "boom"),
    KeywordOnlyError(code=3),
    NoReduceError("x"),
    ValueError(lambda: "unpicklable"),
    ValueError("x" * 200_000),
    DispatchError("no list"),
    GroupBrokenError("closed"),
    CallTimeoutError("late", [1, 2]),
]
READ = {
    FileNotFoundError: ("errno", "filename"),
    json.JSONDecodeError: ("pos", "doc"),
    UnicodeDecodeError: ("reason", "start"),
    RuntimeWithTwoError: ("code",),
}


def wrap(cause: BaseException, **changes: Any) -> WorkerError:
    return WorkerError.wrap(cause, **{**WHERE, **changes})


def name_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_a_worker_error_is_of_the_type_that_the_worker_raised_and_says_where_and_what(
    cause: Exception,
) -> None:
    for error in (wrap(cause), pickle.loads(pickle.dumps(wrap(cause)))):
        assert isinstance(error, WorkerError)
        assert isinstance(error, type(cause))
        assert {name: getattr(error, name) for name in WHERE} == WHERE
        assert error.failed_ranks == 1
        head = "actor.update failed on rank 3 (node 10.0.0.7, pid 4711): "
        assert str(error).startswith(head + type(cause).__name__)
        assert str(error).endswith("Traceback on the worker: line 12")
        for read in READ.get(type(cause), ()):  # by a handler
            assert getattr(error, read) == getattr(cause, read)
        assert type(error.__cause__) is type(cause)


def test_an_exception_that_cannot_be_sent_or_shown_is_a_plain_worker_error() -> None:
    class LocalError(Exception):
        pass

    for cause in (LocalError("gone"), StopIteration(3), KeyboardInterrupt()):
        error = pickle.loads(pickle.dumps(wrap(cause)))
        assert type(error) is WorkerError
        assert f"pid 4711): {name_of(cause)}" in str(error)
    assert "NoTextError" in str(wrap(NoTextError("x")))


def test_long_texts_keep_both_ends_and_stay_small_enough_for_control_messages() -> None:
    error = wrap(
        ValueError("begin" + "x" * 100_000 + "end"), remote_traceback="a" * 50_000 + "last"
    )
    assert "begin" in str(error)
    assert "xend" in str(error)
    assert error.remote_traceback.startswith("aaa")
    assert error.remote_traceback.endswith("last")
    assert str(error).count("… cut …") == 2
    assert len(pickle.dumps(error)) < 100_000


def test_ranks_that_failed_in_the_same_call_or_waited_for_it_are_told_also_elsewhere() -> None:
    error = wrap(ValueError("x"))
    for failed, text in ((2, "1 other rank failed"), (4, "3 other ranks failed")):
        error.failed_ranks = failed
        assert text in str(error)
    error.stuck = {1: "in all_reduce"}
    assert str(error).endswith("ended:\n\nrank 1 (most recent call first):\nin all_reduce")
    for told in (error, WorkerDiedError("gone", **WHERE, failed_ranks=4, stuck=error.stuck)):
        assert str(pickle.loads(pickle.dumps(told))) == str(told)


def test_a_death_and_a_timeout_keep_their_type_and_what_they_tell_across_processes() -> None:
    died = WorkerDiedError("gone", **WHERE, exit_code=-9, log_tail="last words")
    died = pickle.loads(pickle.dumps(died))
    assert (type(died), died.exit_code) == (WorkerDiedError, -9)
    assert {name: getattr(died, name) for name in WHERE} == WHERE
    assert str(died) == "gone\n\nThe last lines that it wrote:\n  last words"
    late = pickle.loads(pickle.dumps(CallTimeoutError("late", [1, 2], {1: "in sleep"})))
    assert (late.pending_ranks, late.stacks) == ((1, 2), {1: "in sleep"})
    assert str(late) == "late\n\nrank 1 (most recent call first):\nin sleep"


def test_errors_can_be_imported_from_the_package_and_caught_as_what_programs_catch() -> None:
    raised = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert raised <= set(single_controller.__all__)
    for caught, kinds in {
        TypeError: (RegistrationError,),
        ValueError: (DispatchError,),
        AssertionError: (DispatchError,),
        RuntimeError: (ResourceError, WorkerError, GroupBrokenError),
        AttributeError: (UnknownMethodError,),
    }.items():
        assert all({caught, SingleControllerError} <= {*kind.__mro__} for kind in kinds)
