"""Faults that need a cluster of their own: nodes, memory, the object store."""

from __future__ import annotations

import tempfile

import pytest

from tests.faults.drivers import START, run

pytestmark = pytest.mark.long

TWO_NODES = """
import ray.cluster_utils
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={'num_cpus': 1})
other = cluster.add_node(num_cpus=2, resources={'far': 2})
"""
NODES = TWO_NODES + START.replace('"local", num_cpus=4, include_dashboard=False', "cluster.address")
# Ray notices within seconds, and not a quarter of a minute, that a node is no more.
LEFT = (
    NODES.replace(
        "'num_cpus': 1",
        "'num_cpus': 1, '_system_config': "
        "{'health_check_period_ms': 1_000, 'health_check_failure_threshold': 2}",
    )
    + """
pool = RayResourcePool([2], resources_per_process={"far": 1}, placement_timeout_s=4)
pool.get_placement_groups()
cluster.remove_node(other, allow_graceful=False)
def refused():
    try:
        RayWorkerGroup(pool, spec, name_prefix="late_", startup_timeout_s=20)
    except WorkerDiedError as error:  # Ray was about to start it there
        say("died:", error.args[0])
    except ResourceError as error:
        say("refused:", error)
        return True
while not refused():
    pass
assert not ray.util.list_named_actors()
cluster.add_node(num_cpus=2, resources={"far": 2})
pool.placement_timeout_s = 60
with RayWorkerGroup(pool, spec, name_prefix="late_") as group:
    say("then", group.act("fine"))
pool.close()
ray.shutdown()
cluster.shutdown()
"""
)


def test_a_node_that_leaves_between_reservation_and_start_is_what_the_start_says() -> None:
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp") as folder:
        output = run(LEFT, RAY_TMPDIR=folder)
    assert "refused: the pool's reservation lost a node" in output
    assert "then ['fine', 'fine']" in output


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
