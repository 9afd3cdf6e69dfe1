"""A detached group outlives the driver that started it; the next driver finds it by name,
and gives back what it held."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from tests.conformance.probe import Probe, batch, values
from tests.waiting import eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import ray
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.conformance.probe import Probe

ray.init(namespace=sys.argv[1], logging_level="ERROR", log_to_driver=False)
pool = RayResourcePool([2], cpus_per_process=0.1, detached=True, name_prefix="lasting_")
spec = RayClassWithInitArgs(Probe)
group = RayWorkerGroup(pool, spec, name_prefix="lasting_", detached=True)
group.echo(1)
print("pids", *(row.pid for row in group.describe().rows), flush=True)
"""

CLOSES_AT_EXIT = """
import atexit
import sys
import ray
from single_controller.ray import RayResourcePool

ray.init(namespace=sys.argv[1], logging_level="ERROR", log_to_driver=False)
pool = RayResourcePool([1, 1], cpus_per_process=0.1, detached=True, name_prefix="at_exit_")
print("groups", *(group.id.hex() for group in pool.get_placement_groups()), flush=True)
atexit.register(pool.close)
"""


def run(program: str) -> list[str]:
    """What a driver that has ended said."""
    context = ray.get_runtime_context()
    done = subprocess.run(
        [sys.executable, "-c", program, context.namespace],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": str(context.gcs_address)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Ray's own lines may be among them
    said = re.compile(r"(?:pids|groups) (.+)").fullmatch
    (line,) = filter(None, map(said, done.stdout.splitlines()))
    return line[1].split()


def left_behind() -> list[int]:
    """The processes of a detached group whose driver has ended."""
    return [*map(int, run(PROGRAM))]


def reservations() -> list[str]:
    """The states of the placement groups of the other driver's pool."""
    groups = placement_group_table().values()
    return [group["state"] for group in groups if group["name"].startswith("lasting_")]


def test_the_next_driver_finds_the_group_as_it_was_left(cluster: None) -> None:
    pids = left_behind()
    spec = RayClassWithInitArgs(Probe)
    group = RayWorkerGroup.from_detached(name_prefix="lasting_", ray_cls_with_init=spec)
    assert [row.pid for row in group.describe().rows] == pids
    assert group.count() == [1, 1]
    assert values(group.add_rank(batch(4))) == [0, 1, 3, 4]
    assert values(group.meshed(data=batch(4))) == [0, 1, 3, 4]
    assert values(group.grow(batch(2)).get(timeout=60)) == [0, 1, 1]
    again = RayWorkerGroup.from_detached(worker_names=group.worker_names, ray_cls_with_init=spec)
    assert again.world_size == 2
    assert reservations() == ["CREATED"]
    again.close()
    assert reservations() == ["REMOVED"]
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_a_pool_is_closed_at_the_exit_of_its_driver(cluster: None) -> None:
    """The interpreter starts no threads then."""
    groups = run(CLOSES_AT_EXIT)
    assert [placement_group_table()[group]["state"] for group in groups] == ["REMOVED"] * 2
