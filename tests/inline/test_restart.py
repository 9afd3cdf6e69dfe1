"""What a restart, a death and a stack are where there is no process to lose."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from single_controller import (
    CallTimeoutError,
    ClassWithInitArgs,
    GroupBrokenError,
    ResourcePool,
    WorkerDiedError,
)
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import InlineWorkerGroup
from tests.waiting import eventually


class Async(Worker):
    restored = ""

    async def restore(self) -> None:
        await asyncio.sleep(0)
        self.restored = f"on {self.rank}"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def look(self) -> str:
        return self.restored

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def number(self) -> int:
        return 3

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def nap(self, seconds: float, leave: bool = False) -> None:
        await asyncio.sleep(seconds)
        self.leave(leave)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def leave(self, now: bool = True) -> None:
        if now:
            sys.exit(3)

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def make_leave(self, other: Any) -> None:
        other.leave()


@pytest.fixture
def group() -> Iterator[Any]:
    with InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(Async)) as two:
        yield two


def test_a_restart_builds_other_workers_and_ends_calls_that_wait(group: Any) -> None:
    before, waiting = group.workers, group.nap.submit(60)
    group.restart()
    assert group.look() == ["on 0", "on 1"]
    assert not set(before) & set(group.workers)
    assert group.nap(0) == [None, None]
    with pytest.raises(GroupBrokenError, match="the group was restarted"):
        waiting.result()
    waiting, [handle, _] = group.nap.submit(60), group.number()
    assert handle.get() == 3
    group.close()
    with pytest.raises(GroupBrokenError, match="number returned is gone with its workers"):
        handle.get()
    with pytest.raises(GroupBrokenError, match="the group is closed"):
        waiting.result()


def test_a_death_is_told_also_after_a_restart(group: Any) -> None:
    told: list[int] = []
    group.start_worker_aliveness_check(0.01, on_death=lambda error: told.append(error.rank))
    for expected in ([1], [1, 0]):
        with pytest.raises(WorkerDiedError):
            group.leave(PerRank([expected[-1] == 0, expected[-1] == 1]))
        assert eventually(lambda expected=expected: told == expected)  # type: ignore[misc]
        group.restart()


def test_of_several_ranks_that_die_all_are_shown_as_dead_and_the_first_is_named(
    group: Any,
) -> None:
    for first, die in ((0, group.leave), (1, lambda: group.nap(PerRank([0.02, 0]), True))):
        for match in (f"rank {first} ", f"lost a rank: .*rank {first} "):
            with pytest.raises((WorkerDiedError, GroupBrokenError), match=match):
                die()
        assert [row.state for row in group.describe().rows] == ["dead", "dead"]
        group.restart()


def test_the_death_of_another_groups_rank_breaks_that_group_alone(group: Any) -> None:
    with InlineWorkerGroup(None, ClassWithInitArgs(Async)) as other:
        with pytest.raises(WorkerDiedError, match=r"Async\.leave: rank 0 "):
            group.make_leave(other)
        assert other.describe().rows[0].state == "dead"
        assert group.look() == ["", ""]


def test_a_rank_that_is_late_is_named_with_what_it_awaits(group: Any) -> None:
    assert group.stacks() == {0: "  in no call", 1: "  in no call"}
    with pytest.raises(CallTimeoutError) as caught:
        group.nap.options(timeout_s=0.01)(60)
    assert caught.value.pending_ranks == (0, 1)
    assert "in nap" in caught.value.stacks[1]
    assert "in nap" in group.stacks()[0]
