"""Restarting a group of processes: what is new, what stays, and what no longer counts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from single_controller import GroupBrokenError
from single_controller.base import PerRank
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.faults.victim import Victim
from tests.waiting import eventually, is_alive

pytestmark = pytest.mark.slow


def test_a_restarted_group_has_new_processes_the_same_ranks_and_names(
    group: RayWorkerGroup,
) -> None:
    before, names, restarts = group.look(), group.worker_names, group.restarts
    finished = group.look.options(ranks=[0]).submit()
    assert finished.result() == before[:1]
    old = group.act.submit(PerRank(["fine", "sleep"]))
    os.kill(before[0][1], signal.SIGSTOP)  # a process that answers nothing
    group.restart()
    after = group.look()
    assert [rank for rank, *_ in after] == [0, 1]
    assert not {pid for _, pid, *_ in before} & {pid for _, pid, *_ in after}
    assert eventually(lambda: not any(is_alive(pid) for _, pid, *_ in before))
    assert [state for _, _, state, _ in after] == ["restored on 0", "restored on 1"]
    assert group.all_reduce() == [3.0, 3.0]
    assert group.worker_names == names
    assert [row.pid for row in group.describe().rows] == [pid for _, pid, *_ in after]
    for former in (old, finished):
        with pytest.raises(GroupBrokenError, match="the group was restarted"):
            former.result()
    assert group.restarts == restarts + 1


def test_what_the_former_processes_have_started_is_gone_when_others_start(
    pool: RayResourcePool,
) -> None:
    """An engine with a session of its own would still have the device."""
    with RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as group:
        for how in (None, signal.SIGKILL, signal.SIGSTOP):
            engines = [pid for pids in group.act("engines") for pid in pids]
            assert all(map(is_alive, engines))
            assert len(engines) == 8
            for _, pid, *_ in group.look() if how else ():
                os.kill(pid, how)
            group.restart()
            assert not any(map(is_alive, engines))
        last = [pid for pids in group.act("engines") for pid in pids]
    assert not any(map(is_alive, last))


def test_where_tail_cannot_wait_for_a_process_nothing_is_ended(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    (tmp_path / "tail").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "tail").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with RayWorkerGroup(pool, RayClassWithInitArgs(Victim), worker_env=env) as group:
        assert group.act("moment") == [None, None]
        assert group.act("fine") == ["fine", "fine"]


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


ENDED = "the group was closed or restarted by another process"


def test_copies_of_a_group_in_other_processes_say_that_it_was_restarted_or_closed(
    pool: RayResourcePool,
) -> None:
    copy = Copy.remote()
    with RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as group:
        assert ray.get(copy.take.remote(group)) == 2
        group.restart()
        for _ in range(2):
            assert ENDED in ray.get(copy.use.remote())
        ray.get(copy.take.remote(group))
        assert ray.get(copy.use.remote()) == "['fine', 'fine']"
    for _ in range(2):
        assert ENDED in ray.get(copy.use.remote())
