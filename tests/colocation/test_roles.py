"""What a user relies on when several roles share one process per rank."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
import torch

from protocol import DataProto
from single_controller import RegistrationError, UnknownRoleError, WorkerDiedError, WorkerError
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
    create_colocated_worker_cls,
    create_colocated_worker_cls_fused,
    create_colocated_worker_raw_cls,
)
from tests.waiting import eventually


class Actor(Worker):
    def __init__(self, scale: int = 1) -> None:
        self.scale = scale  # on purpose without super().__init__()

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto) -> DataProto:
        data.batch["a"] += self.rank * self.scale
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def name(self) -> str:
        return f"actor-{self.scale}"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def pid(self) -> int:
        return os.getpid()


class Rollout(Actor):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def name(self) -> str:
        return "rollout"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def generate(self) -> str:
        return "text"


class Critic(Worker):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.log: list[str] = []

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    async def sub(self, data: DataProto) -> DataProto:
        await asyncio.sleep(0)
        data.batch["a"] -= self.config["b"]
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def name(self) -> str:
        return "critic"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def pid(self) -> int:
        return os.getpid()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def wait_for_note(self) -> list[str]:
        while "go on" not in self.log:
            await asyncio.sleep(0.01)
        return self.log

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def notes(self) -> list[str]:
        return self.log

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def note(self, text: str) -> None:
        self.log.append(text)


SPECS = {
    "actor": RayClassWithInitArgs(cls=Actor, scale=1),
    "actor_rollout": RayClassWithInitArgs(cls=Rollout, scale=7),
    "critic": RayClassWithInitArgs(cls=Critic, config={"b": 10}),
}


@pytest.fixture(scope="module")
def hosts(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, create_colocated_worker_cls(SPECS)) as group:
        yield group


@pytest.fixture(scope="module")
def roles(hosts: RayWorkerGroup) -> dict[str, RayWorkerGroup]:
    return hosts.spawn(SPECS)


def zeros() -> DataProto:
    return DataProto.from_dict({"a": torch.zeros(10)})


def test_all_roles_of_a_rank_share_one_process(roles: dict[str, RayWorkerGroup]) -> None:
    assert roles["actor"].pid() == roles["critic"].pid()
    assert len(set(roles["actor"].pid())) == 2


def test_role_names_that_are_prefixes_of_others_stay_apart(
    roles: dict[str, RayWorkerGroup],
) -> None:
    assert roles["actor"].add(zeros()).batch["a"].tolist() == [0] * 5 + [1] * 5
    assert roles["actor_rollout"].add(zeros()).batch["a"].tolist() == [0] * 5 + [7] * 5
    with pytest.raises(AttributeError, match="actor has no method 'generate'"):
        roles["actor"].generate()


def test_methods_of_the_same_name_stay_with_their_role(roles: dict[str, RayWorkerGroup]) -> None:
    assert {role: group.name() for role, group in roles.items()} == {
        "actor": ["actor-1"] * 2,
        "actor_rollout": ["rollout"] * 2,
        "critic": ["critic"] * 2,
    }


def test_separate_groups_on_the_same_pool_give_the_same_numbers(
    pool: RayResourcePool, roles: dict[str, RayWorkerGroup]
) -> None:
    with (
        RayWorkerGroup(pool, SPECS["actor"]) as actor,
        RayWorkerGroup(pool, SPECS["critic"]) as critic,
    ):
        separate = critic.sub(actor.add(zeros()))
        assert separate.equal(roles["critic"].sub(roles["actor"].add(zeros())))
        assert set(actor.pid()).isdisjoint(critic.pid())


def test_a_dispatched_batch_is_not_changed(roles: dict[str, RayWorkerGroup]) -> None:
    data = DataProto.from_dict(
        {"a": torch.zeros(10)}, {"o": np.array([{"k": i} for i in range(10)])}, {"step": 1}
    )
    before = data.select(deepcopy=True)
    roles["actor"].add(data)
    assert data.equal(before)


def test_async_methods_interleave_and_others_keep_their_order(
    roles: dict[str, RayWorkerGroup],
) -> None:
    waiting = roles["critic"].wait_for_note()
    for i in range(30):
        roles["critic"].note(f"note {i}")
    roles["critic"].note("go on")
    for log in ray.get(waiting, timeout=30):
        assert log == [*(f"note {i}" for i in range(30)), "go on"]


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_a_call_that_fails_before_it_runs_holds_up_no_later_one(
    roles: dict[str, RayWorkerGroup],
) -> None:
    lost = roles["critic"].note(Unreadable())
    roles["critic"].note("after")
    assert roles["critic"].name() == ["critic"] * 2
    with pytest.raises(ValueError, match="invalid literal"):
        ray.get(lost)


def test_a_cancelled_call_holds_up_no_later_one(roles: dict[str, RayWorkerGroup]) -> None:
    @ray.remote(num_cpus=0)
    def slow() -> str:
        return str(threading.Event().wait(1))

    roles["critic"].note(slow.remote())
    dropped = roles["critic"].note.submit("never")
    assert dropped.cancel()
    with pytest.raises(CancelledError, match=r"critic\.note"):
        dropped.result(timeout=30)
    assert "never" not in roles["critic"].notes()[0]


def test_threads_may_call_the_same_roles_at_once(roles: dict[str, RayWorkerGroup]) -> None:
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: roles["critic"].name(), range(40), timeout=60))
    assert outputs == [["critic"] * 2] * 40


def test_a_group_may_be_called_from_another_process_too(roles: dict[str, RayWorkerGroup]) -> None:
    @ray.remote(num_cpus=0)
    def elsewhere(group: RayWorkerGroup) -> list[str]:
        return group.name()

    assert ray.get(elsewhere.remote(roles["critic"]), timeout=60) == ["critic"] * 2
    assert roles["critic"].name() == ["critic"] * 2


def test_an_async_role_that_exits_is_a_death_and_no_hang(pool: RayResourcePool) -> None:
    class Leaving(Worker):
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        async def leave(self) -> None: ...

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def exit(self) -> None:
            sys.exit(3)

    with (
        RayWorkerGroup(pool, RayClassWithInitArgs(Leaving), call_timeout_s=60) as group,
        pytest.raises(WorkerDiedError, match=r"Leaving\.exit"),
    ):
        group.exit()


def test_a_dropped_group_ends_its_processes_without_waiting_for_the_collector(
    pool: RayResourcePool,
) -> None:
    gc.disable()
    try:
        group = RayWorkerGroup(pool, SPECS["actor"])
        pids = group.pid()
        del group
        assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    finally:
        gc.enable()


def test_a_spec_is_not_changed_by_starting_from_it(roles: dict[str, RayWorkerGroup]) -> None:
    assert SPECS["actor"].kwargs == {"scale": 1}
    assert SPECS["actor"].actor_spec() == SPECS["actor"].actor_spec()
    assert dict(SPECS["actor"].actor_spec().options) == {}


def test_an_unknown_role_is_answered_with_the_known_ones(hosts: RayWorkerGroup) -> None:
    with pytest.raises(UnknownRoleError, match="unknown role 'critc': did you mean 'critic'"):
        hosts.spawn(["critc"])


def test_a_method_called_on_the_hosts_names_the_roles_to_spawn(hosts: RayWorkerGroup) -> None:
    with pytest.raises(AttributeError, match=r"host of roles .*'actor'"):
        hosts.add(zeros())


def test_describe_shows_every_role_on_every_rank(
    hosts: RayWorkerGroup, roles: dict[str, RayWorkerGroup]
) -> None:
    rows = hosts.describe().rows
    assert [(row.rank, row.role) for row in rows] == [(r, s) for r in (0, 1) for s in SPECS]
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


def test_a_class_that_is_no_worker_is_refused_by_name() -> None:
    class Plain:
        pass

    with pytest.raises(RegistrationError, match=r"'Plain' needs a subclass of .*Worker"):
        RayClassWithInitArgs(cls=Plain)


def test_roles_that_are_no_specs_are_refused_by_name() -> None:
    with pytest.raises(RegistrationError, match="role 'actor' needs RayClassWithInitArgs"):
        create_colocated_worker_cls({"actor": Actor})


def test_roles_that_disagree_on_an_option_are_refused() -> None:
    first, second = RayClassWithInitArgs(cls=Actor), RayClassWithInitArgs(cls=Actor)
    first.update_options({"max_restarts": 1})
    second.update_options({"max_restarts": 2})
    with pytest.raises(RegistrationError, match="'max_restarts' is 1 and, for role 'b', 2"):
        create_colocated_worker_cls({"a": first, "b": second})


class Failing(Worker):
    def __init__(self, bad_rank: int) -> None:
        if self.rank == bad_rank:
            raise FileNotFoundError("no such checkpoint: /models/x")


def test_a_constructor_that_raises_gives_the_original_error_with_role_and_rank(
    pool: RayResourcePool,
) -> None:
    specs = {"actor": SPECS["actor"], "critic": RayClassWithInitArgs(Failing, bad_rank=1)}
    with pytest.raises(FileNotFoundError, match=r"critic\.__init__ failed on rank 1") as caught:
        RayWorkerGroup(pool, create_colocated_worker_cls(specs))
    error = caught.value
    assert isinstance(error, WorkerError)
    assert (error.role, error.rank, error.method) == ("critic", 1, "__init__")
    assert "no such checkpoint" in error.remote_traceback


def test_a_fused_worker_calls_its_roles_directly(pool: RayResourcePool) -> None:
    class Hybrid(
        create_colocated_worker_raw_cls({k: SPECS[k] for k in ("actor", "actor_rollout")})
    ):
        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
        def both(self, data: DataProto) -> DataProto:
            return self.actor_rollout.add(self.actor.add(data))

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def names(self) -> list[str]:
            return [self.get_fused_worker_by_name(n).name() for n in ("actor", "actor_rollout")]

    with RayWorkerGroup(pool, RayClassWithInitArgs(Hybrid)) as group:
        assert group.both(zeros()).batch["a"].tolist() == [0] * 5 + [8] * 5
        assert group.names() == [["actor-1", "rollout"]] * 2
        group.fuse(["actor"])
        assert group.actor.name() == ["actor-1"] * 2


def test_a_fused_spec_spawns_like_a_colocated_one(pool: RayResourcePool) -> None:
    specs = {"actor": SPECS["actor"]}
    with RayWorkerGroup(pool, create_colocated_worker_cls_fused(specs)) as group:
        assert group.spawn(specs)["actor"].name() == ["actor-1"] * 2


def test_colocate_gives_each_role_as_an_attribute(pool: RayResourcePool) -> None:
    with colocate(pool, actor=Actor, critic=SPECS["critic"]) as group:
        assert (
            group.critic.sub(group.actor.add(zeros())).batch["a"].tolist() == [-10] * 5 + [-9] * 5
        )
        assert len(group.describe().rows) == 4
        with pytest.raises(AttributeError, match=r"no role 'crtic'; the roles are \['actor', 'c"):
            _ = group.crtic
    with pytest.raises(ValueError, match="a role cannot be called 'close'"):
        colocate(pool, close=Actor)
    with pytest.raises(RegistrationError, match="needs a subclass of"):
        colocate(pool, actor=dict)
