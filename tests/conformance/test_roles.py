"""What a user relies on when several roles share one process per rank."""

from __future__ import annotations

import gc
import html
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
import torch

from protocol import DataProto
from single_controller import RegistrationError
from single_controller.base.decorator import Dispatch, register
from tests.conformance.conftest import Backend
from tests.conformance.probe import Unreadable, values
from tests.conformance.team import ARGUMENTS, Actor, specs, zeros
from tests.waiting import eventually, is_alive


def test_roles_stay_apart_also_where_the_name_of_one_begins_that_of_another(
    roles: dict[str, Any],
) -> None:
    assert values(roles["actor"].add(zeros())) == [0] * 5 + [1] * 5
    assert values(roles["actor_rollout"].add(zeros())) == [0] * 5 + [7] * 5
    assert [group.name()[0] for group in roles.values()] == ["actor-1", "rollout", "critic"]
    with pytest.raises(AttributeError, match="actor has no method 'generate'"):
        roles["actor"].generate()


@pytest.mark.slow_on_ray
def test_a_group_of_one_role_gives_the_same_numbers_and_ends_when_it_is_dropped(
    backend: Backend, roles: dict[str, Any]
) -> None:
    fused = backend.module.create_colocated_worker_cls_fused(specs(backend, "actor"))
    gc.disable()  # its processes end without the collector
    try:
        alone = backend.group(fused).spawn(["actor"])["actor"]
        separate = roles["critic"].sub(alone.add(zeros()))
        pids = alone.pid()
        del alone
        gone = os.getpid() in pids or eventually(lambda: not any(map(is_alive, pids)))
    finally:
        gc.enable()
    assert gone
    assert separate.equal(roles["critic"].sub(roles["actor"].add(zeros())))


def test_a_dispatched_batch_is_not_changed(roles: dict[str, Any]) -> None:
    data = DataProto.from_dict(
        {"a": torch.zeros(10)}, {"o": np.array([{"k": i} for i in range(10)])}, {"step": 1}
    )
    before = data.select(deepcopy=True)
    roles["actor"].add(data)
    assert data.equal(before)


def test_async_methods_interleave_and_others_keep_their_order_whatever_fails_among_them(
    backend: Backend, roles: dict[str, Any]
) -> None:
    waiting = roles["critic"].wait_for_note()
    for i in range(30):
        roles["critic"].note(f"note {i}")
    lost = roles["critic"].note(Unreadable())
    roles["critic"].note("go on")
    for log in backend.get(waiting):
        assert log[-31:] == [*(f"note {i}" for i in range(30)), "go on"]
    with pytest.raises(ValueError, match="invalid literal"):
        backend.get(lost)


def test_threads_may_call_the_same_roles_at_once(roles: dict[str, Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: roles["critic"].name(), range(40), timeout=60))
    assert outputs == [["critic"] * 2] * 40


def test_describe_shows_every_role_on_every_rank_and_the_cluster(
    backend: Backend, hosts: Any, roles: dict[str, Any]
) -> None:
    rows = hosts.describe().rows
    assert [(row.rank, row.role) for row in rows] == [(r, s) for r in (0, 1) for s in ARGUMENTS]
    assert [row.pid for row in roles["actor"].describe().rows] == roles["critic"].pid()
    head, *_, last = str(hosts.describe()).splitlines()
    assert head.split() == ["rank", "role", "node", "device", "pid", "state"]
    assert {row.state for row in rows} == {"alive"}
    if backend.name == "ray":
        assert last == f"cluster {ray.get_runtime_context().gcs_address}"
    else:
        assert last.endswith("alive")


def test_what_prints_as_a_table_shows_in_a_notebook_as_it_prints(roles: dict[str, Any]) -> None:
    actor = roles["actor"]
    for value in (actor.describe(), actor.stats(), actor.explain("add", zeros())):
        assert html.unescape(value._repr_html_()) == f"<pre>{value}</pre>"
    assert "-&gt; DataProto" in actor.explain("add", zeros())._repr_html_()


def test_what_cannot_be_a_role_or_a_team_is_refused_by_name(backend: Backend, hosts: Any) -> None:
    class Plain:
        pass

    pool, colocate = backend.pool([2]), backend.module.colocate
    colocated, no_role = backend.module.create_colocated_worker_cls, "a role cannot be called"
    for use, error, match in (
        (lambda: hosts.spawn(["critc"]), ValueError, r"role 'critc': .*'critic'"),
        (lambda: hosts.add(zeros()), AttributeError, r"host of roles .*'actor'"),
        (lambda: backend.group(backend.spec(cls=Plain)), RegistrationError, "'Plain' needs a sub"),
        (lambda: colocated({"a": dict}), RegistrationError, "role 'dict' needs a subclass .* <cl"),
        (lambda: colocate(pool, close=Actor), ValueError, f"{no_role} 'close': every Colocated"),
        (lambda: colocate(pool, hosts=Actor), ValueError, f"{no_role} 'hosts': every Colocated"),
        (lambda: colocate(pool, actor=Actor, worker_envs={}), TypeError, "keyword .*'worker_envs'"),
    ):
        with pytest.raises(error, match=match):
            use()


@pytest.mark.slow_on_ray
def test_a_fused_worker_calls_its_roles_directly(backend: Backend) -> None:
    fused = backend.module.create_colocated_worker_raw_cls(specs(backend, "actor", "actor_rollout"))

    class Hybrid(fused):  # type: ignore[misc,valid-type]
        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
        def both(self, data: DataProto) -> DataProto:
            return self.actor_rollout.add(self.actor.add(data))

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def names(self) -> list[str]:
            return [self.get_fused_worker_by_name(n).name() for n in ("actor", "actor_rollout")]

    with backend.group(backend.spec(Hybrid)) as group:
        assert values(group.both(zeros())) == [0] * 5 + [8] * 5
        assert group.names() == [["actor-1", "rollout"]] * 2
        group.fuse(["actor"])
        assert group.actor.name() == ["actor-1"] * 2


OPTIONS: dict[str, Any] = {
    "bin_pack": True,
    "name_prefix": "taken",
    "detached": False,
    "device_name": "cpu",
    "worker_env": {"TAKEN": "yes"},
    "call_timeout_s": 90.0,
    "startup_timeout_s": 90.0,
}


@pytest.fixture(scope="module")
def team(backend: Backend) -> Iterator[Any]:
    critic = specs(backend)["critic"]
    with backend.module.colocate(backend.pool([2]), **OPTIONS, actor=Actor, critic=critic) as both:
        yield both


def test_colocate_takes_what_a_group_takes_and_gives_each_role_as_an_attribute(team: Any) -> None:
    assert values(team.critic.sub(team.actor.add(zeros()))) == [-10] * 5 + [-9] * 5
    with pytest.raises(AttributeError, match=r"no role 'crtic'; the roles are \['actor', 'c"):
        _ = team.crtic
    found = team.actor.execute_all_sync("execute_func_rank_zero", os.getenv, "TAKEN")
    assert found == ["yes"] * 2
    assert all(name.startswith("taken") for name in team.hosts.worker_names)
    assert team.critic.call_timeout_s == 90


def test_what_is_asked_of_a_team_is_asked_of_all_its_roles(team: Any) -> None:
    calls = team.stats()["actor.add"].calls
    team.actor.add(zeros())
    assert team.stats()["actor.add"].calls == calls + 1
    assert {row.method.partition(".")[0] for row in team.stats()} <= {"actor", "critic"}
    assert str(team.explain("critic.sub", zeros())).startswith("critic.sub(data: DataProto)")
    with pytest.raises(ValueError, match=r"as actor\.update; got 'add', and the roles"):
        team.explain("add", zeros())
    assert len(team.describe().rows) == 4
    assert set(team.stacks()) == {0, 1}
