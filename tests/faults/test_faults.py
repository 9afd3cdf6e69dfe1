"""Faults of a worker: what the driver is told, how soon, and whether the group goes on."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator

import pytest

from single_controller import CallTimeoutError, GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank
from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from tests.faults.victim import Victim
from tests.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(group: RayWorkerGroup) -> Iterator[RayWorkerGroup]:
    """Both ranks there and able to meet. What a test breaks is started anew."""
    assert group.all_reduce() == [3.0, 3.0]
    yield group
    group.restart()


def test_a_rank_that_raises_while_others_wait_in_a_collective_is_the_cause_and_ends_them(
    whole: RayWorkerGroup,
) -> None:
    waiting = whole.look()[0][1]
    with pytest.raises(KeyError, match="broken on purpose") as caught:
        whole.act.options(timeout_s=60)(PerRank(["collective", "raise"]))
    error = caught.value
    assert isinstance(error, WorkerError)
    assert (error.rank, list(error.stuck)) == (1, [0])
    assert "in all_reduce" in error.stuck[0]
    assert "Ranks [0] waited for it in a collective and were ended" in str(error)
    assert "about to fail" in error.log_tail
    assert eventually(lambda: not os.path.exists(f"/proc/{waiting}"))
    with pytest.raises(GroupBrokenError, match=r"ranks \[0\] waited in a collective.*restart\(\)"):
        whole.look()


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("kill", None, ": rank 1 .* died.*\n.*worker process has died.*last words"),
        ("exit0", 0, r": rank 1 .* died: it exited with code 0, by sys\.exit\(0\)"),
        pytest.param("segfault", None, ": rank 1 .* died.*\n.*SIGSEGV", marks=pytest.mark.long),
        pytest.param("exit3", None, ": rank 1 .* died", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_dies_in_a_call_is_named_with_what_is_known_and_its_last_words(
    whole: RayWorkerGroup, what: str, code: int | None, said: str
) -> None:
    with pytest.raises(WorkerDiedError, match=f"(?s)Victim.act{said}") as caught:
        whole.act.options(timeout_s=60)(PerRank(["collective", what]))
    assert (caught.value.rank, caught.value.exit_code) == (1, code)
    with pytest.raises(GroupBrokenError, match="lost a rank"):
        whole.look()


def test_a_rank_killed_idle_is_reported_by_the_watcher_and_by_the_next_call(
    group: RayWorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[WorkerDiedError] = []

    def tell(death: WorkerDiedError) -> None:
        found.append(death)
        raise KeyError("from on_death")

    group.start_worker_aliveness_check(0.05, on_death=tell)
    os.kill(group.look()[1][1], signal.SIGKILL)
    assert eventually(lambda: bool(found))
    assert found[0].rank == 1
    assert [row.state for row in group.describe().rows] == ["broken", "dead"]
    with pytest.raises(GroupBrokenError, match=r"lost a rank: .*rank 1 .* died"):
        group.look()
    group.restart()
    os.kill(group.look()[0][1], signal.SIGKILL)
    assert eventually(lambda: len(found) == 2), "the new processes are not watched"
    assert "KeyError: 'from on_death'" in caplog.text
    group.restart()


def test_a_result_that_cannot_be_read_is_that_ranks_error_and_the_group_goes_on(
    group: RayWorkerGroup,
) -> None:
    with pytest.raises(WorkerError, match=r"(?s)Victim.act failed on rank 1.*invalid literal"):
        group.act(PerRank(["fine", "unreadable"]))
    assert group.act("fine") == ["fine", "fine"]


def test_a_call_has_its_own_deadline_else_its_methods_else_its_groups(
    group: RayWorkerGroup,
) -> None:
    spec = RayClassWithInitArgs(Victim)
    timed = RayWorkerGroup(worker_handles=group.workers, ray_cls_with_init=spec, call_timeout_s=0.3)
    for call, seconds in (
        (timed.hurry.options(timeout_s=0.1), 0.1),
        (timed.hurry, 0.2),
        (lambda: timed.act("moment"), 0.3),
    ):
        with pytest.raises(CallTimeoutError, match=rf" not finished after {seconds} s") as caught:
            call()
        assert "in _moment" in caught.value.stacks[0]
        assert timed._hosts.now.settle(60)
    assert timed.hurry.options(timeout_s=math.inf)() == [None, None]
