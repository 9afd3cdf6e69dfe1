"""What the driver sees when a worker in a Ray actor dies, is interrupted or does not come back."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from single_controller import CallTimeoutError, GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from single_controller.ray import hosts as owned
from single_controller.ray.hosts import Hosts
from single_controller.ray.supervisor import RaySupervisor
from tests.conformance.test_failure import Fragile
from tests.waiting import eventually

pytestmark = pytest.mark.slow


class WithLoop(Fragile):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def waits(self) -> None: ...


@pytest.fixture(scope="module")
def group(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Fragile)) as two:
        yield two


def test_an_interrupt_on_a_worker_does_not_interrupt_the_driver(group: RayWorkerGroup) -> None:
    with pytest.raises(WorkerError, match=r"Fragile\.act failed on rank 0") as caught:
        group.act(PerRank(["interrupt", "fine"]))
    assert not isinstance(caught.value, KeyboardInterrupt)


def test_every_call_that_is_still_running_keeps_the_group_from_waiting(
    group: RayWorkerGroup,
) -> None:
    failing, slow = group.act.submit("raise"), group.act.options(timeout_s=0.5).submit("wait3")
    with pytest.raises(TimeoutError):
        slow.result()
    with pytest.raises(KeyError):
        failing.result()
    with pytest.raises(GroupBrokenError, match="still in a call that was given up"):
        group.act("fine")
    group._hosts.settle(60)
    assert group.act("fine") == ["fine"] * 2


def test_a_failing_rank_is_reported_while_others_wait_and_the_group_recovers(
    group: RayWorkerGroup,
) -> None:
    with pytest.raises(KeyError):
        group.act(PerRank(["wait6", "raise"]))
    with pytest.raises(GroupBrokenError, match=r"ranks \[0\] are still in a call that failed"):
        group.act("fine")
    group._hosts.settle(60)
    assert group.act("fine") == ["fine"] * 2


def test_a_death_is_named_and_breaks_the_group(pool: RayResourcePool) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Fragile)) as group:
        with pytest.raises(WorkerDiedError, match=r"Fragile\.act: rank 1 .* died") as caught:
            group.act(PerRank(["wait1", "die"]))
        assert caught.value.rank == 1
        assert [row.state for row in group.describe().rows] == ["broken", "dead"]
        with pytest.raises(GroupBrokenError, match="lost a rank"):
            group.act("fine")


def test_the_aliveness_check_breaks_the_group_of_a_dead_idle_worker(
    pool: RayResourcePool,
) -> None:
    import signal

    with RayWorkerGroup(pool, RayClassWithInitArgs(Fragile)) as group:
        group.start_worker_aliveness_check(every_n_seconds=0.05)
        os.kill(group.describe().rows[1].pid, signal.SIGKILL)
        assert eventually(lambda: group._hosts.broken is not None)
        with pytest.raises(GroupBrokenError, match="lost a rank"):
            group.act("fine")


class Interrupted:
    """A rank in whose turn to be sent a call somebody presses Ctrl-C."""

    def remote(self, *_: Any) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("cls", [Fragile, WithLoop])
def test_a_call_that_is_interrupted_while_it_is_sent_leaves_a_group_that_says_so(
    pool: RayResourcePool, monkeypatch: pytest.MonkeyPatch, cls: type[Fragile]
) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(cls)) as group:
        hosts = group._hosts
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


def test_a_place_in_the_order_of_calls_is_given_once_whatever_becomes_of_the_call() -> None:
    hosts = Hosts([None], ["one"], [], ("", 0), ordered=False)
    assert [hosts.turn(0)[1] for _ in range(3)] == [0, 1, 2]  # type: ignore[index]


def test_what_two_threads_note_of_a_group_at_the_same_time_is_noted_once() -> None:
    hosts = Hosts([], [], [], ("", 0), ordered=True)
    other = threading.Thread(target=hosts._note_running, args=([(0, "a call")], "runs"))

    class Meanwhile(list[tuple[int, Any]]):
        def __iter__(self) -> Iterator[tuple[int, Any]]:
            other.start()
            eventually(lambda: bool(hosts._running), 0.2)  # where nothing keeps the other from it
            return super().__iter__()

    hosts._note_running(Meanwhile([(0, "a call")]), "runs")
    other.join()
    assert hosts._running == ((0, "a call", "runs"),)


def test_a_dropped_group_is_ended_by_a_thread_and_not_while_garbage_is_collected() -> None:
    ended_by: list[str] = []
    hosts: Any = SimpleNamespace(
        gone=False,
        closed=False,
        broken="lost a rank",
        close=lambda: ended_by.append(threading.current_thread().name),
    )
    recipe: Any = SimpleNamespace(start=print, options=SimpleNamespace(detached=False))
    Hosts([], [], [], ("", 0), ordered=True)  # the thread comes with them
    supervisor = RaySupervisor(hosts, recipe)
    with threading.Lock():  # what is held by whoever happens to collect garbage
        del supervisor
        gc.collect()
    assert eventually(lambda: bool(ended_by))
    assert ended_by != [threading.current_thread().name]


def test_attaching_to_a_busy_group_says_so(group: RayWorkerGroup) -> None:
    call = group.act.submit("wait2")
    with pytest.raises(CallTimeoutError, match=r"workers .*_0:0.*startup_timeout_s=0.1.* busy"):
        RayWorkerGroup.from_detached(worker_names=group.worker_names, startup_timeout_s=0.1)
    with pytest.raises(CallTimeoutError, match=r"number \[0, 1\] of worker_handles") as caught:
        RayWorkerGroup.from_detached(worker_handles=group.workers, startup_timeout_s=0.1)
    assert caught.value.pending_ranks == (0, 1)
    assert call.result() == ["wait2"] * 2


def test_what_garbage_leaves_to_do_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected anywhere, also within a start of a thread, which cannot be nested."""
    monkeypatch.setattr(owned, "_started", threading.Lock())
    monkeypatch.setattr(owned, "threading", None)
    owned.later(int)
