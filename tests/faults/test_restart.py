"""Restarting a group: what is new, what stays, and what no longer counts."""

from __future__ import annotations

import os
import signal

import pytest
import ray

from single_controller import GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, colocate
from tests.faults.victim import Victim
from tests.waiting import eventually, is_alive

pytestmark = pytest.mark.slow


class Other(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def pid(self) -> int:
        return os.getpid()


def test_a_restarted_group_has_new_processes_the_same_ranks_and_all_its_roles(
    pool: RayResourcePool,
) -> None:
    with colocate(pool, victim=Victim, other=Other) as both:
        before, names = both.victim.look(), both.hosts.worker_names
        old = both.victim.act.submit(PerRank(["fine", "sleep"]))
        finished = both.other.pid.options(ranks=[0]).submit()
        assert finished.result() == [before[0][1]]
        both.victim.restart()
        after = both.victim.look()
        assert [rank for rank, *_ in after] == [0, 1]
        assert not {pid for _, pid, *_ in before} & {pid for _, pid, *_ in after}
        left = [f"/proc/{pid}" for _, pid, *_ in before]
        assert eventually(lambda: not any(map(os.path.exists, left)))
        assert [state for _, _, state, _ in after] == ["restored on 0", "restored on 1"]
        assert both.victim.all_reduce() == [3.0, 3.0]
        assert both.other.pid() == [pid for _, pid, *_ in after]
        assert both.hosts.worker_names == names
        assert [row.pid for row in both.other.describe().rows] == both.other.pid()
        for former in (old, finished):
            with pytest.raises(GroupBrokenError, match="the group was restarted"):
                former.result()
        assert both.other.restarts == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, None])
def test_what_the_former_processes_have_started_is_gone_when_others_start(
    pool: RayResourcePool, how: int | None
) -> None:
    """An engine with a session of its own would still have the device."""
    with RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as group:
        engines = [pid for pids in group.act("engines") for pid in pids]
        assert all(map(is_alive, engines))
        assert len(engines) == 6
        for _, pid, *_ in group.look() if how else ():
            os.kill(pid, how)
        group.restart()
        assert not any(map(is_alive, engines))
        last = [pid for pids in group.act("engines") for pid in pids]
    assert not any(map(is_alive, last))


@ray.remote(num_cpus=0)
class Copy:
    """Has a group that another process started."""

    def take(self, group: RayWorkerGroup) -> int:
        self.group = group
        return group.world_size

    def use(self) -> str:
        try:
            return str(self.group.act("fine"))
        except GroupBrokenError as error:
            return str(error)


def test_copies_of_a_group_in_other_processes_say_that_it_was_restarted_or_closed(
    pool: RayResourcePool,
) -> None:
    copy = Copy.remote()
    with RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as group:
        assert ray.get(copy.take.remote(group)) == 2
        group.restart()
        for _ in range(2):
            assert "the group was restarted by another process" in ray.get(copy.use.remote())
        ray.get(copy.take.remote(group))
        assert ray.get(copy.use.remote()) == "['fine', 'fine']"
    for _ in range(2):
        assert "the group was closed" in ray.get(copy.use.remote())


def test_a_group_told_to_restart_does_so_on_the_next_call_within_its_budget(
    pool: RayResourcePool,
) -> None:
    with colocate(pool, on_failure="restart", max_restarts=1, victim=Victim) as both:
        group = both.victim
        with pytest.raises(KeyError):
            group.act(PerRank(["fine", "raise"]))
        assert group.look()[0][2] == "new on 0", "all ranks finished, so nothing is restarted"
        with pytest.raises(WorkerDiedError):
            group.act(PerRank(["fine", "kill"]))
        assert group.look()[1][2] == "restored on 1"
        with pytest.raises(WorkerDiedError):
            group.act(PerRank(["exit3", "fine"]))
        with pytest.raises(GroupBrokenError, match=r"lost a rank.*max_restarts=1"):
            group.look()
        group.restart()
        assert group.act("fine") == ["fine", "fine"]
        group.close()
        with pytest.raises(GroupBrokenError, match="a closed group cannot be restarted"):
            group.restart()


class Forgetful(Victim):
    def restore(self) -> None:
        raise FileNotFoundError("no checkpoint")


def test_a_restart_that_fails_says_why_and_can_be_tried_again(pool: RayResourcePool) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Forgetful)) as group:
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=r"Forgetful.restore failed") as caught:
                group.restart()
            assert isinstance(caught.value, WorkerError)
            with pytest.raises(GroupBrokenError, match=r"restart failed.*no checkpoint"):
                group.look()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "retry"}, "on_failure must be 'raise' or 'restart'; got 'retry'"),
        ({"max_restarts": -1}, "max_restarts must be a count; got -1"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(
    pool: RayResourcePool, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RayWorkerGroup(pool, RayClassWithInitArgs(Victim), **options)  # type: ignore[arg-type]
