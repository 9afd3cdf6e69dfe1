"""Faults of a worker: what the driver is told, how soon, and whether the group goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from single_controller import GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank
from single_controller.ray import RayWorkerGroup
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
    ("what", "how", "code"),
    [
        ("kill", "was killed by signal SIGKILL", -9),
        ("exit0", "exited with code 0", 0),
        pytest.param("segfault", "was killed by signal SIGSEGV", -11, marks=pytest.mark.long),
        pytest.param("exit3", "exited with code 3", 3, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_dies_in_a_call_says_how_and_with_which_last_words(
    whole: RayWorkerGroup, what: str, how: str, code: int
) -> None:
    with pytest.raises(WorkerDiedError) as caught:
        whole.act.options(timeout_s=60)(PerRank(["collective", what]))
    error = caught.value
    assert (error.rank, error.exit_code) == (1, code)
    assert str(error).startswith("Victim.act: rank 1 (node ")
    assert f"died: it {how}" in str(error)
    if what == "kill":
        assert "last words" in str(error)
    with pytest.raises(GroupBrokenError, match="lost a rank"):
        whole.look()


def test_a_rank_killed_idle_is_reported_by_the_watcher_and_by_the_next_call(
    group: RayWorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[WorkerDiedError] = []

    def tell(death: WorkerDiedError) -> None:
        found.append(death)
        raise KeyError("from on_death")

    with pytest.raises(ValueError, match="every_n_seconds must be a finite number above 0; got 0"):
        group.start_worker_aliveness_check(0)
    group.start_worker_aliveness_check(0.05, on_death=tell)
    os.kill(group.look()[1][1], signal.SIGKILL)
    assert eventually(lambda: bool(found))
    assert (found[0].rank, found[0].exit_code) == (1, -signal.SIGKILL)
    with pytest.raises(GroupBrokenError, match=r"lost a rank.*SIGKILL"):
        group.look()
    group.restart()
    os.kill(group.look()[0][1], signal.SIGKILL)
    assert eventually(lambda: len(found) == 2), "the new processes are not watched"
    assert "KeyError: 'from on_death'" in caplog.text
    group.restart()


@pytest.mark.long
def test_a_rank_killed_from_outside_in_a_call_ends_the_call(group: RayWorkerGroup) -> None:
    pid = group.look()[1][1]
    call = group.act.options(timeout_s=60).submit(PerRank(["fine", "sleep"]))
    assert eventually(lambda: "in _sleep" in group.stacks()[1])
    threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerDiedError, match=r"rank 1 .*SIGKILL"):
        call.result()
    group.restart()


def test_a_stopped_process_does_not_keep_the_group_from_ending(group: RayWorkerGroup) -> None:
    pids = [pid for _, pid, *_ in group.look()]
    os.kill(pids[0], signal.SIGSTOP)
    group.restart()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


@pytest.mark.parametrize(
    ("what", "message"),
    [("lock", "cannot pickle '_thread.lock'"), ("unreadable", "invalid literal")],
)
def test_a_result_that_cannot_travel_is_that_ranks_error_and_the_group_goes_on(
    group: RayWorkerGroup, what: str, message: str
) -> None:
    with pytest.raises(WorkerError, match=rf"(?s)Victim.act failed on rank 1.*{message}"):
        group.act(PerRank(["fine", what]))
    assert group.act("fine") == ["fine", "fine"]
