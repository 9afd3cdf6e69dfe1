"""A detached group outlives the driver that started it; the next driver finds it by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from tests.conformance.probe import Probe, batch, values
from tests.waiting import eventually

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


@pytest.fixture
def pids(cluster: None) -> Iterator[list[int]]:
    """The processes of a detached group whose driver has ended."""
    context = ray.get_runtime_context()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, context.namespace],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": str(context.gcs_address)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stderr
        # Ray's own lines may be among them
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("pids "))
        yield [int(pid) for pid in line.split()[1:]]
    finally:
        for key, group in placement_group_table().items():
            if group["name"].startswith("lasting_") and group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(key)))


def test_the_next_driver_finds_the_group_as_it_was_left(pids: list[int]) -> None:
    spec = RayClassWithInitArgs(Probe)
    group = RayWorkerGroup.from_detached(name_prefix="lasting_", ray_cls_with_init=spec)
    assert [row.pid for row in group.describe().rows] == pids
    assert group.count() == [1, 1]
    assert values(group.add_rank(batch(4))) == [0, 1, 3, 4]
    assert values(group.meshed(data=batch(4))) == [0, 1, 3, 4]
    assert values(group.grow(batch(2)).get(timeout=60)) == [0, 1, 1]
    again = RayWorkerGroup.from_detached(worker_names=group.worker_names, ray_cls_with_init=spec)
    assert again.world_size == 2
    again.close()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
