"""Drivers that are interrupted, killed, or go on for a second run: nothing of a group stays."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.faults.drivers import GROUP, START, launch, run
from tests.waiting import eventually, is_alive

pytestmark = pytest.mark.long


def pids_of(process: subprocess.Popen[str]) -> list[int]:
    """The workers' process ids, which the driver prints first."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("pids"):
            return [int(word) for word in line.split()[1:]]
    raise AssertionError("the driver printed no pids")


def gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


INTERRUPTED = """
try:
    group.act("sleep")
except KeyboardInterrupt:
    say("interrupted")
try:
    group.look()
except GroupBrokenError as error:
    say(error)
group.restart()
say("again", group.act("fine"))
group.close()
"""


def test_ctrl_c_in_a_call_returns_to_the_driver_which_is_told_that_ranks_are_busy() -> None:
    with launch(GROUP + INTERRUPTED) as driver:
        pids = pids_of(driver)
        assert eventually(lambda: all("ray::Victim.act" in command(pid) for pid in pids))
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=100)
    assert "interrupted" in output
    assert "ranks [0, 1] are still in a call that was interrupted" in output
    assert "again ['fine', 'fine']" in output
    assert eventually(lambda: gone(pids))


def command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def below(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it and those below it have started."""
    import psutil

    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


STARTING = """
say("starting")
try:
    with RayResourcePool([2], cpus_per_process=0.5) as pool:
        RayWorkerGroup(pool, RayClassWithInitArgs(Victim, ["sleep", "sleep"]))
except KeyboardInterrupt:
    say("interrupted")
from tests.faults.soak import leaks
say(leaks())
"""


def test_ctrl_c_while_a_group_starts_leaves_neither_processes_nor_reservations() -> None:
    with launch(START + STARTING) as driver:
        assert driver.stdout is not None
        assert any(line.startswith("starting") for line in driver.stdout)
        assert eventually(lambda: any("ray::Host.build" in command(pid) for pid in below(driver)))
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=100)
    assert "interrupted" in output
    assert "{'processes': 0, 'placement groups': 0, 'object-store bytes': 0}" in output


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_driver_that_ends_or_is_killed_takes_its_stuck_workers_with_it(end: str) -> None:
    stuck = f"group.act.submit('in_c')\nassert eventually(acting)\n{end}"
    with launch(GROUP + stuck) as driver:
        pids = pids_of(driver)
        assert eventually(lambda: gone(pids), 60)


SECOND = """
del group
pool.close()
for _ in range(2):
    with RayResourcePool([2], cpus_per_process=0.5) as pool, RayWorkerGroup(pool, spec) as group:
        say(group.act("fine"))
group = RayWorkerGroup(pool, spec, call_timeout_s=1)
try:
    group.act("in_c")
except CallTimeoutError:
    stuck = [row.pid for row in group.describe().rows]
    del group
assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in stuck)), "not dropped"
pool.close()
from tests.faults.soak import leaks
say(leaks())
"""


def test_a_second_run_in_one_session_works_and_a_dropped_group_that_is_stuck_ends() -> None:
    output = run(GROUP + SECOND)
    assert output.count("['fine', 'fine']") == 2
    assert "{'processes': 0, 'placement groups': 0, 'object-store bytes': 0}" in output


AFTER_SHUTDOWN = """
import asyncio, gc, pickle, torch
from protocol import DataProto
from tests.faults.test_futures import Maker

data = DataProto.from_dict({"x": torch.arange(4.0)})
pool = RayResourcePool([2], cpus_per_process=0.5)
maker = RayWorkerGroup(pool, RayClassWithInitArgs(Maker), on_failure="restart")
other = RayWorkerGroup(pool, spec)
other.start_worker_aliveness_check(0.1, on_death=lambda death: say("told of", death))
dropped = RayWorkerGroup(pool, spec)
dropped.act.submit("sleep")
fetched, unread, forgotten, pinned = maker.make(data), maker.make(data), maker.make(data), pin(data)
len(fetched), fetched.get(), maker.total(fetched), maker.stats(), maker.look()
handle, small = maker.hand_over(data)[0], maker.hand_over(1)[0]
small.get()
sent = maker.look.submit()
sent.result()
running = maker.act.submit("sleep")
ray.shutdown()

async def awaited(what):
    return await what

refused = {
    "call": maker.look, "submit": maker.look.submit, "later": lambda: maker.make(data),
    "result": sent.result, "running": running.result, "await": lambda: asyncio.run(awaited(sent)),
    "rows": unread.rows, "get": fetched.get, "get unread": unread.get,
    "await future": lambda: asyncio.run(awaited(unread)), "pickle": lambda: pickle.dumps(unread),
    "pinned": pinned.get, "stacks": maker.stacks, "explain": lambda: maker.explain("make", data),
    "handle": handle.get, "small": small.get, "take": lambda: maker.take(handle),
    "await handle": lambda: asyncio.run(awaited(handle)), "send": lambda: pickle.dumps(handle),
    "execute": lambda: other.execute_all_async("look"), "restart": maker.restart,
}

def look(when):
    slowest = 0
    for name, use in refused.items():
        began = time.monotonic()
        try:
            use()
        except GroupBrokenError as error:
            if "Ray was shut down" not in str(error):
                say(name, "raised", error)
        else:
            say(name, "was not refused")
        slowest = max(slowest, time.monotonic() - began)
    say("slowest", when, slowest)
    say(when, sent.done(), running.done(), running.cancel(), repr(running)[-5:])
    say(when, "handles", handle.done(), small.done())
    say(when, {row.state for row in maker.describe().rows}, maker.stats()["look"].bytes_in > 0)

look("without Ray")
dropped = forgotten = None
gc.collect()
other.close()
assert eventually(lambda: "aliveness" not in [t.name for t in threading.enumerate()])
say("Ray is there", ray.is_initialized())
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
look("with another")
gone = maker
del maker, unread, fetched, handle, small
refused.clear()
gone.close()
with RayResourcePool([1]) as pool, RayWorkerGroup(pool, RayClassWithInitArgs(Maker)) as group:
    say("new", group.act("fine"))
    try:
        group.total(pinned)
    except GroupBrokenError as error:
        say("pin", error)
"""


def test_nothing_but_the_user_starts_ray_and_what_was_made_before_says_that_it_is_gone() -> None:
    lines = run(START + AFTER_SHUTDOWN).splitlines()
    told = [line for line in lines if not line.startswith("slowest")]
    for when in ("without Ray", "with another"):
        assert f"{when} True True False done>" in told
        assert f"{when} handles True True" in told
        assert f"{when} {{'dead'}} True" in told
    assert "Ray is there False" in told
    assert "new ['fine']" in told
    assert any(line.startswith("pin Ray was shut down") for line in told)
    assert not [
        line for line in told if "raised" in line or "not refused" in line or "told" in line
    ]


@pytest.mark.parametrize("how", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)", "del group"])
def test_workers_and_what_they_have_started_end_with_the_driver_or_group(how: str) -> None:
    wait = "threading.Event().wait()" if how == "del group" else ""
    program = f"""
pids = [pid for _, pid, *_ in group.look()]
say("pids", *pids, *sum(group.act("engines"), []))
{how}
{wait}"""
    with launch(START + "group = RayWorkerGroup(RayResourcePool([2]), spec)\n" + program) as driver:
        pids = pids_of(driver)
        assert len(pids) == 10
        assert eventually(lambda: not any(map(is_alive, pids)))
        driver.kill()


DEVICES = """
from tests.conformance.probe import Probe
with RayResourcePool([2]) as pool:
    for options in ({}, {"device_name": "cpu"}, {"use_gpu": False}):
        with RayWorkerGroup(pool, RayClassWithInitArgs(Probe), **options) as group:
            found = group.execute_all_sync("get_cuda_visible_devices")
            say(options, group.device_name, [one.replace("not set", "") for one in found])
"""


def test_a_group_for_cpus_sees_no_device_of_a_pool_that_has_some() -> None:
    """Ray 2.60 leaves the variable alone where a worker gets none, others set it to nothing."""
    output = run(START + DEVICES, '{"num_gpus": 2}')
    assert "{} cuda ['0', '1']" in output
    assert "{'device_name': 'cpu'} cpu ['', '']" in output
    assert "{'use_gpu': False} cpu ['', '']" in output


NO_PYTHON = """
spec.update_options({"runtime_env": {"py_executable": "/no/python"}})
with RayResourcePool([2], max_colocate_count=1) as pool:
    pool.get_placement_groups()
    pool.placement_timeout_s = 0.5
    try:
        RayWorkerGroup(pool, spec, startup_timeout_s=1)
    except CallTimeoutError as error:
        say(error.pending_ranks, error)
"""


def test_a_process_that_does_not_start_is_told_from_a_pool_without_room() -> None:
    """In a cluster of its own: for a minute, Ray waits for the process to come."""
    output = run(START + NO_PYTHON)
    assert (
        "(0, 1) ranks [0, 1] had not finished 'arrive' of Victim after startup_timeout_s=1"
        in output
    )
    assert "{'py_executable': '/no/python'}" in output
