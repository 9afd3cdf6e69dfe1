"""Programs written for Ray that run inline, by the environment alone; and the pytest fixture."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol import DataProto
from single_controller import ClassWithInitArgs, GroupBrokenError
from single_controller.testing import InlineGroups
from tests.conformance.team import Actor, Critic, zeros

ROOT = Path(__file__).parents[2]


def run(*arguments: str, backend: str = "inline") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SINGLE_CONTROLLER_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_program_for_ray_runs_inline_without_an_edit_and_without_a_cluster() -> None:
    program = """
        import os
        import ray, torch
        from protocol import DataProto
        from single_controller.ray import (
            RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, ResourcePoolManager, colocate,
            create_colocated_worker_cls, merge_resource_pool, pin, split_resource_pool,
        )
        from single_controller.base import Worker
        from single_controller.base.decorator import Dispatch, register

        class Actor(Worker):
            @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
            def add(self, data: DataProto) -> DataProto:
                data.batch["a"] += self.rank
                return data

            @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
            def pid(self) -> int:
                return os.getpid()

        data = DataProto.from_dict({"a": torch.zeros(5)})
        manager = ResourcePoolManager({"all": [64]}, {"actor": "all"})
        manager.create_resource_pool()
        first, second = split_resource_pool(manager.get_resource_pool("actor"), [4, 60])
        print(first.world_size, merge_resource_pool(first, second).world_size)
        spec = RayClassWithInitArgs(ray.remote(Actor))
        hosts = RayWorkerGroup(first, create_colocated_worker_cls({"actor": spec}), bin_pack=True)
        actor = hosts.spawn(["actor"])["actor"]
        print(actor.add(data).batch["a"].tolist())
        print(actor.add(pin(data)).batch["a"].tolist())
        options = {"call_timeout_s": 60, "on_failure": "restart", "max_restarts": 1}
        with colocate(RayResourcePool([2]), **options, actor=Actor) as group:
            print({reference.result() for reference in group.actor.pid()} == {os.getpid()})
        print(ray.is_initialized())
        """
    done = run("-c", textwrap.dedent(program))
    assert done.stdout.splitlines() == [
        "4 64",
        "[0.0, 0.0, 1.0, 2.0, 3.0]",
        "[0.0, 0.0, 1.0, 2.0, 3.0]",
        "True",
        "False",
    ], done.stderr


def test_an_unknown_backend_is_refused_by_name() -> None:
    done = run("-c", "import single_controller.ray", backend="inlin")
    assert "SINGLE_CONTROLLER_BACKEND must be ray or inline; got 'inlin'" in done.stderr


def test_references_of_a_running_ray_go_in_and_come_out(cluster: None) -> None:
    import ray

    from single_controller.ray import RayClassWithInitArgs, RayResourcePool
    from single_controller.ray.switched import SwitchedWorkerGroup
    from tests.conformance.probe import Probe

    spec = RayClassWithInitArgs(Probe, meshes=False)
    with SwitchedWorkerGroup(RayResourcePool([2]), spec) as group:
        assert ray.get(group.later(ray.put("x"))) == [(0, "x"), (1, "x")]
        assert group.echo(ray.put(1), y=ray.put(2)) == [(0, 1, 2), (1, 1, 2)]
        data = DataProto.from_dict({"a": torch.zeros(2)}, {"s": torch.zeros(2).numpy()})
        assert len(group.uneven_rows(data)) == 2


def test_the_fixture_makes_groups_and_closes_them(inline_group: InlineGroups) -> None:
    actor = inline_group(ClassWithInitArgs(Actor, scale=3), ranks=2)
    assert actor.add(zeros()).batch["a"].tolist() == [0] * 5 + [3] * 5
    assert actor.workers[1].scale == 3
    assert inline_group(Actor, [1, 2], name_prefix="p").world_size == 3
    both: Any = inline_group.colocate(2, a=Actor, c=ClassWithInitArgs(Critic, config={"b": 1}))
    assert both.c.sub(both.a.add(zeros())).batch["a"].tolist() == [-1] * 5 + [0] * 5
    inline_group.close()
    for group in (actor, both.a):
        with pytest.raises(GroupBrokenError, match="the group is closed"):
            group.name()
