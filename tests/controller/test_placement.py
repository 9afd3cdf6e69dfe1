"""Pools on a real cluster: what does not fit says so, what fits is given back."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.placement_group import (
    PlacementGroup,
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
    reservations,
    split_resource_pool,
)
from tests.faults.victim import Victim
from tests.waiting import eventually


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


def test_a_pool_the_cluster_cannot_hold_is_refused_at_once(cluster: None) -> None:
    with pytest.raises(ResourceError) as caught:
        RayResourcePool([9]).get_placement_groups()
    text = str(caught.value)
    assert "CPU       9      8" in text
    assert "process_on_nodes=[8]" in text
    assert "cpus_per_process=0.5" in text
    assert "ray.init(num_cpus=9)" in text


def test_max_colocate_count_does_not_grow_what_is_reserved(cluster: None) -> None:
    assert eventually(lambda: free_cpus() == 8)
    with RayResourcePool([2], max_colocate_count=10) as pool:
        pool.get_placement_groups()
        assert eventually(lambda: free_cpus() == 6)


def test_a_busy_pool_is_waited_for_and_then_given_up_with_the_reason(cluster: None) -> None:
    with RayResourcePool([7]) as holder:
        holder.get_placement_groups()
        late = RayResourcePool([4, 4], placement_timeout_s=0.3)
        with pytest.raises(ResourceError, match=r"placement_timeout_s=0.3") as caught:
            late.get_placement_groups()
    text = str(caught.value)
    assert "close what holds" in text
    assert f"  {holder.name_prefix}single_controller_" in text, "who holds it is not said"
    assert ": 7 × {CPU: 1} on " in text
    assert late.name_prefix not in text
    assert eventually(lambda: free_cpus() == 8), "the part that was reserved is not given back"
    late.placement_timeout_s = 60
    with late:
        assert len(late.get_placement_groups()) == 2


def test_without_accelerators_use_gpu_takes_cpus_unless_a_device_is_named(cluster: None) -> None:
    with RayResourcePool([1], use_gpu=True) as pool:
        assert pool.device().name == "cpu"
        pool.get_placement_groups()
    with pytest.raises(ResourceError, match="use_gpu=False"):
        RayWorkerGroup(RayResourcePool([1]), RayClassWithInitArgs(Worker), device_name="cuda")


def test_a_pool_gives_the_same_groups_in_the_same_order_on_every_call(cluster: None) -> None:
    with RayResourcePool([1, 2]) as pool:
        first = pool.get_placement_groups()
        assert [group.id for group in pool.get_placement_groups()] == [g.id for g in first]
        assert sorted(group.bundle_count for group in first) == [1, 2]
        assert len(pool.bundles()) == 3


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
    slow.write_text(f'#!/bin/sh\nsleep 2\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    spec = RayClassWithInitArgs(Victim)
    spec.update_options({"runtime_env": {"py_executable": str(slow)}})
    with RayResourcePool([1], max_colocate_count=1) as pool:
        pool.get_placement_groups()
        pool.placement_timeout_s = 0.5
        with RayWorkerGroup(pool, spec) as group:
            assert group.act("fine") == ["fine"]


def test_a_runtime_env_that_cannot_be_set_up_says_why(cluster: None) -> None:
    spec = RayClassWithInitArgs(Victim)
    spec.update_options({"runtime_env": {"working_dir": "file:///no/such.zip"}})
    with RayResourcePool([1]) as pool, pytest.raises(RuntimeEnvSetupError, match=r"no/such\.zip"):
        RayWorkerGroup(pool, spec)


def test_a_pool_reserved_for_cpus_refuses_another_device(cluster: None) -> None:
    with RayResourcePool([1]) as pool:
        pool.get_placement_groups()
        with pytest.raises(ResourceError, match=r"reserved without GPU.*device_name='cuda'"):
            RayWorkerGroup(pool, RayClassWithInitArgs(Worker), device_name="cuda")


def test_a_reservation_that_is_gone_says_so(cluster: None) -> None:
    pool = RayResourcePool([1])
    for group in pool.get_placement_groups():
        remove_placement_group(group)
    assert eventually(lambda: free_cpus() == 8)
    with pytest.raises(ResourceError, match=r"reservation is gone.*close\(\) the pool"):
        RayWorkerGroup(pool, RayClassWithInitArgs(Worker))
    pool.close()
    with pool, RayWorkerGroup(pool, RayClassWithInitArgs(Worker)) as group:
        assert group.world_size == 1


def test_a_host_that_asks_for_more_than_a_bundle_is_refused(cluster: None) -> None:
    spec = RayClassWithInitArgs(Worker)
    spec.update_options({"num_cpus": 2})
    with RayResourcePool([1]) as pool, pytest.raises(ResourceError, match="cannot start a host"):
        RayWorkerGroup(pool, spec)


def test_an_empty_pool_is_refused(cluster: None) -> None:
    with pytest.raises(ValueError, match="at least one node"):
        RayResourcePool([]).get_placement_groups()


def test_pools_split_again_and_merge(cluster: None) -> None:
    with RayResourcePool([2, 2]) as pool:
        left, right = split_resource_pool(pool, 2)
        first, second = split_resource_pool(right, [1, 1])
        assert [len(p.bundles()) for p in (left, right, first, second)] == [2, 2, 1, 1]
        assert (*left.bundles(), *first.bundles(), *second.bundles()) == pool.bundles()
        assert [p.store for p in split_resource_pool(pool, [3, 1])] == [[2, 1], [1]]
        assert right.world_size == 2
        with pytest.raises(ValueError, match="add up to the pool's 4 processes"):
            split_resource_pool(pool, 3)


def test_pools_are_merged_in_their_order_again_and_again_and_split_after_that(
    cluster: None,
) -> None:
    with RayResourcePool([2]) as a, RayResourcePool([1, 2]) as b, RayResourcePool([1]) as c:
        merged = merge_resource_pool(merge_resource_pool(c, b), a)
        assert merged.bundles() == (*c.bundles(), *b.bundles(), *a.bundles())
        one, rest = split_resource_pool(merged, [1, 5])
        assert [one.bundles(), sorted(rest.store)] == [c.bundles(), [1, 2, 2]]
        assert merge_resource_pool(rest, one).bundles() == (*rest.bundles(), *one.bundles())
        with pytest.raises(ValueError, match="must not share a placement group"):
            merge_resource_pool(merged, rest)
        half, _ = split_resource_pool(a, 1)
        with pytest.raises(ValueError, match=r"bundles 0 to 0 of groups with \[2\]: merge the wh"):
            merge_resource_pool(b, half)


def test_a_pool_is_split_on_the_accelerators_that_the_cluster_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resources = {"CPU": 8.0, "NPU": 8.0}
    node = placement.NodeResources("n", resources, resources)
    asked: list[dict[str, float]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)

    def reserve(bundles: list[dict[str, float]], **_: object) -> SimpleNamespace:
        asked.extend(bundles)
        return SimpleNamespace(bundle_count=len(bundles), wait=lambda timeout: True)

    for unasked in ("reclaim", "give_back_when_dropped"):
        monkeypatch.setattr(placement, unasked, lambda *_: None)
    monkeypatch.setattr(placement, "new_name", lambda *_: "")
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(placement, "cluster_nodes", lambda: [node])
    monkeypatch.setattr(placement, "placement_group", reserve)
    monkeypatch.setattr(placement, "sort_placement_group_by_node_ip", list)
    assert [part.world_size for part in split_resource_pool(RayResourcePool([4]), 2)] == [2, 2]
    assert asked == [{"CPU": 1, "NPU": 1}] * 4


def test_a_role_can_take_placement_groups_of_others(cluster: None) -> None:
    with RayResourcePool([2, 1]) as pool:
        wanted = RayResourcePool([1])
        (group,) = extract_pg_from_exist({"actor": pool}, ["actor"], wanted)
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


def test_custom_resources_are_reserved_with_the_pool_and_missed_before_asking(
    cluster: None,
) -> None:
    with pytest.raises(ResourceError, match=r"no fast_disk in the pool"):
        RayResourcePool([1], resources_per_process={"fast_disk": 1}).get_placement_groups()
    with pytest.raises(ValueError, match="amounts of custom resources"):
        RayResourcePool([1], resources_per_process={"CPU": 1})


def test_a_closed_pool_is_removed_when_close_returns(cluster: None) -> None:
    pool = RayResourcePool([1])
    (group,) = pool.get_placement_groups()
    pool.close()
    assert placement_group_table(group)["state"] == "REMOVED"


def test_a_pool_is_given_back_once_nobody_holds_it_nor_a_part_nor_a_group_on_it(
    cluster: None,
) -> None:
    pool = RayResourcePool([2], cpus_per_process=0.5)
    reservation = PlacementGroup(pool.get_placement_groups()[0].id)

    def state() -> str:
        return str(placement_group_table(reservation)["state"])

    (part, _), future = split_resource_pool(pool, 1), None
    group = RayWorkerGroup(part, RayClassWithInitArgs(Victim))
    del pool, part, _
    gc.collect()
    future = group.act.submit("moment")
    del group
    gc.collect()
    assert future.result() == [None]
    assert state() == "CREATED"
    del future
    assert eventually(lambda: state() == "REMOVED")


def test_a_dropped_pool_is_given_back_without_waiting_for_the_collector(cluster: None) -> None:
    gc.disable()
    try:
        pool = RayResourcePool([1])
        reservation = PlacementGroup(pool.get_placement_groups()[0].id)
        group = RayWorkerGroup(pool, RayClassWithInitArgs(Victim))
        del pool, group
        assert eventually(lambda: placement_group_table(reservation)["state"] == "REMOVED")
    finally:
        gc.enable()


def test_a_detached_pool_stays_when_it_is_dropped(cluster: None) -> None:
    kept, dropped = (RayResourcePool([1], detached=detached) for detached in (True, False))
    stays, goes = (PlacementGroup(p.get_placement_groups()[0].id) for p in (kept, dropped))
    del kept, dropped
    gc.collect()
    assert eventually(lambda: placement_group_table(goes)["state"] == "REMOVED")
    assert placement_group_table(stays)["state"] == "CREATED"
    reservations.remove([stays])


@ray.remote(num_cpus=0)
class Controller:
    def hold(self, die: bool = False) -> int:
        self.group = RayWorkerGroup(RayResourcePool([6]), RayClassWithInitArgs(Victim))
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(self.group.act("fine"))


@ray.remote(num_cpus=0, max_retries=0)
def controller(die: bool) -> int:
    return Controller.__ray_actor_class__().hold(die)


def killed_actor() -> None:
    actor = Controller.remote()  # a method does not keep its actor, in ray 2.41
    ray.get(actor.hold.remote(True))


def dropped_actor() -> None:
    actor = Controller.remote()
    assert ray.get(actor.hold.remote()) == 6


def killed_task() -> None:
    ray.get(controller.remote(True))


def finished_task() -> None:
    assert ray.get(controller.remote(False)) == 6


@pytest.mark.parametrize("run", [killed_actor, dropped_actor, killed_task, finished_task])
def test_what_a_controller_in_an_actor_or_a_task_held_is_there_for_the_next_pool(
    cluster: None, run: Callable[[], None]
) -> None:
    with contextlib.suppress(RayError):
        run()
    with RayResourcePool([6]) as next_pool:
        assert len(next_pool.bundles()) == 6


def test_what_a_close_could_not_remove_is_named(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = RayResourcePool([1], name_prefix="stays_")
    (group,) = pool.get_placement_groups()
    with monkeypatch.context() as patch:
        patch.setattr(reservations, "remove_placement_group", lambda group: None)
        patch.setattr(reservations, "_REMOVAL_S", 0.05)
        pool.close()
    assert "1 of 1 placement groups are still there 0.05 s after" in caplog.text
    assert "stays_single_controller_" in caplog.text
    assert "(created)" in caplog.text
    reservations.remove([group])
    assert placement_group_table(group)["state"] == "REMOVED"


def test_a_start_that_fails_on_one_rank_leaves_no_process(cluster: None) -> None:
    with RayResourcePool([2], cpus_per_process=0.5) as pool:
        with pytest.raises(KeyError, match=r"Victim.__init__ failed on rank 1"):
            RayWorkerGroup(pool, RayClassWithInitArgs(Victim, ["sleep", "raise"]), name_prefix="x")
        with pytest.raises(WorkerDiedError, match=r"rank 0 .*SIGKILL") as caught:
            RayWorkerGroup(pool, RayClassWithInitArgs(Victim, ["kill", "fine"]), name_prefix="x")
        assert "last words" in caught.value.log_tail
        actors = ray._private.state.actors().values()
        hosts = [actor for actor in actors if (actor["Name"] or "").startswith("xVictim")]
        assert {actor["State"] for actor in hosts} == {"DEAD"}
        assert len(hosts) == 4
        left = [f"/proc/{actor['Pid']}" for actor in hosts]
        assert eventually(lambda: not any(map(os.path.exists, left)))


def test_rays_own_restarts_are_refused(cluster: None) -> None:
    spec = RayClassWithInitArgs(ray.remote(max_restarts=1)(Worker))
    with RayResourcePool([1]) as pool, pytest.raises(ValueError, match="on_failure='restart'"):
        RayWorkerGroup(pool, spec)
