"""Pools over several nodes, of which two have one address."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray

from single_controller import ResourceError
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    ResourcePoolManager,
    create_colocated_worker_cls,
    failure,
    merge_resource_pool,
    split_resource_pool,
)
from single_controller.ray.placement import Bundle
from tests.faults.victim import Victim
from tests.nodes.conftest import Driver, Nodes
from tests.waiting import eventually

pytestmark = pytest.mark.slow

NINE, TEN = "127.0.0.9", "127.0.0.10"


@dataclass(frozen=True)
class Place:
    """Where a rank is, as its own process sees it."""

    node: str
    address: str
    own_meeting: str
    pid: int
    local_rank: int
    local_world_size: int


class Probe(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def place(self) -> Place:
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        assert (self.local_rank, self.local_world_size) == local
        return Place(node, address, self.get_available_master_addr_port()[0], os.getpid(), *local)


SPEC = RayClassWithInitArgs(Probe)


def places(pool: RayResourcePool) -> list[Place]:
    with RayWorkerGroup(pool, SPEC) as group:
        return group.place()


def all_given_back() -> None:
    """Ray hears a moment later that nodes are free, and spreads by what it has heard."""
    total = ray.cluster_resources()["CPU"]
    assert eventually(lambda: ray.available_resources().get("CPU") == total)


def placed(counts: Sequence[int], strategy: str = "STRICT_PACK", **settings: Any) -> list[Bundle]:
    """Where the ranks of a pool would be, which is given back."""
    all_given_back()
    with RayResourcePool(counts, **settings) as pool:
        pool.get_placement_groups(strategy)
        return [*pool.bundles()]


def numbered(ranks: Sequence[Place]) -> bool:
    """Whether the ranks of each node are 0, 1, … there, in their order."""
    for node in {rank.node for rank in ranks}:
        here = [rank for rank in ranks if rank.node == node]
        found = [(rank.local_rank, rank.local_world_size) for rank in here]
        if found != [(i, len(here)) for i in range(len(here))]:
            return False
    return True


@pytest.fixture(scope="module")
def driver(nodes: Nodes) -> Iterator[Driver]:
    """Of three nodes with two CPUs each; the last two have one address."""
    nodes.add(nine=NINE, ten=TEN, twin=TEN)
    one = Driver(nodes)
    yield one
    one.close()


def made_anew() -> list[list[tuple[str, str]]]:
    pools = [placed([1, 1, 1], cpus_per_process=2) for _ in range(6)]
    return [[(bundle.node_ip, bundle.node_id) for bundle in pool] for pool in pools]


def test_ranks_are_in_the_order_of_their_nodes_whenever_a_pool_is_made(driver: Driver) -> None:
    first, *others = driver(made_anew)
    assert [address for address, _ in first] == [NINE, TEN, TEN]
    assert len({node for _, node in first}) == 3
    assert others == [first] * 5


@pytest.mark.parametrize(
    ("counts", "strategy", "on_nodes"),
    [
        ([2], "STRICT_PACK", [2]),
        ([3], "PACK", [1, 2]),
        ([3], "SPREAD", [1, 1, 1]),
        ([4], "SPREAD", [1, 1, 2]),
        ([6], "SPREAD", [2, 2, 2]),
        ([1, 1, 1, 1, 2], "STRICT_PACK", [2, 2, 2]),
    ],
)
def test_a_strategy_places_and_the_ranks_of_a_node_follow_each_other(
    driver: Driver, counts: list[int], strategy: str, on_nodes: list[int]
) -> None:
    """The last would not fit if the small ones were placed before the large one."""
    ranks = driver(placed, counts, strategy)
    runs = [(ip, len([*run])) for (ip, _), run in groupby((b.node_ip, b.node_id) for b in ranks)]
    assert sorted(size for _, size in runs) == on_nodes
    assert [ip for ip, _ in runs] == sorted((ip for ip, _ in runs), key=[NINE, TEN].index)


def uneven() -> tuple[list[list[int]], list[list[Place]]]:
    def holder(node: str, cpus: int) -> RayResourcePool:
        pool = RayResourcePool([1], resources_per_process={node: 1}, cpus_per_process=cpus)
        pool.get_placement_groups()
        return pool

    with (
        holder("nine", 1),
        holder("twin", 2),
        RayResourcePool([2, 1]) as pool,
        RayWorkerGroup(pool, SPEC) as group,
    ):
        started = group.place()
        group.restart()
        found = [started, group.place()]
        counts = [pool.store, pool.local_rank_list(), pool.local_world_size_list()]
        return counts, [*found, *map(places, split_resource_pool(pool, [2, 1]))]


def test_ranks_of_an_uneven_pool_its_parts_and_after_a_restart_know_their_places_on_their_nodes(
    driver: Driver,
) -> None:
    (store, local_ranks, local_sizes), (first, again, across, rest) = driver(uneven)
    assert [rank.address for rank in first] == [NINE, TEN, TEN]
    assert [rank.own_meeting for rank in first] == [NINE, TEN, TEN]
    assert all(map(numbered, (first, again, across, rest)))
    assert [rank.node for rank in again] == [rank.node for rank in first]
    assert [rank.node for rank in (*across, *rest)] == [rank.node for rank in first]
    assert [rank.local_world_size for rank in (*across, *rest)] == [1, 1, 1]
    # The pool says the same of itself.
    assert store == [1, 2]
    assert local_ranks == [rank.local_rank for rank in first]
    assert local_sizes == [rank.local_world_size for rank in first]


def merged() -> tuple[list[Place], list[bool]]:
    all_given_back()
    with RayResourcePool([3]) as a, RayResourcePool([3]) as b:
        for pool in (a, b):
            pool.get_placement_groups("SPREAD")
        both = merge_resource_pool(b, a)
        halves = split_resource_pool(both, 3)
        _, middle, _ = split_resource_pool(both, [2, 2, 2])
        return places(both), [
            both.bundles() == (*b.bundles(), *a.bundles()),
            [half.bundles() for half in halves] == [b.bundles(), a.bundles()],
            middle.bundles() == (b.bundles()[2], a.bundles()[0]),
            merge_resource_pool(*halves[::-1]).bundles() == (*a.bundles(), *b.bundles()),
        ]


def test_pools_over_nodes_are_merged_and_split_across_them(driver: Driver) -> None:
    ranks, as_they_were = driver(merged)
    assert [rank.local_rank for rank in ranks] == [0, 0, 0, 1, 1, 1]
    assert numbered(ranks)
    assert as_they_were == [True] * 4


ADDRESSES = (
    ["10.0.0.9", "10.0.0.10", "fe80::2%eth0"],
    ["fd00::9", "fd00::10", "fd00::1:0"],
    ["10.0.0.9", "node-10", "node-9"],
)


def orders() -> list[list[str]]:
    """The addresses of pools' ranks, if their nodes had those above instead of their own."""
    there, found = ray.nodes(), []
    nodes = [bundle.node_id for bundle in placed([1, 1, 1], cpus_per_process=2)]
    head = {node["NodeID"]: "10.0.0.1" for node in there}
    for addresses in ADDRESSES:
        given = head | dict(zip(nodes, addresses[::-1], strict=True))
        patched = [{**node, "NodeManagerAddress": given[node["NodeID"]]} for node in there]
        with mock.patch.object(ray, "nodes", return_value=patched):
            found.append([b.node_ip for b in placed([1, 1, 1], cpus_per_process=2)])
    return found


def test_addresses_are_compared_as_numbers_and_come_before_names(driver: Driver) -> None:
    assert driver(orders) == [*ADDRESSES]


def refused(counts: Sequence[int]) -> str:
    with pytest.raises(ResourceError) as caught:
        placed(counts)
    return str(caught.value)


def test_a_pool_that_fits_the_cluster_and_no_node_is_refused_with_what_each_node_holds(
    driver: Driver,
) -> None:
    text = driver(refused, [3, 1])
    assert text.startswith("the cluster cannot hold this pool: process_on_nodes=[3, 1]")
    held = re.findall(r"node (\S+) holds (\d) processes", text)
    assert held == [("127.0.0.2", "0"), (NINE, "2"), (TEN, "2"), (TEN, "2")]


def train() -> dict[str, Any]:
    """As trainers do: a group of hosts per pool with the roles that are mapped to it, one more
    group on a pool, and replicas of a rollout that are cut anew for the next step.
    """
    mapping = {"actor": "train", "critic": "train", "ref": "train", "rollout": "rollout"}
    specs = {"train": [2], "rollout": [2, 1]}
    manager = ResourcePoolManager(specs, mapping, max_colocate_count=2)
    manager.create_resource_pool()
    pool, spare = manager.get_resource_pool("actor"), manager.get_resource_pool("rollout")
    with pool, spare:
        roles = create_colocated_worker_cls({"actor": SPEC, "critic": SPEC})
        with RayWorkerGroup(pool, roles) as hosts, RayWorkerGroup(pool, SPEC) as ref:
            groups = hosts.spawn({"actor", "critic"})
            found = {role: group.place() for role, group in groups.items()}
            found["ref"] = ref.place()
            for step, sizes in enumerate(([2, 1], [1, 2], [3])):
                replicas = [places(part) for part in split_resource_pool(spare, sizes)]
                found[f"step {step}"] = replicas
    return {**found, "n_gpus": manager.get_n_gpus()}


def test_roles_share_pools_of_a_manager_and_one_is_cut_anew_between_steps(driver: Driver) -> None:
    found = driver(train)
    assert found["n_gpus"] == 5
    assert found["actor"] == found["critic"]
    actor, ref = found["actor"], found["ref"]
    assert [rank.node for rank in ref] == [rank.node for rank in actor]
    assert len({rank.pid for rank in (*actor, *ref)}) == 4
    (whole,) = found["step 2"]
    for step, sizes in (("step 0", [2, 1]), ("step 1", [1, 2])):
        assert [len(replica) for replica in found[step]] == sizes
        assert [rank.node for replica in found[step] for rank in replica] == [
            rank.node for rank in whole
        ]
    assert len({rank.node for rank in (*actor, *whole)}) == 3
    assert all(map(numbered, (actor, ref, whole, *found["step 0"], *found["step 1"])))


def of_a_late_node(name: str, log: str) -> tuple[list[str], str, list[float]]:
    failure._LOG_S = 0.1
    logging.getLogger("single_controller").addHandler(logging.FileHandler(log))
    needs: Any = {"resources_per_process": {name: 1}}
    with pytest.raises(ResourceError, match=f"0 of 0 {name} free"):
        placed([2], **needs)
    with RayResourcePool([2], waits_for_nodes=True, **needs) as pool:
        addresses = [bundle.node_ip for bundle in pool.bundles()]
        with RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as group:
            return addresses, group.master_address, group.all_reduce()


def ipv6_address() -> str:
    """One of this machine that others reach; skips where there is none or Ray takes none."""
    if [*map(int, ray.__version__.split(".")[:2])] <= [2, 41]:
        pytest.skip(f"ray {ray.__version__} takes no IPv6 address")
    table = Path("/proc/net/if_inet6")
    lines = table.read_text(encoding="ascii").splitlines() if table.exists() else []
    for text, _, _, scope, *_ in map(str.split, lines):
        if scope == "00":
            return str(ipaddress.IPv6Address(int(text, 16)))
    pytest.skip("this machine has no IPv6 address that others reach")


@pytest.mark.parametrize("name", ["late_ipv4", "late_ipv6"])
def test_a_pool_waits_for_a_node_that_joins_late_and_its_ranks_meet_there(
    nodes: Nodes, driver: Driver, tmp_path: Path, name: str
) -> None:
    log, address = tmp_path / "log", "127.0.0.11" if name == "late_ipv4" else ipv6_address()
    found = driver.submit(of_a_late_node, name, str(log))
    said = rf"0 of 1 placement groups; process_on_nodes=\[2\] .* asks for 2 .*{name}: 1"
    assert eventually(lambda: log.exists() and re.search(said, log.read_text(encoding="utf-8")))
    assert not found.done()
    nodes.add(**{name: address})
    assert found.result(90) == ([address] * 2, address, [3.0, 3.0])
