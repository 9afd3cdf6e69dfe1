"""Pools on a real cluster: what does not fit says so, what fits is given back."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from single_controller import ResourceError, WorkerDiedError
from single_controller.base import Worker
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    ResourcePoolManager,
    extract_pg_from_exist,
    merge_resource_pool,
    placement,
    split_resource_pool,
)
from tests.faults.victim import Victim
from tests.waiting import eventually

RESOURCES = {"CPU": 8.0, "NPU": 8.0}
ROOMY = placement.NodeResources("n", RESOURCES, RESOURCES)


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


def state(group: PlacementGroup) -> str:
    return str(placement_group_table(group)["state"])


def test_a_pool_the_cluster_cannot_hold_is_refused_at_once(cluster: None) -> None:
    with pytest.raises(ResourceError, match=r"(?s)9 × {CPU: 1}.* holds 8 processes, \d now: "):
        RayResourcePool([9]).get_placement_groups()
    with pytest.raises(ResourceError, match=r"0 of 0 fast_disk free"):
        RayResourcePool([1], resources_per_process={"fast_disk": 1}).get_placement_groups()
    with pytest.raises(ResourceError, match="0 of 0 GPU free"):
        RayWorkerGroup(RayResourcePool([1]), RayClassWithInitArgs(Worker), device_name="cuda")
    with pytest.raises(ValueError, match="at least one node"):
        RayResourcePool([]).get_placement_groups()


def test_a_busy_pool_is_waited_for_and_then_given_up_with_the_reason(cluster: None) -> None:
    with RayResourcePool([7], max_colocate_count=10) as holder:
        holder.get_placement_groups()
        assert eventually(lambda: free_cpus() == 1), "the groups that may share it are no more"
        late = RayResourcePool([4, 4], placement_timeout_s=0.3)
        with pytest.raises(ResourceError, match=r"placement_timeout_s=0.3") as caught:
            late.get_placement_groups()
    text = str(caught.value)
    assert "Close what holds" in text
    assert f"  {holder.name_prefix}single_controller_" in text, "who holds it is not said"
    assert ": 7 × {CPU: 1} (CREATED)" in text
    assert late.name_prefix not in text, "the pool itself holds nothing"
    assert eventually(lambda: free_cpus() == 8), "the part that was reserved is not given back"
    late.placement_timeout_s = 60
    with late:
        assert len(late.get_placement_groups()) == 2


def test_a_pool_gives_the_same_groups_in_the_same_order_on_every_call(cluster: None) -> None:
    with RayResourcePool([1, 2]) as pool:
        assert pool.device().name == "cpu", "the cluster has no accelerator"
        first = pool.get_placement_groups()
        assert [group.id for group in pool.get_placement_groups()] == [g.id for g in first]
        assert sorted(group.bundle_count for group in first) == [1, 2]
        assert len(pool.bundles()) == 3
        with pytest.raises(ValueError, match="cannot fit into any bundles"):
            RayWorkerGroup(pool, RayClassWithInitArgs(Worker), device_name="cuda")


def test_a_full_pool_refuses_one_more_group_instead_of_hanging(cluster: None) -> None:
    spec = RayClassWithInitArgs(Worker)
    with RayResourcePool([1], max_colocate_count=1) as pool, RayWorkerGroup(pool, spec):
        pool.placement_timeout_s = 0.5
        with pytest.raises(ResourceError, match=r"ranks \[0\] got no process.*max_colocate"):
            RayWorkerGroup(pool, spec)


def test_a_runtime_env_that_is_slow_to_set_up_has_the_time_of_the_start(
    cluster: None, tmp_path: Path
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    spec = RayClassWithInitArgs(Victim)
    spec.update_options({"runtime_env": {"py_executable": str(slow)}})
    with RayResourcePool([1], max_colocate_count=1) as pool:
        pool.get_placement_groups()
        pool.placement_timeout_s = 0.5
        with RayWorkerGroup(pool, spec) as group:
            assert group.act("fine") == ["fine"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"runtime_env": {"working_dir": "file:///no/such.zip"}},
            RuntimeEnvSetupError,
            r"no/such\.zip",
        ),
        ({"num_cpus": 2}, ValueError, "placement group"),
    ],
)
def test_options_of_rays_that_no_host_can_start_with_are_refused(
    cluster: None, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with RayResourcePool([1]) as pool, pytest.raises(error, match=match):
        RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(**options)(Victim)))


def test_a_reservation_that_is_gone_says_so(cluster: None) -> None:
    pool = RayResourcePool([1])
    (group,) = pool.get_placement_groups()
    remove_placement_group(group)
    assert eventually(lambda: state(group) == "REMOVED")
    with pytest.raises(ResourceError, match=r"reservation is gone.*close\(\) the pool"):
        RayWorkerGroup(pool, RayClassWithInitArgs(Worker))
    pool.close()
    with pool:
        assert len(pool.bundles()) == 1


def test_pools_are_split_again_and_again(cluster: None) -> None:
    with RayResourcePool([2, 2]) as pool:
        left, right = split_resource_pool(pool, 2)
        first, second = split_resource_pool(right, [1, 1])
        assert (*left.bundles(), *first.bundles(), *second.bundles()) == pool.bundles()
        assert [p.store for p in split_resource_pool(pool, [3, 1])] == [[2, 1], [1]]
        with pytest.raises(ValueError, match="add up to the pool's 4 processes"):
            split_resource_pool(pool, 3)


def test_pools_and_parts_are_merged_in_their_order_and_split_after_that(cluster: None) -> None:
    with RayResourcePool([2]) as a, RayResourcePool([1, 2]) as b, RayResourcePool([1]) as c:
        merged = merge_resource_pool(merge_resource_pool(c, b), a)
        assert merged.bundles() == (*c.bundles(), *b.bundles(), *a.bundles())
        one, rest = split_resource_pool(merged, [1, 5])
        assert [one.bundles(), sorted(rest.store)] == [c.bundles(), [1, 2, 2]]
        half, _ = split_resource_pool(a, 1)
        assert merge_resource_pool(b, half).bundles() == (*b.bundles(), a.bundles()[0])
        with pytest.raises(ValueError, match="must not have bundles in common"):
            merge_resource_pool(merged, half)


def test_a_pool_is_split_on_the_accelerators_that_the_cluster_has(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, float]] = []

    def reserve(bundles: list[dict[str, float]], *options: Any) -> PlacementGroup:
        asked.extend(bundles)
        made = placement_group([{"CPU": bundle["CPU"]} for bundle in bundles], *options)
        return PlacementGroup(made.id, bundles)

    monkeypatch.setattr(ray, "cluster_resources", lambda: ROOMY.total)
    monkeypatch.setattr(placement, "cluster_nodes", lambda: [ROOMY])
    monkeypatch.setattr(placement, "placement_group", reserve)
    with RayResourcePool([4]) as pool:
        assert [part.world_size for part in split_resource_pool(pool, 2)] == [2, 2]
    assert asked == [{"CPU": 1, "NPU": 1}] * 4


def test_ranks_keep_their_bundles_when_ray_moves_some_to_another_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"9": "10.0.0.9", "10": "10.0.0.10", "12": "10.0.0.12"}
    group = PlacementGroup(ray.PlacementGroupID.from_random(), [{"CPU": 1}] * 4)
    there: dict[PlacementGroup, placement.Reservation] = {}

    def put(*nodes: str) -> None:
        on = tuple((node, names[node]) for node in nodes)
        there[group] = placement.Reservation("", "CREATED", on, "", "alive")

    def bundles(*pools: RayResourcePool) -> list[list[int]]:
        return [[bundle.index for bundle in pool.bundles()] for pool in pools]

    monkeypatch.setattr(placement, "check_started", lambda: None)
    monkeypatch.setattr(placement, "cluster_nodes", lambda: [ROOMY])
    monkeypatch.setattr(placement, "placement_group", lambda *_: group)
    monkeypatch.setattr(placement, "reservations", lambda: there)
    put("9", "10", "9", "10")
    pool = RayResourcePool([4], use_gpu=False)
    pools = [pool, *split_resource_pool(pool, 2)]
    for first in ("9", "12"):
        put(first, "10", first, "10")
        assert bundles(*pools) == [[0, 2, 1, 3], [0, 2], [1, 3]]
        assert pool.bundles()[0].node_ip == names[first]


def test_a_role_can_take_placement_groups_of_others(cluster: None) -> None:
    with RayResourcePool([2, 1]) as pool:
        (group,) = extract_pg_from_exist({"actor": pool}, ["actor"], RayResourcePool([1]))
        assert group.bundle_count == 1
        with pytest.raises(ResourceError, match=r"no placement group .* with 3 bundles"):
            extract_pg_from_exist({"actor": pool}, ["actor"], RayResourcePool([3]))


def test_a_manager_checks_its_pools_together(cluster: None) -> None:
    manager = ResourcePoolManager({"a": [3], "b": [3]}, {"actor": "a", "critic": "b"})
    manager.create_resource_pool()
    assert manager.get_n_gpus() == 6
    assert manager.get_resource_pool("critic").store == [3]
    with pytest.raises(ValueError, match="role 'reward' is mapped to pool None"):
        manager.get_resource_pool("reward")
    with pytest.raises(ResourceError, match="cannot hold these pools together"):
        ResourcePoolManager({"a": [5], "b": [5]}, {}).create_resource_pool()


def test_a_pool_is_given_back_once_nobody_holds_it_nor_a_part_nor_a_group_on_it(
    cluster: None,
) -> None:
    """As soon as that is so, and not when garbage is collected."""
    gc.disable()
    try:
        pool = RayResourcePool([2], cpus_per_process=0.5)
        reservation = PlacementGroup(pool.get_placement_groups()[0].id)
        (part, _), future = split_resource_pool(pool, 1), None
        group = RayWorkerGroup(part, RayClassWithInitArgs(Victim))
        del pool, part, _
        future = group.act.submit("moment")
        del group
        assert future.result() == [None]
        assert state(reservation) == "CREATED"
        del future
        assert eventually(lambda: state(reservation) == "REMOVED")
    finally:
        gc.enable()


def test_a_detached_pool_stays_when_it_is_dropped(cluster: None) -> None:
    kept, dropped = (RayResourcePool([1], detached=detached) for detached in (True, False))
    stays, goes = (PlacementGroup(p.get_placement_groups()[0].id) for p in (kept, dropped))
    del kept, dropped
    assert eventually(lambda: state(goes) == "REMOVED")
    assert state(stays) == "CREATED"
    placement.remove([stays])


@ray.remote(num_cpus=0)
class Controller:
    def hold(self, die: bool = False) -> int:
        pool = RayResourcePool([1], cpus_per_process=6)
        self.group = RayWorkerGroup(pool, RayClassWithInitArgs(Victim))
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(self.group.act("fine"))


def killed() -> None:
    actor = Controller.remote()  # a method does not keep its actor, in ray 2.41
    ray.get(actor.hold.remote(True))


def dropped() -> None:
    actor = Controller.remote()
    assert ray.get(actor.hold.remote()) == 1


@pytest.mark.parametrize("run", [killed, dropped])
def test_what_a_controller_in_an_actor_held_is_there_for_the_next_pool(
    cluster: None, run: Callable[[], None]
) -> None:
    with contextlib.suppress(RayError):
        run()
    with RayResourcePool([6]) as next_pool:
        assert len(next_pool.bundles()) == 6


def test_a_closed_pool_is_removed_when_close_returns_and_what_could_not_be_is_named(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = RayResourcePool([1], name_prefix="stays_")
    (group,) = pool.get_placement_groups()
    with monkeypatch.context() as patch:
        patch.setattr(placement, "remove_placement_group", lambda group: None)
        patch.setattr(placement, "_REMOVAL_S", 0.05)
        pool.close()
    assert "still there 0.05 s after" in caplog.text
    assert "stays_single_controller_" in caplog.text
    placement.remove([group])
    assert state(group) == "REMOVED"


def test_a_start_that_fails_on_one_rank_leaves_no_process(cluster: None) -> None:
    with RayResourcePool([2], cpus_per_process=0.5) as pool:
        with pytest.raises(KeyError, match=r"Victim.__init__ failed on rank 1"):
            RayWorkerGroup(pool, RayClassWithInitArgs(Victim, ["sleep", "raise"]), name_prefix="x")
        with pytest.raises(WorkerDiedError, match=r"rank 0 .* died") as caught:
            RayWorkerGroup(pool, RayClassWithInitArgs(Victim, ["kill", "fine"]), name_prefix="x")
        assert "last words" in caught.value.log_tail
        actors = ray._private.state.actors().values()
        hosts = [actor for actor in actors if (actor["Name"] or "").startswith("xVictim")]
        assert {actor["State"] for actor in hosts} == {"DEAD"}
        assert len(hosts) == 4
        left = [f"/proc/{actor['Pid']}" for actor in hosts]
        assert eventually(lambda: not any(map(os.path.exists, left)))
