"""The groups of a running cluster, seen and ended by a process that did not start them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from single_controller import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.errors import GroupBrokenError, WorkerDiedError
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, colocate
from tests.cli.program import here, run
from tests.waiting import eventually

pytestmark = pytest.mark.slow


class Idle(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def count(self) -> int:
        return 0


def listed() -> str:
    return run("ps", "--address", here()).stdout


def test_another_process_lists_a_group_shows_its_stacks_and_ends_it(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    with colocate(pool, actor=Idle, critic=Idle) as group:
        name = group.hosts.worker_names[0].removesuffix("_0:0")
        pids = [row.pid for row in group.describe().rows if row.role == "actor"]
        flag = tmp_path / "go"
        waiting = group.actor.execute_rank_zero_async("execute_func_rank_zero", _wait_for, flag)

        def shown(*states: str) -> bool:
            rows = [rf"^{name} +{i} +[\d.]+ +{pids[i]} +{states[i]}$" for i in (0, 1)]
            text = listed()
            return all(re.search(row, text, re.MULTILINE) for row in rows)

        assert eventually(lambda: shown("actor.execute_func_rank_zero", "idle")), listed()
        stacks = run("stacks", name, "--address", here()).stdout.split("rank 1\n")
        assert "in _wait_for" in stacks[0]
        assert "in no call" in stacks[1]
        flag.touch()
        ray.get(waiting, timeout=30)
        assert eventually(lambda: shown("idle", "idle")), listed()
        ended = run("kill", name, "--address", here())
        said = f"reached {here()}\nended the 2 hosts of {name}\n"
        assert (ended.returncode, ended.stdout) == (0, said)
        assert name not in listed()
        (reservation,) = pool.get_placement_groups()
        assert placement_group_table(reservation)["state"] == "CREATED", "it is its driver's"
        with pytest.raises((WorkerDiedError, GroupBrokenError)):
            group.actor.count()


def _wait_for(flag: Path) -> None:
    assert eventually(flag.exists)


def test_a_group_of_another_namespace_is_not_ended_and_a_detached_one_with_its_reservation(
    cluster: None,
) -> None:
    spec = RayClassWithInitArgs(Idle)
    namespace = ray.get_runtime_context().namespace
    with (
        RayResourcePool([1], cpus_per_process=0.1, detached=True) as pool,
        RayWorkerGroup(pool, spec, name_prefix="mine_", detached=True) as group,
    ):
        name = group.worker_names[0].removesuffix("_0:0")
        refused = run("kill", name, "--namespace", "another", "--address", here())
        assert refused.returncode == 2
        assert f"0 groups are called '{name}'" in refused.stderr
        assert f"Running: {name} (namespace {namespace})" in refused.stderr
        assert group.count() == [0]
        (reservation,) = pool.get_placement_groups()
        ended = run("kill", name, "--namespace", namespace, "--address", here())
        assert ended.returncode == 0, ended.stderr
        assert placement_group_table(reservation)["state"] == "REMOVED"


def test_a_reservation_without_a_group_is_listed_and_given_back_by_its_name(
    cluster: None,
) -> None:
    pool = RayResourcePool([2], cpus_per_process=0.1, detached=True, name_prefix="empty_")
    (reservation,) = pool.get_placement_groups()
    name = placement_group_table(reservation)["name"]
    assert re.search(rf"^{name} +2 × {{CPU: 0.1}} +created +detached$", listed(), re.MULTILINE)
    ended = run("kill", name, "--address", here())
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, f"gave {name} back")
    assert placement_group_table(reservation)["state"] == "REMOVED"
