"""What the driver sees when a worker in a Ray actor dies, is interrupted or does not come back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from single_controller import GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.conformance.test_failure import Fragile
from tests.waiting import eventually

pytestmark = pytest.mark.slow


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
