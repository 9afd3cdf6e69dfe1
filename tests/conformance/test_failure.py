"""What the driver sees when a worker raises, dies or does not come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from single_controller import CallTimeoutError, GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from tests.conformance.conftest import Backend
from tests.waiting import eventually, is_alive


class OddError(Exception):
    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.hint = code, hint


class Fragile(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def act(self, what: str) -> Any:
        if what == "raise":
            return {}["missing"]
        if what == "chain":
            try:
                os.stat("/no/such/file")
            except OSError as error:
                raise RuntimeError("load failed") from error
        if what == "stop":
            raise StopIteration(5)
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "odd":
            raise OddError(7, hint="twist")
        if what == "die":
            os._exit(3)
        if what == "exit":
            sys.exit(3)
        if what == "generator":
            return (x for x in ())
        if what == "lock":
            return threading.Lock()
        if what.startswith("wait"):
            threading.Event().wait(float(what[4:]))
        return what


@pytest.fixture(scope="module")
def group(backend: Backend) -> Iterator[Any]:
    with backend.group(backend.spec(Fragile)) as two:
        yield two


class Leaving(Worker):
    """Asks for the end of its process, in its constructor or in a method."""

    def __init__(self, *asked: Any) -> None:
        if asked:
            sys.exit(asked[0])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def leave(self, asked: Any) -> None:
        sys.exit(asked)


class LeavingAsync(Leaving):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def leave(self, asked: Any) -> None:
        sys.exit(asked)


@pytest.mark.parametrize(
    ("cls", "asked", "code"),
    [
        (Leaving, "no more data", 1),
        (LeavingAsync, "no more data", 1),
        (Leaving, 3, 3),
        (Leaving, None, 0),
    ],
)
def test_an_end_that_a_method_asks_for_is_told_with_its_reason_and_code(
    backend: Backend, cls: type[Leaving], asked: Any, code: int
) -> None:
    with backend.group(backend.spec(cls), 1) as group:
        with pytest.raises(WorkerDiedError) as caught:
            group.leave(asked)
        error = caught.value
        assert (error.role, error.method, error.exit_code) == (cls.__name__, "leave", code)
        assert f"sys.exit({asked!r})" in str(error)
        assert "sys.exit(asked)" in error.remote_traceback
        with pytest.raises(GroupBrokenError, match=r"lost a rank: .*sys\.exit"):
            group.leave(asked)
        pid = group.describe().rows[0].pid
        assert pid == os.getpid() or eventually(lambda: not is_alive(pid))


def test_an_end_that_a_constructor_asks_for_is_told_with_its_reason(backend: Backend) -> None:
    with pytest.raises(WorkerDiedError, match=r"sys\.exit\('no model'\)") as caught:
        backend.group(backend.spec(Leaving, "no model"), 1)
    error = caught.value
    assert (error.role, error.method, error.exit_code) == ("Leaving", "__init__", 1)


def test_an_error_names_role_method_rank_node_and_pid_and_keeps_its_type(
    group: Any,
) -> None:
    with pytest.raises(KeyError) as caught:
        group.act(PerRank(["fine", "raise"]))
    error = caught.value
    assert isinstance(error, WorkerError)
    assert (error.role, error.method, error.rank) == ("Fragile", "act", 1)
    assert error.pid == group.describe().rows[1].pid
    assert error.node_ip == group.describe().rows[1].node
    assert 'return {}["missing"]' in error.remote_traceback
    assert "Fragile.act failed on rank 1" in str(error)
    assert "single_controller" not in error.remote_traceback
    assert isinstance(pickle.loads(pickle.dumps(error)), KeyError)


class Unreadable:
    """It pickles, and cannot be unpickled anywhere."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_an_argument_that_cannot_be_read_fails_its_call_and_no_other(
    group: Any,
) -> None:
    with pytest.raises(ValueError, match=r"Fragile.act failed on rank [01].*invalid literal"):
        group.act(Unreadable())
    assert group.act("fine") == ["fine"] * 2


def test_several_failing_ranks_are_counted_and_the_first_is_shown(group: Any) -> None:
    with pytest.raises(WorkerError, match=r"1 other rank failed as well") as caught:
        group.act("raise")
    assert caught.value.failed_ranks == 2


def test_an_error_type_with_an_odd_constructor_still_arrives(group: Any) -> None:
    with pytest.raises(WorkerError, match="OddError: code 7"):
        group.act("odd")


def test_the_cause_of_an_error_is_shown_with_it_and_our_own_frames_are_not(
    group: Any,
) -> None:
    with pytest.raises(RuntimeError, match="load failed") as caught:
        group.act("chain")
    text = str(caught.value)
    assert "FileNotFoundError" in text
    assert "/no/such/file" in text
    assert "host.py" not in text


def test_an_exception_with_a_meaning_to_python_arrives_as_a_plain_worker_error(
    group: Any,
) -> None:
    with pytest.raises(WorkerError, match=r"Fragile\.act failed on rank 0") as caught:
        group.act(PerRank(["stop", "fine"]))
    assert not isinstance(caught.value, StopIteration)


@pytest.mark.parametrize(
    ("what", "message"),
    [("lock", r"cannot pickle '_thread.lock'"), ("generator", r"returned a generator.*list")],
)
def test_an_output_that_cannot_be_sent_is_an_error_of_that_rank(
    group: Any, what: str, message: str
) -> None:
    with pytest.raises(WorkerError, match=f"(?s)rank 1.*{message}"):
        group.act(PerRank(["fine", what]))


def test_a_rank_that_exits_is_a_death_and_breaks_the_group(backend: Backend) -> None:
    with backend.group(backend.spec(Fragile)) as group:
        with pytest.raises(WorkerDiedError, match=r"Fragile\.act: rank 1 ") as caught:
            group.act(PerRank(["fine", "exit"]))
        assert caught.value.rank == 1
        states = ["broken", "dead"]
        assert eventually(lambda: [row.state for row in group.describe().rows] == states, 10)
        with pytest.raises(GroupBrokenError, match="lost a rank"):
            group.act("fine")


class Patient(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def wait_for(self, file: Path) -> str:
        while not file.exists():
            await asyncio.sleep(0.01)
        return "done"


def test_after_a_deadline_the_group_takes_no_call_until_its_ranks_have_finished(
    backend: Backend, tmp_path: Path
) -> None:
    file = tmp_path / "go"
    with backend.group(backend.spec(Patient)) as group:
        future = group.wait_for.submit(file)
        with pytest.raises(CallTimeoutError):  # this wait alone: the call may go on
            future.result(timeout=0.01)
        with pytest.raises(CallTimeoutError):
            group.wait_for.options(timeout_s=0.01)(file)
        given_up = r"ranks \[0, 1\] are still in a call that was given up after 0\.01 s"
        with pytest.raises(GroupBrokenError, match=given_up):
            group.wait_for(file)
        file.touch()
        assert future.result() == ["done"] * 2

        def usable() -> bool:
            with contextlib.suppress(GroupBrokenError):
                return bool(group.wait_for(file) == ["done"] * 2)
            return False

        assert eventually(usable, 10)


def test_a_closed_group_says_so_and_closing_twice_is_fine(backend: Backend) -> None:
    group = backend.group(backend.spec(Fragile))
    group.close()
    group.close()
    assert [row.state for row in group.describe().rows] == ["dead", "dead"]
    with pytest.raises(GroupBrokenError, match="the group is closed"):
        group.act("fine")
