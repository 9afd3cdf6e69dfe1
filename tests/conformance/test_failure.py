"""What the driver sees when a worker raises, dies or does not come back."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from single_controller import CallTimeoutError, GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from tests.conformance.conftest import Backend
from tests.conformance.probe import Unreadable
from tests.conformance.team import specs
from tests.waiting import eventually, is_alive, once_taken


@pytest.fixture
def fragile(in_turn: dict[str, Any]) -> Any:
    return in_turn["Fragile"]


def test_an_error_names_role_method_rank_node_and_pid_and_keeps_its_type(fragile: Any) -> None:
    with pytest.raises(KeyError) as caught:
        fragile.act(PerRank(["fine", "raise"]))
    error = caught.value
    assert isinstance(error, WorkerError)
    assert (error.role, error.method, error.rank) == ("Fragile", "act", 1)
    assert error.pid == fragile.describe().rows[1].pid
    assert error.node_ip == fragile.describe().rows[1].node
    assert 'return {}["missing"]' in error.remote_traceback
    assert "Fragile.act failed on rank 1" in str(error)
    assert "single_controller" not in error.remote_traceback
    assert isinstance(pickle.loads(pickle.dumps(error)), KeyError)


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("raise", KeyError, "(?s)missing.*1 other rank failed as well"),
        ("odd", WorkerError, "OddError: code 7"),
        ("chain", RuntimeError, r"(?s)FileNotFoundError.*/no/such/file.*load failed"),
        (PerRank(["stop", "fine"]), WorkerError, r"Fragile\.act failed on rank 0"),
        (PerRank(["fine", "lock"]), WorkerError, r"(?s)rank 1.*cannot pickle '_thread.lock'"),
        (PerRank(["fine", "generator"]), WorkerError, r"(?s)rank 1.*returned a generator.*list"),
        (Unreadable(), ValueError, r"Fragile.act failed on rank [01].*invalid literal"),
    ],
)
def test_what_goes_wrong_in_a_call_is_told_and_the_next_one_runs(
    fragile: Any, what: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        fragile.act(what)
    assert isinstance(caught.value, WorkerError)
    assert not isinstance(caught.value, StopIteration)
    assert caught.value.failed_ranks == (1 if isinstance(what, PerRank) else 2)
    if isinstance(what, str):
        assert "host.py" not in str(caught.value), "frames that are not the user's"
    assert fragile.act("fine") == ["fine"] * 2


class Leaving(Worker):
    """Asks for the end of its process, or fails, in its constructor or in a method."""

    def __init__(self, *asked: Any) -> None:
        if asked:
            self.leave(asked[self.rank])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def leave(self, asked: Any) -> None:
        if isinstance(asked, Exception):
            raise asked
        if asked != "stay":
            sys.exit(asked)


class LeavingAsync(Leaving):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def leave_async(self, asked: Any) -> None:
        self.leave(asked)


@pytest.mark.parametrize(
    ("cls", "method", "asked", "code"),
    [
        (Leaving, "leave", None, 0),
        pytest.param(LeavingAsync, "leave", 3, 3, marks=pytest.mark.slow),
        pytest.param(LeavingAsync, "leave_async", "no more data", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_asks_for_its_end_is_told_with_reason_and_code_and_breaks_the_group(
    backend: Backend, cls: type[Leaving], method: str, asked: Any, code: int
) -> None:
    with backend.group(backend.spec(cls), call_timeout_s=60) as group:
        leave = getattr(group, method)
        with pytest.raises(WorkerDiedError, match=rf"{method}: rank 1 ") as caught:
            leave(PerRank(["stay", asked]))
        error = caught.value
        assert (error.role, error.method, error.rank) == (cls.__name__, method, 1)
        assert error.exit_code == code
        assert f"sys.exit({asked!r})" in str(error)
        assert "sys.exit(asked)" in error.remote_traceback
        states = ["broken", "dead"]
        assert eventually(lambda: [row.state for row in group.describe().rows] == states, 10)
        with pytest.raises(GroupBrokenError, match=r"lost a rank: .*sys\.exit"):
            leave("stay")
        pid = group.describe().rows[1].pid
        assert pid == os.getpid() or eventually(lambda: not is_alive(pid))


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        pytest.param(
            FileNotFoundError("no such checkpoint: /x"),
            FileNotFoundError,
            r"__init__ failed on rank 1",
            marks=pytest.mark.slow,
        ),
        ("no model", WorkerDiedError, r"sys\.exit\('no model'\)"),
    ],
)
def test_a_constructor_that_fails_or_asks_for_its_end_is_told_with_role_and_rank(
    backend: Backend, asked: Any, error: type[Exception], match: str
) -> None:
    failing = {**specs(backend, "actor"), "critic": backend.spec(Leaving, "stay", asked)}
    with pytest.raises(error, match=match) as caught:
        backend.group(backend.module.create_colocated_worker_cls(failing))
    found = caught.value
    assert isinstance(found, WorkerError)
    assert (found.role, found.rank, found.method) == ("critic", 1, "__init__")
    assert str(asked) in found.remote_traceback


class Patient(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def wait_for(self, file: Path) -> str:
        while not file.exists():
            await asyncio.sleep(0.01)
        return "done"


def test_after_a_deadline_no_call_is_taken_until_the_ranks_have_finished_and_none_after_the_end(
    backend: Backend, tmp_path: Path
) -> None:
    file = tmp_path / "go"
    group = backend.group(backend.spec(Patient))
    future = group.wait_for.submit(file)
    with pytest.raises(CallTimeoutError):  # this wait alone: the call may go on
        future.result(timeout=0.01)
    with pytest.raises(CallTimeoutError):
        group.wait_for.options(timeout_s=0.01)(file)
    given_up = r"ranks \[0, 1\] are still in a call that was given up after 0\.01 s"
    if backend.name == "ray":
        with pytest.raises(GroupBrokenError, match=given_up):
            group.wait_for(file)
    file.touch()
    assert future.result() == ["done"] * 2
    assert once_taken(lambda: group.wait_for(file)) == ["done"] * 2
    group.close()
    group.close()
    assert [row.state for row in group.describe().rows] == ["dead", "dead"]
    with pytest.raises(GroupBrokenError, match="the group is closed"):
        group.wait_for(file)
