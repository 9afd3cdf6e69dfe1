"""What the driver sees when a worker in a Ray actor is interrupted or does not come back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from single_controller import CallTimeoutError, GroupBrokenError, WorkerError
from single_controller.base import Broadcast, PerRank
from single_controller.base.decorator import Dispatch, register
from single_controller.base.hosts import Hosts
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from single_controller.ray import hosts as owned
from single_controller.ray.host import HostInfo
from single_controller.ray.hosts import RayHosts, end_when_dropped
from single_controller.ray.process import ProcessInfo
from tests.conformance.probe import Fragile
from tests.waiting import eventually

pytestmark = pytest.mark.slow

INFO = HostInfo(0, ProcessInfo("", "", 0), "cpu", ("actor",), ordered=False)


class Held(Fragile):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def until(self, flag: Path, ranks: Sequence[int] = (0, 1)) -> None:
        """Raise where not in `ranks`, and return once there is such a file."""
        if self.rank not in ranks:
            raise KeyError("missing")
        assert eventually(flag.exists)


class WithLoop(Held):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def waits(self) -> None: ...


@pytest.fixture(scope="module")
def group(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Held)) as two:
        yield two


@pytest.fixture(scope="module")
def with_loop(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(WithLoop)) as two:
        yield two


def test_an_interrupt_on_a_worker_does_not_interrupt_the_driver(group: RayWorkerGroup) -> None:
    with pytest.raises(WorkerError, match=r"Held\.act failed on rank 0") as caught:
        group.act(PerRank(["interrupt", "fine"]))
    assert not isinstance(caught.value, KeyboardInterrupt)


def test_ranks_that_run_on_after_a_failure_or_a_deadline_keep_the_group_from_waiting(
    group: RayWorkerGroup, tmp_path: Path
) -> None:
    def check(flag: str, why: str) -> None:
        with pytest.raises(GroupBrokenError, match=why):
            group.act("fine")
        (tmp_path / flag).touch()
        group._hosts.now.settle(60)
        assert group.act("fine") == ["fine"] * 2

    failing = group.act.submit("raise")
    slow = group.until.options(timeout_s=0.5).submit(tmp_path / "first")
    with pytest.raises(TimeoutError):
        slow.result()
    with pytest.raises(KeyError):
        failing.result()
    check("first", "still in a call that was given up")
    with pytest.raises(KeyError):
        group.until(tmp_path / "second", Broadcast([0]))
    check("second", r"ranks \[0\] are still in a call that failed")


def test_attaching_to_a_busy_group_says_so(group: RayWorkerGroup, tmp_path: Path) -> None:
    call = group.until.submit(tmp_path / "go")
    with pytest.raises(CallTimeoutError, match=r"workers .*_0:0.*startup_timeout_s=0.1.* busy"):
        RayWorkerGroup.from_detached(worker_names=group.worker_names, startup_timeout_s=0.1)
    with pytest.raises(CallTimeoutError, match=r"workers \[0, 1\] had not") as caught:
        RayWorkerGroup.from_detached(worker_handles=group.workers, startup_timeout_s=0.1)
    assert caught.value.pending_ranks == (0, 1)
    (tmp_path / "go").touch()
    assert call.result() == [None] * 2


class Interrupted:
    """A rank in whose turn to be sent a call somebody presses Ctrl-C."""

    def remote(self, *_: Any) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("which", ["group", "with_loop"])
def test_a_call_that_is_interrupted_while_it_is_sent_leaves_a_group_that_says_so(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    group = request.getfixturevalue(which)
    hosts = group._hosts.now
    callables = hosts.callables
    with monkeypatch.context() as patched:
        patched.setattr(hosts, "callables", lambda *a: [callables(*a)[0], Interrupted()])
        with pytest.raises(KeyboardInterrupt):
            group.act("fine")
    for call in (group.act, group.act.submit):
        with pytest.raises(GroupBrokenError, match=r"sending a call was interrupted.*restart"):
            call("fine")
    assert [row.state for row in group.describe().rows] == ["broken"] * 2
    group.restart()
    assert group.act("fine") == ["fine"] * 2


def test_a_dropped_group_is_ended_by_a_thread_and_not_while_garbage_is_collected() -> None:
    ended_by: list[str] = []
    hosts: Any = SimpleNamespace(
        gone=False,
        ended=None,
        broken="lost a rank",
        end=lambda why: ended_by.append(threading.current_thread().name),
    )
    RayHosts([], [], [INFO])  # the thread comes with them
    dropped = Hosts(hosts)
    end_when_dropped(dropped)
    with threading.Lock():  # what is held by whoever happens to collect garbage
        del dropped
        gc.collect()
    assert eventually(lambda: bool(ended_by))
    assert ended_by != [threading.current_thread().name]


def test_what_garbage_leaves_to_do_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected anywhere, also within a start of a thread, which cannot be nested."""
    monkeypatch.setattr(owned, "_started", threading.Lock())
    monkeypatch.setattr(owned, "threading", None)
    owned.later(int)
