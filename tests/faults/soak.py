"""Random faults in a row, on one group: what each was reported as, how soon, what was left.

    make soak ARGS="--faults 100 --seed 1"

A fault counts as detected when the driver got the error that it ought to, and as survived when
the group then met in an all-reduce again, restarted if it had to be. The seconds of a fault at
start include the start of the processes, which load on the machine draws out.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
from ray.util.placement_group import placement_group_table

from single_controller import CallTimeoutError, GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.faults.victim import Victim
from tests.waiting import eventually

DEADLINE_S = 1.0
MOST_S = 60.0


Cause: TypeAlias = Callable[[RayWorkerGroup, RayResourcePool], Any]


@dataclass(frozen=True)
class Fault:
    """A way to break a group, and the error that the driver ought to get.

    `given_s` is how long the driver was told to wait, which does not count as time to the error.
    """

    name: str
    error: type[Exception] | tuple[type[Exception], ...]
    cause: Cause
    given_s: float = 0


def call(*what: str, timeout_s: float = MOST_S) -> Cause:
    return lambda group, _: group.act.options(timeout_s=timeout_s)(PerRank(list(what)))


def start(*where: str, timeout_s: float = MOST_S) -> Cause:
    spec = RayClassWithInitArgs(Victim, where)
    return lambda _, pool: RayWorkerGroup(pool, spec, startup_timeout_s=timeout_s)


def kill_idle(group: RayWorkerGroup, _: RayResourcePool) -> None:
    os.kill(group.look()[0][1], signal.SIGKILL)
    while True:
        group.look()


def kill_from_outside(group: RayWorkerGroup, _: RayResourcePool) -> None:
    pid = group.look()[1][1]
    waiting = group.act.submit(PerRank(["collective", "sleep"]), timeout_s=MOST_S)
    threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
    waiting.result()


FAULTS = (
    Fault("killed idle", (WorkerDiedError, GroupBrokenError), kill_idle),
    Fault("killed in a call", WorkerDiedError, call("fine", "kill")),
    Fault("killed while others wait for it", WorkerDiedError, kill_from_outside, 0.1),
    Fault("killed in a collective", WorkerDiedError, call("collective", "kill")),
    Fault("raises while others wait for it", KeyError, call("collective", "raise")),
    Fault("raises", KeyError, call("fine", "raise")),
    Fault("segmentation fault", WorkerDiedError, call("segfault", "fine")),
    Fault("exits with 0", WorkerDiedError, call("fine", "exit0")),
    Fault("exits with 3", WorkerDiedError, call("exit3", "collective")),
    Fault("sleeps", CallTimeoutError, call("fine", "sleep", timeout_s=DEADLINE_S), DEADLINE_S),
    Fault("stuck in C", CallTimeoutError, call("in_c", "fine", timeout_s=DEADLINE_S), DEADLINE_S),
    Fault("stopped", CallTimeoutError, call("fine", "stop", timeout_s=DEADLINE_S), DEADLINE_S),
    Fault("unpicklable result", WorkerError, call("fine", "lock")),
    Fault("unreadable result", WorkerError, call("unreadable", "fine")),
    Fault("killed at start", WorkerDiedError, start("fine", "kill")),
    Fault("raises at start", KeyError, start("raise", "sleep")),
    Fault("stuck at start", CallTimeoutError, start("fine", "sleep", timeout_s=3.0), 3.0),
)


def inflict(fault: Fault, group: RayWorkerGroup, pool: RayResourcePool) -> tuple[bool, str]:
    """Whether the fault was detected and survived; what the driver got, and how soon."""
    got, detected, survived = "nothing", False, False
    began = time.monotonic()
    try:
        fault.cause(group, pool)
    except Exception as error:
        got, detected = type(error).__name__, isinstance(error, fault.error)
    seconds = max(0.0, time.monotonic() - began - fault.given_s)
    try:
        survived = whole(group)
    except Exception as error:
        got += f", then {error!r:.200}"
    return detected and survived, f"{seconds:6.2f} s  {got}"


def whole(group: RayWorkerGroup) -> bool:
    try:
        return group.all_reduce.options(timeout_s=MOST_S)() == [3.0, 3.0]
    except GroupBrokenError:
        group.restart()
        return group.all_reduce.options(timeout_s=MOST_S)() == [3.0, 3.0]


def leaks() -> dict[str, int]:
    """What is left of all groups and pools, once the cluster has had time to notice."""

    def found() -> dict[str, int]:
        store = "object_store_memory"
        used = ray.cluster_resources()[store] - ray.available_resources().get(store, 0)
        groups = placement_group_table().values()
        return {
            "processes": len(hosts()),
            "placement groups": sum(group["state"] != "REMOVED" for group in groups),
            "object-store bytes": int(used),
        }

    eventually(lambda: not any(found().values()), 30)
    return found()


def hosts() -> list[str]:
    """Processes of this cluster that hold roles."""
    session = ray._private.worker._global_node.get_session_dir_path()
    mine = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode().strip()
            log = os.readlink(f"/proc/{pid}/fd/2")
        except OSError:
            continue
        if command.startswith("ray::") and "IDLE" not in command and log.startswith(session):
            mine.append(pid)
    return mine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    ray.init(
        "local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    good = 0
    with (
        RayResourcePool([2], cpus_per_process=0.5) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as group,
    ):
        whole(group)
        # Each kind once in every round, in an order of chance.
        order = [f for _ in range(options.faults) for f in chance.sample(FAULTS, len(FAULTS))]
        for number, fault in enumerate(order[: options.faults], start=1):
            well, told = inflict(fault, group, pool)
            good += well
            marks = "" if well else "  <-- NOT AS IT OUGHT TO BE"
            print(f"{number:>4}  {fault.name:<34}{told}{marks}", flush=True)
        print(f"\ndetected and survived: {good}, with {group.restarts} restarts")
    left = leaks()
    print("left: " + ", ".join(f"{count} {what}" for what, count in left.items()))
    ray.shutdown()
    return 0 if good == options.faults and not any(left.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
