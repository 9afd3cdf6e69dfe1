"""The groups of a running cluster, seen and ended by a process that did not start them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from single_controller.errors import GroupBrokenError, WorkerDiedError
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, colocate
from single_controller.ray.running import find_group, kill_group, running_groups
from tests.conformance.probe import Probe
from tests.waiting import eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    address = str(ray.get_runtime_context().gcs_address)
    return subprocess.run(
        [sys.executable, "-m", "single_controller", *arguments, "--address", address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_another_process_lists_a_group_rank_by_rank_and_ends_it(pool: RayResourcePool) -> None:
    with colocate(pool, actor=Probe, critic=Probe) as group:
        prefix = re.escape(group.hosts.worker_names[0].removesuffix("_0:0"))
        pids = [row.pid for row in group.describe().rows if row.role == "actor"]
        listed = run("ps")
        for rank, pid in enumerate(pids):
            line = rf"^{prefix} +{rank} +[\d.]+ +{pid} +actor,critic +idle +\d+s$"
            assert re.search(line, listed.stdout, re.MULTILINE), listed.stdout + listed.stderr
        name = group.hosts.worker_names[0].removesuffix("_0:0")
        ended = run("kill", name)
        address = str(ray.get_runtime_context().gcs_address)
        said = f"reached {address}\nended the 2 hosts of {name}\n"
        assert (ended.returncode, ended.stdout) == (0, said)
        assert name not in [g.name for g in running_groups()]
        (reservation,) = pool.get_placement_groups()
        assert placement_group_table(reservation)["state"] == "CREATED", "it is its driver's"
        with pytest.raises((WorkerDiedError, GroupBrokenError)):
            group.actor.execute_all_sync("query_collect_info", "dp")


def test_a_host_in_a_call_is_busy_and_idle_again_afterwards(
    pool: RayResourcePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Probe, meshes=False)) as group:
        flag = tmp_path / "go"
        waiting = group.execute_rank_zero_async("execute_func_rank_zero", _wait_for, flag)
        name = group.worker_names[0].removesuffix("_0:0")

        def states() -> list[str]:
            [found] = [g for g in running_groups(patience_s=0.5) if g.name == name]
            assert found.roles == (group.role,)
            return [host.state for host in found.hosts]

        assert eventually(lambda: states() == ["busy", "idle"])
        shown = run("stacks", name).stdout.split("rank 1\n")
        assert "in _wait_for" in shown[0]
        assert "in no call" in shown[1]
        with monkeypatch.context() as patched:
            patched.setattr(ray, "wait", lambda *_, **__: pytest.fail("a host was asked"))
            assert find_group(name).name == name
        flag.touch()
        ray.get(waiting, timeout=30)
        assert eventually(lambda: states() == ["idle", "idle"])


def _wait_for(flag: Path) -> None:
    assert eventually(flag.exists)


def test_a_group_of_another_namespace_is_not_ended_and_a_detached_one_with_its_reservation(
    cluster: None,
) -> None:
    spec = RayClassWithInitArgs(Probe, meshes=False)
    with (
        RayResourcePool([1], cpus_per_process=0.1, detached=True) as pool,
        RayWorkerGroup(pool, spec, name_prefix="mine_", detached=True) as group,
    ):
        [found] = [g for g in running_groups() if g.name.startswith("mine_")]
        with pytest.raises(ValueError, match="no group"):
            kill_group(found.name, namespace="another")
        with pytest.raises(ValueError, match=f"did you mean '{found.name}'"):
            kill_group(found.name + "x")
        assert group.count() == [0]
        (reservation,) = pool.get_placement_groups()
        assert kill_group(found.name, namespace=found.namespace).name == found.name
        assert placement_group_table(reservation)["state"] == "REMOVED"


def test_a_reservation_without_a_group_is_listed_and_given_back_by_its_name(
    cluster: None,
) -> None:
    pool = RayResourcePool([2], cpus_per_process=0.1, detached=True, name_prefix="empty_")
    (reservation,) = pool.get_placement_groups()
    name = placement_group_table(reservation)["name"]
    listed = run("ps")
    assert re.search(rf"^{name} +2 × {{CPU: 0.1}} +created +detached$", listed.stdout, re.MULTILINE)
    ended = run("kill", name)
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, f"gave {name} back")
    assert placement_group_table(reservation)["state"] == "REMOVED"
