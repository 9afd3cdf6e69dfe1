"""What a rank is doing, seen without its help."""

from __future__ import annotations

import asyncio
import pickle
import signal
from collections.abc import Iterator

import pytest

from single_controller import CallTimeoutError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(group: RayWorkerGroup) -> Iterator[RayWorkerGroup]:
    """Started anew if a test left a rank stuck."""
    yield group
    group.restart()


@pytest.mark.parametrize(
    "looks", [20, pytest.param(1_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_seeing_its_stacks_does_a_process_that_never_stops_running_no_harm(
    group: RayWorkerGroup, looks: int
) -> None:
    pids = [pid for _, pid, *_ in group.look()]
    group.act("spin")
    for _ in range(looks):
        assert group.stacks()[0].count("in _spin_on") == 3
    assert [pid for _, pid, *_ in group.look()] == pids
    group.act("spin_down")


def test_a_rank_that_is_late_is_named_with_its_stack_and_no_frames_but_the_users(
    whole: RayWorkerGroup,
) -> None:
    with pytest.raises(CallTimeoutError, match=r"ranks \[1\] of 2 had not finished") as caught:
        whole.act.options(timeout_s=1)(PerRank(["fine", "sleep"]))
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.pending_ranks == (1,)
    assert list(error.stacks) == [1]
    lines = error.stacks[1].splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["wait", "wait", "_sleep", "act"]
    assert "rank 1 (most recent call first):\n" + error.stacks[1] in str(error)
    assert whole.stacks()[0] == "  in no call"


@pytest.mark.parametrize(("what", "state"), [("stop", "T"), ("in_c", "S")])
def test_a_process_that_runs_no_python_says_so_instead_of_a_stack(
    whole: RayWorkerGroup, what: str, state: str
) -> None:
    pid = whole.look()[0][1]
    with pytest.raises(CallTimeoutError) as caught:
        whole.act.options(timeout_s=1)(PerRank([what, "fine"]))
    assert caught.value.stacks == {
        0: f"no stack: process {pid} does not answer (its state is {state})"
    }


class Awaiting(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def outer(self) -> None:
        await self.inner()

    async def inner(self) -> None:
        await asyncio.Event().wait()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def block(self) -> None:
        signal.pause()


def test_what_a_coroutine_awaits_and_what_blocks_its_loop_are_shown(
    pool: RayResourcePool,
) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Awaiting)) as group:
        group.outer.submit()
        assert eventually(lambda: all("in inner" in text for text in group.stacks().values()))
        lines = group.stacks()[0].splitlines()
        assert [line.rpartition(" ")[2] for line in lines] == ["wait", "inner", "outer"]
        group.block.submit()
        assert eventually(lambda: "in block" in group.stacks()[1])
