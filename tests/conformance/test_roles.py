"""What a user relies on when several roles share one process per rank."""

from __future__ import annotations

import html
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
import torch

from protocol import DataProto
from single_controller import RegistrationError, UnknownRoleError, WorkerError, inline
from single_controller import ray as on_ray
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from tests.conformance.conftest import Backend
from tests.conformance.team import ARGUMENTS, Actor, specs, zeros


def test_role_names_that_are_prefixes_of_others_stay_apart(
    roles: dict[str, Any],
) -> None:
    assert roles["actor"].add(zeros()).batch["a"].tolist() == [0] * 5 + [1] * 5
    assert roles["actor_rollout"].add(zeros()).batch["a"].tolist() == [0] * 5 + [7] * 5
    with pytest.raises(AttributeError, match="actor has no method 'generate'"):
        roles["actor"].generate()


def test_methods_of_the_same_name_stay_with_their_role(roles: dict[str, Any]) -> None:
    assert {role: group.name() for role, group in roles.items()} == {
        "actor": ["actor-1"] * 2,
        "actor_rollout": ["rollout"] * 2,
        "critic": ["critic"] * 2,
    }


def test_separate_groups_on_the_same_pool_give_the_same_numbers(
    backend: Backend, roles: dict[str, Any]
) -> None:
    with (
        backend.group(specs(backend)["actor"]) as actor,
        backend.group(specs(backend)["critic"]) as critic,
    ):
        separate = critic.sub(actor.add(zeros()))
        assert separate.equal(roles["critic"].sub(roles["actor"].add(zeros())))


def test_a_dispatched_batch_is_not_changed(roles: dict[str, Any]) -> None:
    data = DataProto.from_dict(
        {"a": torch.zeros(10)}, {"o": np.array([{"k": i} for i in range(10)])}, {"step": 1}
    )
    before = data.select(deepcopy=True)
    roles["actor"].add(data)
    assert data.equal(before)


def test_async_methods_interleave_and_others_keep_their_order(
    backend: Backend, roles: dict[str, Any]
) -> None:
    waiting = roles["critic"].wait_for_note()
    for i in range(30):
        roles["critic"].note(f"note {i}")
    roles["critic"].note("go on")
    for log in backend.get(waiting):
        assert log[-31:] == [*(f"note {i}" for i in range(30)), "go on"]


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_a_call_that_fails_before_it_runs_holds_up_no_later_one(
    backend: Backend, roles: dict[str, Any]
) -> None:
    lost = roles["critic"].note(Unreadable())
    roles["critic"].note("after")
    assert roles["critic"].name() == ["critic"] * 2
    with pytest.raises(ValueError, match="invalid literal"):
        backend.get(lost)


def test_threads_may_call_the_same_roles_at_once(roles: dict[str, Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: roles["critic"].name(), range(40), timeout=60))
    assert outputs == [["critic"] * 2] * 40


def test_an_unknown_role_is_answered_with_the_known_ones(hosts: Any) -> None:
    with pytest.raises(UnknownRoleError, match="unknown role 'critc': did you mean 'critic'"):
        hosts.spawn(["critc"])


def test_a_method_called_on_the_hosts_names_the_roles_to_spawn(hosts: Any) -> None:
    with pytest.raises(AttributeError, match=r"host of roles .*'actor'"):
        hosts.add(zeros())


def test_describe_shows_every_role_on_every_rank(hosts: Any, roles: dict[str, Any]) -> None:
    rows = hosts.describe().rows
    assert [(row.rank, row.role) for row in rows] == [(r, s) for r in (0, 1) for s in ARGUMENTS]
    assert [row.pid for row in roles["actor"].describe().rows] == roles["actor"].pid()
    assert str(hosts.describe()).splitlines()[0].split() == [
        "rank",
        "role",
        "node",
        "device",
        "pid",
        "state",
    ]
    assert {row.state for row in rows} == {"alive"}


def test_describe_shows_the_cluster(backend: Backend, hosts: Any) -> None:
    last = str(hosts.describe()).splitlines()[-1]
    if backend.name == "ray":
        assert last == f"cluster {ray.get_runtime_context().gcs_address}"
    else:
        assert last.endswith("alive")


def test_what_prints_as_a_table_shows_in_a_notebook_as_it_prints(roles: dict[str, Any]) -> None:
    actor = roles["actor"]
    for value in (actor.describe(), actor.stats(), actor.explain("add", zeros())):
        assert html.unescape(value._repr_html_()) == f"<pre>{value}</pre>"
    assert "-&gt; DataProto" in actor.explain("add", zeros())._repr_html_()


def test_a_class_that_is_no_worker_is_refused_by_name(backend: Backend) -> None:
    class Plain:
        pass

    with pytest.raises(RegistrationError, match=r"'Plain' needs a subclass of .*Worker"):
        backend.group(backend.spec(cls=Plain))


def test_roles_that_are_no_specs_are_refused_by_name(backend: Backend) -> None:
    with pytest.raises(RegistrationError, match="role 'actor' needs RayClassWithInitArgs"):
        backend.module.create_colocated_worker_cls({"actor": Actor})


class Failing(Worker):
    def __init__(self, bad_rank: int) -> None:
        if self.rank == bad_rank:
            raise FileNotFoundError("no such checkpoint: /models/x")


def test_a_constructor_that_raises_gives_the_original_error_with_role_and_rank(
    backend: Backend,
) -> None:
    failing = {**specs(backend, "actor"), "critic": backend.spec(Failing, bad_rank=1)}
    with pytest.raises(FileNotFoundError, match=r"critic\.__init__ failed on rank 1") as caught:
        backend.group(backend.module.create_colocated_worker_cls(failing))
    error = caught.value
    assert isinstance(error, WorkerError)
    assert (error.role, error.rank, error.method) == ("critic", 1, "__init__")
    assert "no such checkpoint" in error.remote_traceback


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
        assert group.both(zeros()).batch["a"].tolist() == [0] * 5 + [8] * 5
        assert group.names() == [["actor-1", "rollout"]] * 2
        group.fuse(["actor"])
        assert group.actor.name() == ["actor-1"] * 2


def test_a_fused_spec_spawns_like_a_colocated_one(backend: Backend) -> None:
    fused = backend.module.create_colocated_worker_cls_fused(specs(backend, "actor"))
    with backend.group(fused) as group:
        assert group.spawn(["actor"])["actor"].name() == ["actor-1"] * 2


def test_colocate_gives_each_role_as_an_attribute(backend: Backend) -> None:
    pool, colocate = backend.pool([2]), backend.module.colocate
    with colocate(pool, actor=Actor, critic=specs(backend)["critic"]) as group:
        assert (
            group.critic.sub(group.actor.add(zeros())).batch["a"].tolist() == [-10] * 5 + [-9] * 5
        )
        assert len(group.describe().rows) == 4
        with pytest.raises(AttributeError, match=r"no role 'crtic'; the roles are \['actor', 'c"):
            _ = group.crtic


def test_colocate_takes_what_a_group_takes(backend: Backend) -> None:
    options: dict[str, Any] = {
        "bin_pack": True,
        "name_prefix": "taken",
        "detached": False,
        "device_name": "cpu",
        "worker_env": {"TAKEN": "yes"},
        "call_timeout_s": 90.0,
        "startup_timeout_s": 90.0,
    }
    with backend.module.colocate(backend.pool([2]), **options, actor=Actor, other=Actor) as team:
        assert team.actor.execute_all_sync("execute_func_rank_zero", os.getenv, "TAKEN") == (
            ["yes"] * 2
        )
        assert all(name.startswith("taken") for name in team.hosts.worker_names)
        assert team.other.call_timeout_s == 90


def test_what_is_asked_of_a_team_is_asked_of_all_its_roles(backend: Backend) -> None:
    with backend.module.colocate(backend.pool([2]), actor=Actor, other=Actor) as team:
        team.actor.add(zeros())
        assert [row.method for row in team.stats()] == ["actor.add"]
        assert team.stats()["actor.add"].calls == 1
        assert str(team.explain("other.add", zeros())).startswith("other.add(data: DataProto)")
        with pytest.raises(UnknownRoleError, match=r"as actor\.update; got 'add', and the roles"):
            team.explain("add", zeros())
        assert set(team.stacks()) == {0, 1}
        team.restart()
        assert team.other.restarts == 1
        assert team.actor.name() == ["actor-1"] * 2


def test_a_role_that_cannot_be_one_is_refused_by_its_name(backend: Backend) -> None:
    pool, colocate = backend.pool([2]), backend.module.colocate
    for name in ("close", "stats", "hosts"):
        with pytest.raises(ValueError, match=f"a role cannot be called '{name}': every Colocated"):
            colocate(pool, **{name: Actor})
    for role in (Actor, backend.spec(Actor)):
        for name in ("detached", "worker_env"):
            with pytest.raises(ValueError, match=f"a role cannot be called '{name}': colocate has"):
                colocate(pool, **{name: role})
    with pytest.raises(RegistrationError, match=r"role 'actor' needs a subclass of .* got <class"):
        colocate(pool, actor=dict)
    with pytest.raises(RegistrationError, match=r"'worker_envs' needs .*did you mean 'worker_env'"):
        colocate(pool, actor=Actor, worker_envs={"A": "1"})


def test_all_ways_to_colocate_take_the_options_of_a_group() -> None:
    for colocate, group in (
        (on_ray.colocate, on_ray.RayWorkerGroup),
        (inline.colocate, inline.InlineWorkerGroup),
    ):
        mine, theirs = (inspect.signature(made).parameters for made in (colocate, group))
        verls = {"ray_wait_register_center_timeout", "use_gpu"}
        attaching = {"worker_names", "worker_handles", *verls}
        wanted = {n: p.default for n, p in theirs.items() if n not in attaching}
        own = {n: p.default for n, p in mine.items()}
        assert set(own) - set(wanted) == {"pool", "roles"}
        assert set(wanted) - set(own) == {"resource_pool", "ray_cls_with_init"}
        assert {n: own[n] for n in own if n in wanted} == {n: wanted[n] for n in own if n in wanted}
