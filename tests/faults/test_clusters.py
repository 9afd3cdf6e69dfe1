"""Faults that need a cluster of their own: memory, the object store."""

from __future__ import annotations

import pytest

from tests.faults.drivers import START, run

pytestmark = pytest.mark.long

MEMORY = """
pool = RayResourcePool([2], cpus_per_process=0.5)
group = RayWorkerGroup(pool, spec)
try:
    group.act.options(timeout_s=100)(PerRank(["fine", "hoard"]))
except WorkerDiedError as error:
    say(type(error).__name__, error.rank, error)
group.close()
pool.close()
"""


def test_a_rank_that_ray_ends_for_memory_says_so() -> None:
    import psutil

    limit = psutil.virtual_memory().percent / 100 + 0.06
    system = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 100}
    output = run(START + MEMORY, f'{{"_system_config": {system}}}')
    assert "WorkerDiedError 1" in output
    assert "low on memory" in output or "memory usage" in output


FULL = """
pool = RayResourcePool([2], cpus_per_process=0.5)
group = RayWorkerGroup(pool, spec)
try:
    group.act.options(timeout_s=100)(PerRank(["fine", "large"]))
except WorkerError as error:
    say(type(error).__name__, error.rank, str(error)[:300])
say(group.act("fine"))
"""


def test_a_result_for_which_the_object_store_has_no_room_is_that_ranks_error() -> None:
    system = {"local_fs_capacity_threshold": 0.0001}  # nor has the disk behind it
    output = run(
        START + FULL, f'{{"object_store_memory": 100_000_000, "_system_config": {system}}}'
    )
    assert "WorkerError" in output
    assert "['fine', 'fine']" in output
