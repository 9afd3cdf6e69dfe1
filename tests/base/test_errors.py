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
    UnknownRoleError,
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


class TwoArgumentsError(ValueError):
    """Pickle cannot build it again: `args` are not what the constructor takes."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


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


def json_error() -> Exception:
    try:
        json.loads("{")
    except ValueError as error:
        return error
    raise AssertionError


CAUSES: list[Exception] = [
    ValueError("bad value"),
    KeyError("k"),
    RuntimeError("CUDA out of memory"),
    AssertionError(),
    FileNotFoundError(2, "No such file", "/data/x"),
    TimeoutError("late"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json_error(),
    TwoArgumentsError(3, "boom"),
    RuntimeWithTwoError(3, "boom"),
    KeywordOnlyError(code=3),
    NoReduceError("x"),
    ValueError(lambda: "unpicklable"),
    ValueError("x" * 200_000),
    UnknownRoleError("no role"),
    GroupBrokenError("closed"),
    CallTimeoutError("late", [1, 2]),
]


def wrap(cause: BaseException, **changes: Any) -> WorkerError:
    return WorkerError.wrap(cause, **{**WHERE, **changes})


def name_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_a_worker_error_says_where_and_what_before_and_after_pickling(cause: Exception) -> None:
    for error in (wrap(cause), pickle.loads(pickle.dumps(wrap(cause)))):
        assert isinstance(error, WorkerError)
        assert {name: getattr(error, name) for name in WHERE} == WHERE
        assert error.failed_ranks == 1
        head = "actor.update failed on rank 3 (node 10.0.0.7, pid 4711): "
        assert str(error).startswith(head + type(cause).__name__)
        assert str(error).endswith("Traceback on the worker: line 12")


@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_a_worker_error_can_be_caught_as_the_type_that_the_worker_raised(cause: Exception) -> None:
    for error in (wrap(cause), pickle.loads(pickle.dumps(wrap(cause)))):
        with pytest.raises(type(cause)):
            raise error


@pytest.mark.parametrize(
    ("cause", "names"),
    [
        (FileNotFoundError(2, "No such file", "/data/x"), ["errno", "filename"]),
        (json_error(), ["pos", "doc"]),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ["reason", "start"]),
        (RuntimeWithTwoError(3, "boom"), ["code"]),
    ],
    ids=name_of,
)
def test_what_a_handler_reads_of_the_workers_exception_is_there(
    cause: Exception, names: list[str]
) -> None:
    error = pickle.loads(pickle.dumps(wrap(cause)))
    assert [getattr(error, name, None) for name in names] == [getattr(cause, n) for n in names]


def test_the_workers_own_exception_is_the_cause() -> None:
    error = pickle.loads(pickle.dumps(wrap(ValueError("bad", 7))))
    assert isinstance(error.__cause__, ValueError)
    assert error.__cause__.args == ("bad", 7)


def test_an_exception_class_that_only_the_worker_has_is_a_plain_worker_error() -> None:
    class LocalError(Exception):
        pass

    error = pickle.loads(pickle.dumps(wrap(LocalError("gone"))))
    assert type(error) is WorkerError
    assert "LocalError: gone" in str(error)


def test_an_exception_that_cannot_even_be_shown_is_reported_all_the_same() -> None:
    error = wrap(NoTextError("x"))
    assert isinstance(error, WorkerError)
    assert "NoTextError" in str(error)


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


@pytest.mark.parametrize(("failed", "text"), [(2, "1 other rank failed"), (4, "3 other ranks fai")])
def test_ranks_that_failed_in_the_same_call_are_counted(failed: int, text: str) -> None:
    error = wrap(ValueError("x"))
    error.failed_ranks = failed
    assert text in str(error)


def test_a_worker_that_died_is_a_worker_error_and_keeps_its_type() -> None:
    error = pickle.loads(pickle.dumps(WorkerDiedError("gone", **WHERE)))
    assert type(error) is WorkerDiedError
    assert isinstance(error, WorkerError)
    assert {name: getattr(error, name) for name in WHERE} == WHERE


def test_a_timeout_tells_the_pending_ranks_also_after_pickling() -> None:
    error = pickle.loads(pickle.dumps(CallTimeoutError("late", [1, 2])))
    assert isinstance(error, TimeoutError)
    assert (str(error), error.pending_ranks) == ("late", (1, 2))


@pytest.mark.parametrize(
    ("error", "also"),
    [
        (RegistrationError, (TypeError,)),
        (DispatchError, (ValueError, AssertionError)),
        (ResourceError, (RuntimeError,)),
        (WorkerError, (RuntimeError,)),
        (WorkerDiedError, (WorkerError,)),
        (CallTimeoutError, (TimeoutError,)),
        (GroupBrokenError, (RuntimeError,)),
        (UnknownMethodError, (AttributeError,)),
        (UnknownRoleError, (ValueError, AssertionError)),
    ],
)
def test_every_error_is_of_this_package_and_of_a_type_that_programs_catch(
    error: type[Exception], also: tuple[type[Exception], ...]
) -> None:
    assert issubclass(error, SingleControllerError)
    assert all(issubclass(error, base) for base in also)


def test_all_errors_can_be_imported_from_the_package() -> None:
    assert set(errors.__all__) <= set(single_controller.__all__)
