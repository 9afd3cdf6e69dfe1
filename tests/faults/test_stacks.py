"""What a rank is doing, seen without its help."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from single_controller import CallTimeoutError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    process,
)
from tests.waiting import eventually, is_alive

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(group: RayWorkerGroup) -> Iterator[RayWorkerGroup]:
    """Started anew if a test left a rank stuck."""
    yield group
    group.restart()


def test_a_rank_stuck_in_c_code_with_the_interpreters_lock_is_named_with_its_stack(
    whole: RayWorkerGroup,
) -> None:
    whole.act("fine")
    with pytest.raises(CallTimeoutError, match=r"ranks \[1\] of 2 had not finished") as caught:
        whole.act.options(timeout_s=4)(PerRank(["fine", "in_c"]))
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.pending_ranks == (1,)
    assert list(error.stacks) == [1]
    lines = error.stacks[1].splitlines()
    assert "victim.py" in lines[0]
    assert "in _in_c" in lines[0]
    assert "in act" in lines[1]
    assert len(lines) == 2, "frames that are not the user's"
    assert "rank 1 (most recent call first):\n" + error.stacks[1] in str(error)


BUSY = """
import threading
from single_controller.ray.process import arrive

def work():
    while True:
        exec("def f(n): return n and f(n - 1)\\nf(30)", {})

info = arrive("node", "127.0.0.1")
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
print(info.stacks_fd, info.started, flush=True)
threading.Event().wait()
"""


@pytest.fixture
def busy() -> Iterator[process.ProcessInfo]:
    """A process whose threads never stop running Python."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        descriptor, started = map(int, one.stdout.readline().split())
        yield process.ProcessInfo("node", "127.0.0.1", one.pid, started, descriptor, "")
        assert one.poll() is None
        one.kill()


def test_a_process_that_runs_writes_its_stacks_by_itself(
    busy: process.ProcessInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_signal", lambda info: pytest.fail("it was interrupted"))
    monkeypatch.setattr(process, "_ASKED_S", 20.0)
    [stacks] = process.read_stacks([busy])
    assert stacks.count("in work") == 3


@pytest.mark.long
def test_seeing_its_stacks_does_a_process_no_harm(busy: process.ProcessInfo) -> None:
    for _ in range(1_000):
        process.read_stacks([busy])
        assert process.is_running(busy)


def test_a_process_that_is_stopped_says_so_instead_of_a_stack(whole: RayWorkerGroup) -> None:
    pid = whole.look()[0][1]
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T")
    stacks = whole.stacks()
    assert f"process {pid} does not answer (its state is T)" in stacks[0]
    assert stacks[1] == "  in no call"


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


def test_how_a_process_ended_is_waited_for_until_its_parent_has_asked() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    found = process._looked_up(process.ProcessInfo("", "", child.pid, 0, -1, ""))
    watch = process.ExitWatch(found)
    child.kill()
    assert eventually(lambda: not is_alive(child.pid))
    with ThreadPoolExecutor(1) as threads:
        code = threads.submit(watch.exit_code, 30)
        assert not wait([code], timeout=0.2).done
        child.wait()
        assert code.result(30) == -signal.SIGKILL


def test_who_cannot_watch_a_process_ends_nothing(tmp_path: Path) -> None:
    """As where `tail` is one without --pid."""
    (tmp_path / "tail").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "tail").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as watched:
        command = ["sh", "-c", process._WATCHER, "watcher", str(watched.pid), "NO_MARK=1"]
        subprocess.run(command, env=environment, check=False)
        assert watched.poll() is None
        watched.kill()


def test_what_a_process_leaves_in_its_group_ends_whatever_its_environment_is() -> None:
    command = ["sh", "-c", "env -i sleep 1000 > /dev/null & echo $!"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as ended:
        assert ended.stdout is not None
        heir = int(ended.stdout.read())
    command = ["sh", "-c", process._WATCHER, "watcher", str(ended.pid), "NO_MARK=1"]
    subprocess.run(command, check=False)
    assert eventually(lambda: process._alive(heir) is None)
