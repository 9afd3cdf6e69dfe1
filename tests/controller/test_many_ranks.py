"""What many ranks cost the driver: nothing is asked of the cluster rank by rank, and twice as many
ranks are twice the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup

from single_controller.base import Worker
from single_controller.device import CPU
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    placement,
    process,
)
from single_controller.ray import start as starting
from single_controller.ray.failure import CallSite, diagnose
from single_controller.ray.host import HostInfo
from single_controller.ray.hosts import RayHosts
from single_controller.ray.process import ProcessInfo, end

INFO = HostInfo(0, ProcessInfo("", "n", 1), "cpu", ("actor",))


def two_at_once(function: Callable[..., Any], among: Callable[..., bool]) -> Callable[..., Any]:
    """A function whose calls `among` all go on only two by two."""
    both = threading.Barrier(2, timeout=20)

    def met(*args: Any, **kwargs: Any) -> Any:
        if among(*args, **kwargs):
            both.wait()
        return function(*args, **kwargs)

    return met


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks for a name before it gives it to an actor; the first one takes the class there."""
    asked = two_at_once(ray.get_actor, lambda name, **_: not name.endswith("_0:0"))
    monkeypatch.setattr(ray, "get_actor", asked)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read of the cluster's tables, also by Ray's own readers."""
    asked: list[str] = []

    class Tables:
        def __init__(self, tables: Any) -> None:
            self._tables = tables

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(self._tables, name)

    opened, reads = placement._tables, ray._private.state.state.actor_table
    monkeypatch.setattr(placement, "_tables", lambda: Tables(opened()))

    def read(*args: Any, **kwargs: Any) -> Any:
        asked.append("actor_table")
        return reads(*args, **kwargs)

    monkeypatch.setattr(ray._private.state.state, "actor_table", read)
    return asked


def test_a_rank_neither_starts_nor_is_found_nor_is_seen_to_live_by_a_question_of_its_own(
    cluster: None, named: None, tables: list[str]
) -> None:
    spec = RayClassWithInitArgs(Worker)
    with (
        RayResourcePool([1, 2], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, spec, name_prefix="named_") as group,
    ):
        found = RayWorkerGroup.from_detached(name_prefix="named_", ray_cls_with_init=spec)
        assert found.workers == group.workers
        tables.clear()
        states = [row.state for row in group.describe().rows]
        assert (states, tables) == (["alive"] * 3, ["get_actor_table"])
        assert group._hosts.now.find_dead() is None
        assert tables == ["get_actor_table"] * 2


def test_placement_groups_are_removed_together(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine: list[Any] = []  # a thread gives back what other tests have dropped
    removed = two_at_once(placement.remove_placement_group, lambda group: group in mine)
    monkeypatch.setattr(placement, "remove_placement_group", removed)
    with RayResourcePool([1, 1], cpus_per_process=0.1) as pool:
        mine += pool.get_placement_groups()
        assert len(mine) == 2


class Ref:
    """Stands for a reference, and counts how often one is compared, waited for and read."""

    work = 0

    def __eq__(self, other: object) -> bool:
        Ref.work += 1
        return self is other

    def __hash__(self) -> int:
        return id(self)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ready; what is read is None."""

    def wait(refs: Sequence[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        Ref.work += len(refs)
        return [], list(refs)

    def get(ref: Ref, **_: Any) -> None:
        Ref.work += 1

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)


def late(ranks: int) -> int:
    """The work for a call that was given up on all ranks, and again when it is looked at."""
    refs, handles = [Ref() for _ in range(ranks)], [SimpleNamespace() for _ in range(ranks)]
    hosts = RayHosts(handles, [], [INFO] * ranks)
    hosts.stacks = lambda ranks: dict.fromkeys(ranks, "")  # type: ignore[method-assign, assignment]
    Ref.work = 0
    error = hosts.timed_out(refs, hosts.sites("actor", "act"), 1, give_up=True)
    assert (len(error.pending_ranks), hosts.settle(0)) == (ranks, False)
    return Ref.work


def failed(ranks: int) -> int:
    """The work for a call that failed."""
    refs = [Ref() for _ in range(ranks)]
    sites = [CallSite("actor", "act", rank, "n", 1) for rank in range(ranks)]
    Ref.work = 0
    assert isinstance(diagnose(KeyError("x"), refs, sites, {}), KeyError)
    return Ref.work


def given_back(ranks: int) -> int:
    """The work for the placement groups of actors that have ended."""

    class Ids(list[str]):
        def __contains__(self, key: object) -> bool:
            Ref.work += len(self)
            return super().__contains__(key)

    Ref.work = 0
    with pytest.MonkeyPatch.context() as patch:
        group = PlacementGroup(ray.PlacementGroupID.from_random())
        there = {group: placement.Reservation("", "CREATED", (), "", "detached")}
        actors = {
            f"{i:x}": SimpleNamespace(placement_group_id=group.id.binary()) for i in range(ranks)
        }
        for key, actor in actors.items():
            actor.actor_id = bytes.fromhex(key.zfill(8))
        patch.setattr(placement, "_actors", lambda: actors)
        patch.setattr(placement, "living_actors", lambda: list(actors.values()))
        patch.setattr(placement, "reservations", lambda: there)
        patch.setattr(placement, "remove", lambda groups: None)
        patch.setattr(placement, "await_death", lambda *_: [])
        placement.give_back(Ids(actors))
    return Ref.work


class Gone(ProcessInfo):
    """A process that is not there."""

    def __eq__(self, other: object) -> bool:
        Ref.work += 1
        return super().__eq__(other)

    __hash__ = ProcessInfo.__hash__


def ended(ranks: int) -> int:
    """The work for processes that are to end, beyond what each takes."""
    Ref.work = 0
    assert all(end([Gone("node", "ip", 10**9 + rank, 1) for rank in range(ranks)]))
    return Ref.work


@pytest.mark.parametrize("work", [late, failed, given_back, ended])
def test_four_times_the_ranks_are_four_times_the_work(
    stand_ins: None, work: Callable[[int], int]
) -> None:
    assert work(1_000) <= 6 * work(250)  # a rank has a digit more


def test_the_stacks_of_a_node_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_stacks_of", two_at_once(lambda _: "a stack", lambda _: True))
    two = [ProcessInfo("node", "ip", pid) for pid in (1, 2)]
    assert process.read_stacks(two) == ["a stack"] * 2


def test_ranks_count_on_the_nodes_that_their_processes_are_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray moves bundles whose node has left, also while a group starts on them."""
    places: list[Any] = []

    def told(context: Any, *_: Any) -> None:
        places.append((context.rank, context.node_rank, context.local_world_size))

    host = SimpleNamespace(build=SimpleNamespace(remote=told))
    pool = SimpleNamespace(placement_timeout_s=1)
    recipe: Any = SimpleNamespace(
        pool=pool, spec=SimpleNamespace(roles={"a": 1}), prefix="", startup_timeout_s=1
    )
    monkeypatch.setattr(starting, "get_all", lambda refs, *_: refs)
    group = starting._Starting(recipe, [placement.Bundle(Ref(), 0, n, n) for n in "abc"])  # type: ignore[arg-type]
    group.handles = [host] * 3
    group.processes = {rank: ProcessInfo(node, node, rank) for rank, node in enumerate("bbc")}
    group.build(CPU, ("", 0), {})
    assert places == [(0, 0, 2), (1, 1, 2), (2, 0, 1)]
