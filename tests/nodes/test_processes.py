"""Processes on other nodes than their driver's: where they meet, what they do, and their end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table

from protocol import DataProto
from single_controller import WorkerDiedError, WorkerError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.faults.victim import Victim
from tests.nodes.conftest import Driver, Nodes
from tests.waiting import eventually, is_alive

pytestmark = pytest.mark.slow

LEFT, RIGHT = "127.0.0.9", "127.0.0.10"
WORDS = {
    "fine": "in no call",
    "sleep": "in _sleep",
    "collective": "in all_reduce",
    "stop": "(its state is T)",
}
HERE: dict[str, Any] = {}  # of the driver's process


class Model(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"x": data.batch["x"] + self.rank})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def add_later(self, data: DataProto) -> DataProto:
        return self.add(data)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fail(self, how: str) -> None:
        if how == "raise":
            raise KeyError("broken on purpose")
        if how == "die":
            os.write(2, b"last words\n")
            os._exit(3)


@pytest.fixture(scope="module")
def head(nodes: Nodes) -> Iterator[Driver]:
    """A driver on the head, which has no ranks. There is room for one on each other node."""
    nodes.add(1, left=LEFT, right=RIGHT)
    driver = Driver(nodes)
    yield driver
    driver.close()


def start() -> list[int]:
    """A group of two ranks; their pids."""
    HERE["pool"] = RayResourcePool([1, 1])
    HERE["group"] = RayWorkerGroup(HERE["pool"], RayClassWithInitArgs(Victim))
    return pids()


def pids() -> list[int]:
    return [row.pid for row in HERE["group"].describe().rows]


def places() -> list[str]:
    return [row.node for row in HERE["group"].describe().rows]


def call(method: str, *args: Any) -> Any:
    return getattr(HERE["group"], method)(*args)


def addresses() -> list[str]:
    found = HERE["group"].execute_all_sync("get_master_addr_port")
    return [address for address, _ in found]


def submit(*what: str) -> None:
    """Have each rank act so, and return once all were seen at it."""
    HERE["call"] = HERE["group"].act.submit(PerRank(what))
    words = [WORDS[one] for one in what]
    told = HERE["group"].stacks
    assert eventually(lambda: all(words[rank] in text for rank, text in told().items()))


def result() -> Any:
    return HERE["call"].result(timeout=60)


@pytest.fixture(scope="module")
def group(head: Driver) -> list[int]:
    """Their pids. Looked at once, so that either node has a process by which others look at it."""
    pids = head(start)
    head(submit, "fine", "fine")
    assert head(result) == ["fine", "fine"]
    return pids


def test_ranks_on_two_nodes_meet_where_rank_0_is_which_is_not_where_the_driver_is(
    head: Driver, group: list[int]
) -> None:
    assert head(places) == [LEFT, RIGHT]
    assert head(addresses) == [LEFT, LEFT]
    assert head(call, "all_reduce") == [3.0, 3.0]


def restart() -> list[int]:
    HERE["group"].restart()
    return pids()


def close() -> None:
    HERE["group"].close()
    HERE["pool"].close()


def test_ranks_on_other_nodes_that_wait_for_one_that_failed_are_shown_and_ended(
    head: Driver, group: list[int]
) -> None:
    with pytest.raises(KeyError) as error:
        head(call, "act", PerRank(["collective", "raise"]))
    assert isinstance(error.value, WorkerError)
    assert "in all_reduce" in error.value.stuck[0]
    assert not is_alive(group[0])
    head(restart)


def test_what_ranks_on_other_nodes_do_and_last_wrote_is_shown_also_of_a_stopped_one(
    head: Driver, group: list[int]
) -> None:
    with pytest.raises(KeyError) as error:
        head(call, "act", PerRank(["sizeable", "raise"]))
    assert isinstance(error.value, WorkerError)
    assert error.value.failed_ranks == 1, "an output that is on another node is no failure"
    head(submit, "sleep", "stop")
    os.kill(head(pids)[1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=rf"rank 1 \(node {RIGHT}, pid .*died") as death:
        head(result)
    assert death.value.log_tail == "about to fail"


def test_a_restart_and_a_close_leave_no_process_on_any_node(head: Driver, group: list[int]) -> None:
    before = head(restart)
    head(submit, "stop", "sleep")
    after = head(restart)
    assert not any(map(is_alive, before))
    after += [pid for started in head(call, "act", "engines") for pid in started]
    assert len(after) == 10
    head(close)
    assert not any(map(is_alive, after))


SPEC = RayClassWithInitArgs(Model)


def start_detached() -> tuple[str, list[int]]:
    """Ray's namespace, and their pids."""
    pool = RayResourcePool([1, 1], detached=True)
    HERE["group"] = RayWorkerGroup(pool, SPEC, name_prefix="lasting_", detached=True)
    return ray.get_runtime_context().namespace, pids()


def attach(address: str, namespace: str) -> list[int]:
    node_ip = ray.util.get_node_ip_address()
    ray.shutdown()
    ray.init(address, namespace=namespace, _node_ip_address=node_ip, log_to_driver=False)
    HERE["group"] = RayWorkerGroup.from_detached(name_prefix="lasting_", ray_cls_with_init=SPEC)
    return pids()


def end() -> None:
    HERE["group"].close()


def batch(rows: int = 4) -> DataProto:
    return DataProto.from_dict({"x": torch.arange(float(rows))})


def values(data: DataProto) -> list[float]:
    return data.batch["x"].tolist()


def use() -> list[float]:
    group = HERE["group"]
    return values(group.add(group.add_later(batch())))


def reservations() -> set[str]:
    return {group["state"] for group in placement_group_table().values()}


def test_a_detached_group_is_used_and_closed_by_a_driver_on_another_node(
    nodes: Nodes, head: Driver
) -> None:
    first = Driver(nodes, LEFT)
    namespace, pids = first(start_detached)
    first.close()
    assert head(attach, nodes.address, namespace) == pids
    assert head(use) == [0, 1, 4, 5]
    head(end)
    assert not any(map(is_alive, pids))
    assert head(reservations) == {"REMOVED"}


@ray.remote(num_cpus=0)
class Controller:
    """A driver. `live` does all that one does, and closes what it has started."""

    def start(self) -> list[int]:
        self.pool = RayResourcePool([1, 1])
        self.group = RayWorkerGroup(self.pool, SPEC)
        return [row.pid for row in self.group.describe().rows]

    def live(self) -> list[int]:
        pids, group = self.start(), self.group
        assert values(group.add(batch())) == [0, 1, 3, 4]
        made = group.add_later(batch())
        assert values(group.add(made.select(["x"]))) == [0, 1, 4, 5]
        assert values(made.get()) == [0, 1, 3, 4]
        with pytest.raises(KeyError, match="broken on purpose") as error:
            group.fail(PerRank(["", "raise"]))
        assert isinstance(error.value, WorkerError)
        assert error.value.rank == 1
        with pytest.raises(WorkerDiedError, match="last words"):
            group.fail(PerRank(["", "die"]))
        group.restart()
        pids += [row.pid for row in group.describe().rows]
        assert values(group.add(batch())) == [0, 1, 3, 4]
        group.close()
        self.pool.close()
        return pids


def from_an_actor(end: bool) -> list[int]:
    """Of a controller on the left: of whom it has ended all, or which it was killed with."""
    controller: Any = Controller.options(resources={"left": 1}).remote()
    if end:
        return ray.get(controller.live.remote())
    pids = ray.get(controller.start.remote())
    ray.kill(controller)
    return pids


@pytest.mark.parametrize("end", [True, False])
def test_a_driver_in_an_actor_on_another_node_leaves_nothing_whether_it_closes_or_is_killed(
    head: Driver, end: bool
) -> None:
    pids = head(from_an_actor, end)
    assert len(set(pids)) == (4 if end else 2)
    assert eventually(lambda: not any(map(is_alive, pids)))
    if end:
        assert head(reservations) == {"REMOVED"}
