"""Starting and attaching: the environment, the rendezvous, detached groups."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from single_controller import (
    CallTimeoutError,
    GroupBrokenError,
    RegistrationError,
    ResourceError,
    ResourcePool,
    UnknownMethodError,
)
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
    create_colocated_worker_cls,
    split_resource_pool,
)
from tests.waiting import eventually


class Member(Worker):
    def __init__(self, seconds: float = 0) -> None:
        import threading

        threading.Event().wait(seconds)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def environment(self) -> dict[str, str]:
        return {key: os.environ.get(key, "") for key in (*self.env_keys(), "EXTRA")}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def all_reduce(self) -> tuple[float, str, Any]:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        total = torch.tensor([self.rank + 1.0])
        dist.all_reduce(total)
        return total.item(), str(self.device), self.get_master_addr_port()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def own_meeting(self, url: str) -> bytes:
        from torch.distributed import rendezvous

        timeout = timedelta(seconds=60)
        self.store, *_ = next(rendezvous(url, self.rank, self.world_size, timeout=timeout))
        self.store.set(str(self.rank), f"from {self.rank}")
        self.store.wait(["0", "1"])
        return bytes(self.store.get("0"))


@pytest.fixture(scope="module")
def first(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    spec = RayClassWithInitArgs(Member)
    with RayWorkerGroup(pool, spec, name_prefix="a_", worker_env={"EXTRA": "1"}) as group:
        yield group


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port that another program has."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture(scope="module")
def second(pool: RayResourcePool, taken: int) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(
        pool,
        RayClassWithInitArgs(Member),
        name_prefix="b_",
        master_addr="127.0.0.1",
        master_port_range=[taken, taken + 50],
    ) as group:
        yield group


def test_every_worker_finds_its_place_and_torch_meets_without_arguments(
    first: RayWorkerGroup, second: RayWorkerGroup, taken: int
) -> None:
    for rank, env in enumerate(first.environment()):
        assert env == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "RAY_LOCAL_RANK": str(rank),
            "RAY_LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": first.master_address,
            "MASTER_PORT": first.master_port,
            "WG_PREFIX": "a_",
            "WG_BACKEND": "ray",
            "EXTRA": "1",
        }
    assert {env["MASTER_ADDR"] for env in second.environment()} == {"127.0.0.1"}
    assert second.master_address == "127.0.0.1" != first.master_address
    assert first.worker_names == ["a_Member_0:0", "a_Member_0:1"]
    assert taken < int(second.master_port) <= taken + 50
    for group in (first, second, first):
        address = (group.master_address, group.master_port)
        assert group.all_reduce() == [(3.0, "cpu", address)] * 2
    with pytest.raises(OSError, match="in use"), socket.socket() as probe:
        probe.bind(("", int(first.master_port)))


def test_a_master_port_that_is_taken_is_named(pool: RayResourcePool, taken: int) -> None:
    with pytest.raises(ResourceError, match=f"master_port {taken} cannot be bound"):
        RayWorkerGroup(pool, RayClassWithInitArgs(Member), master_port=taken)


def test_a_rendezvous_of_the_users_own_is_torchs(first: RayWorkerGroup) -> None:
    """A variable for the group's own meeting would have it wait for a store that nobody serves."""
    address, port = first.execute_rank_zero_sync("get_available_master_addr_port")
    assert first.own_meeting(f"tcp://{address}:{port}") == [b"from 0"] * 2
    assert [row[0] for row in first.all_reduce()] == [3.0] * 2


@pytest.mark.parametrize(
    "env", [{"RANK": "0", "MASTER_PORT": "1"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}]
)
def test_variables_that_the_group_sets_are_refused_by_name(
    pool: RayResourcePool, env: dict[str, str]
) -> None:
    spec = RayClassWithInitArgs(Member)
    names = ", ".join(sorted(env))
    with pytest.raises(ValueError, match=f"worker_env must not set {names}"):
        RayWorkerGroup(pool, spec, worker_env=env)
    spec.update_options({"runtime_env": {"env_vars": env}})
    with pytest.raises(ValueError, match=f"env_vars of runtime_env must not set {names}"):
        RayWorkerGroup(pool, spec)


def test_a_worker_that_needs_no_torch_has_none(pool: RayResourcePool) -> None:
    """It takes seconds of CPU, on every rank."""

    class Light(Worker):
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def heavy(self) -> list[str]:
            return [
                name for name in ("torch", "tensordict", "protocol", "numpy") if name in sys.modules
            ]

        @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
        def text(self) -> str:
            return "x" * 200_000

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def length(self, text: str) -> int:
            return len(text)

    with RayWorkerGroup(pool, RayClassWithInitArgs(Light)) as group:
        assert [group.heavy(), group.heavy()] == [[[], []]] * 2
        kept = group.text()
        assert group.length(PerRank(kept)) == group.length(kept[0]) == [200_000] * 2
        assert group.heavy() == [[], []]


def test_a_constructor_that_does_not_return_is_given_up_by_rank(pool: RayResourcePool) -> None:
    spec = RayClassWithInitArgs(Member, seconds=600)
    with pytest.raises(CallTimeoutError, match=r"ranks \[0, 1\] .*build.* Member") as caught:
        RayWorkerGroup(pool, spec, startup_timeout_s=0.5)
    assert caught.value.pending_ranks == (0, 1)


def test_a_group_needs_something_to_start_and_somewhere(pool: RayResourcePool) -> None:
    for wrong in (None, Member, RayWorkerGroup):
        with pytest.raises(RegistrationError, match="ray_cls_with_init must say what to start"):
            RayWorkerGroup(pool, wrong)
    with pytest.raises(TypeError, match="resource_pool must be a RayResourcePool"):
        RayWorkerGroup(ResourcePool([1]), RayClassWithInitArgs(Member))  # type: ignore[arg-type]
    spec = RayClassWithInitArgs(ray.remote(max_restarts=2)(Member))
    with pytest.raises(ValueError, match=r"max_restarts .* on_failure='restart'"):
        RayWorkerGroup(pool, spec)
    with pytest.raises(ValueError, match="needs a resource_pool"):
        RayWorkerGroup()


def test_another_group_object_attaches_to_running_hosts(pool: RayResourcePool) -> None:
    spec = RayClassWithInitArgs(Member)
    with pytest.raises(ValueError, match="needs a pool with detached=True"):
        RayWorkerGroup(pool, spec, detached=True)
    kept = RayResourcePool([2], detached=True, cpus_per_process=0.5)
    started = RayWorkerGroup(kept, spec, name_prefix="kept_", detached=True)
    for found in (
        RayWorkerGroup.from_detached(name_prefix="kept_", ray_cls_with_init=spec),
        RayWorkerGroup.from_detached(
            worker_names=started.worker_names[::-1], ray_cls_with_init=spec
        ),
        RayWorkerGroup(worker_handles=started.workers, ray_cls_with_init=spec),
    ):
        assert [env["RANK"] for env in found.environment()] == ["0", "1"]
        assert found.master_port == started.master_port
    with pytest.raises(ValueError, match="no running host has name_prefix 'kept'"):
        RayWorkerGroup.from_detached(name_prefix="kept", ray_cls_with_init=spec)
    both = create_colocated_worker_cls({"a": spec, "b": spec})
    with pytest.raises(ValueError, match=r"hold roles \['Member'\], and .* says \['a', 'b'\]"):
        RayWorkerGroup(worker_handles=started.workers, ray_cls_with_init=both)
    with pytest.raises(ValueError, match=r"all ranks of one group; got ranks \[1\]"):
        RayWorkerGroup(worker_names=started.worker_names[1:], ray_cls_with_init=spec)
    unbound = RayWorkerGroup(worker_handles=started.workers)
    assert [env["RANK"] for env in unbound.execute_all_sync("environment")] == ["0", "1"]
    last = RayWorkerGroup(split_resource_pool(kept, 1)[1], spec, name_prefix="last_")
    (reservation,) = kept.get_placement_groups()
    found.close()
    assert eventually(lambda: "kept_Member_0:0" not in ray.util.list_named_actors())
    assert last.environment()[0]["RANK"] == "0", "its reservation went with another group"
    RayWorkerGroup(worker_handles=last.workers).close()
    assert placement_group_table(reservation)["state"] == "REMOVED"
    kept.close()


class Environment(Worker):
    """What a program knows of `Member`, and what that does not have."""

    environment = Member.environment

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def absent(self) -> None: ...


def test_workers_of_several_groups_are_the_ranks_of_one_in_the_order_of_their_handles(
    first: RayWorkerGroup, second: RayWorkerGroup
) -> None:
    spec = RayClassWithInitArgs(Member)
    mixed = [second.workers[1], first.workers[0], second.workers[0]]
    group = RayWorkerGroup(worker_handles=mixed, ray_cls_with_init=spec)
    where = [(env["WG_PREFIX"], env["RANK"]) for env in group.environment()]
    assert where == [("b_", "1"), ("a_", "0"), ("b_", "0")]
    pids = [[row.pid for row in one.describe().rows] for one in (group, first, second)]
    assert pids[0] == [pids[2][1], pids[1][0], pids[2][0]]
    assert [row.rank for row in group.describe().rows] == [0, 1, 2]
    assert (group.world_size, group.master_address) == (3, "")
    with pytest.raises(GroupBrokenError, match="attached to running hosts"):
        group.restart()
    with pytest.raises(ValueError, match="needs a resource_pool"):
        RayWorkerGroup(worker_handles=[], ray_cls_with_init=spec)
    with pytest.raises(ValueError, match=r"different workers .* \(pid \d+\), .* \(pid \d+\)"):
        RayWorkerGroup(worker_handles=[first.workers[0]] * 2, ray_cls_with_init=spec)


def test_the_class_that_a_group_is_attached_with_says_which_methods_it_has(
    first: RayWorkerGroup,
) -> None:
    attach = partial(RayWorkerGroup, worker_handles=first.workers)
    base = attach(ray_cls_with_init=RayClassWithInitArgs(Worker))
    assert base.execute_func_rank_zero(os.getpid) == first.describe().rows[0].pid
    with pytest.raises(UnknownMethodError, match="environment"):
        base.environment()
    other = attach(ray_cls_with_init=RayClassWithInitArgs(Environment))
    assert [env["RANK"] for env in other.environment()] == ["0", "1"]
    with pytest.raises(AttributeError, match="'Member' object has no attribute 'absent'"):
        other.absent()


@pytest.mark.slow
def test_different_counts_per_node_start_all_workers(cluster: None) -> None:
    with (
        RayResourcePool([1, 2], cpus_per_process=0.5) as uneven,
        RayWorkerGroup(uneven, RayClassWithInitArgs(Member)) as group,
    ):
        assert [env["RANK"] for env in group.environment()] == ["0", "1", "2"]
        assert {env["LOCAL_WORLD_SIZE"] for env in group.environment()} == {"3"}
        assert [row[0] for row in group.all_reduce()] == [6.0] * 3


class Given(Worker):
    def __init__(self, rows: Any) -> None:
        super().__init__()


def test_a_constructor_argument_that_cannot_be_sent_is_told_before_any_process_starts(
    pool: RayResourcePool,
) -> None:
    spec = RayClassWithInitArgs(Given, rows=[(i for i in [1])])
    with pytest.raises(TypeError, match="cannot pickle 'generator'"):
        RayWorkerGroup(pool, spec, name_prefix="unsendable_")
    assert [n for n in ray.util.list_named_actors() if n.startswith("unsendable_")] == []


class Speaker(Worker):
    def __init__(self) -> None:
        sys.stdout.write(f"built {('zero', 'one')[self.rank]}\n")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def speak(self) -> None:
        sys.stderr.write(f"spoke {('zero', 'one')[self.rank]}\n")


def test_what_a_worker_prints_is_shown_with_its_roles_and_rank(
    pool: RayResourcePool, capfd: pytest.CaptureFixture[str]
) -> None:
    with colocate(pool, actor=Speaker, critic=Speaker) as group:
        group.actor.speak()
        shown = [""]

        def all_seen() -> bool:
            shown.extend(capfd.readouterr())
            found = re.findall(r"\(actor\+critic rank (\d) pid=\d+.*\).* (\w+ \w+)", "".join(shown))
            rows = [
                ("0", "built zero"),
                ("1", "built one"),
                ("0", "spoke zero"),
                ("1", "spoke one"),
            ]
            return {*rows} <= {*found}

        assert eventually(all_seen), "".join(shown)
