"""`torch.distributed` in inline groups: real with one rank, refused where ranks would wait."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from single_controller import ClassWithInitArgs, CollectiveError, ResourcePool, WorkerError
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import InlineWorkerGroup


class Member(Worker):
    def __init__(self) -> None:
        dist.init_process_group("gloo")
        self.mesh = init_device_mesh("cpu", (self.world_size, 1), mesh_dim_names=("dp", "tp"))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def place(self) -> tuple[int, int, str]:
        return dist.get_rank(), dist.get_world_size(), dist.get_backend()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def total(self, over: str) -> float:
        ones = torch.ones(1)
        dist.all_reduce(ones, group=self.mesh.get_group(over))
        return ones.item()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def collective(self, name: str) -> Any:
        other, parts = (self.rank + 1) % self.world_size, [ONE, ONE] if self.rank == 0 else None
        return COLLECTIVES[name](other, parts)


ONE, TWO = torch.ones(1), torch.ones(2)
COLLECTIVES: dict[str, Callable[[int, Any], Any]] = {
    "all_gather": lambda other, parts: dist.all_gather([ONE, ONE], ONE),
    "all_gather_object": lambda other, parts: dist.all_gather_object([None, None], 1),
    "all_reduce": lambda other, parts: dist.all_reduce(ONE),
    "all_to_all_single": lambda other, parts: dist.all_to_all_single(TWO, TWO),
    "barrier": lambda other, parts: dist.barrier(),
    "broadcast": lambda other, parts: dist.broadcast(ONE, 0),
    "ddp": lambda other, parts: DistributedDataParallel(torch.nn.Linear(1, 1)),
    "gather": lambda other, parts: dist.gather(ONE, parts),
    "reduce": lambda other, parts: dist.reduce(ONE, 0),
    "scatter": lambda other, parts: dist.scatter(ONE, parts),
    "recv": lambda other, parts: dist.recv(ONE, other),
    "send": lambda other, parts: dist.send(ONE, other),
}


def started(ranks: int) -> Any:
    return InlineWorkerGroup(ResourcePool([ranks]), ClassWithInitArgs(Member))


@pytest.fixture(scope="module")
def two() -> Iterator[Any]:
    with started(2) as group:
        yield group


def test_one_rank_has_a_real_process_group_and_so_has_each_group_of_one() -> None:
    with started(1) as first, started(1) as second:
        for group in (first, second, first):
            assert group.place() == [(0, 1, "gloo")]
            assert group.total("dp") == [1.0]
            group.collective("barrier")
        assert not dist.is_initialized()


def test_several_ranks_know_their_places_and_their_meshes(two: Any) -> None:
    assert [place[:2] for place in two.place()] == [(0, 2), (1, 2)]
    assert two.total("tp") == [1.0, 1.0]
    assert two.execute_func_rank_zero(two.place) == two.place()  # within a call of its own
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_of_several_ranks_is_refused_at_once(two: Any, name: str) -> None:
    with pytest.raises(CollectiveError, match=r"needs 2 ranks at once.*one rank, or run") as caught:
        two.collective(name)
    assert isinstance(caught.value, WorkerError)
    assert caught.value.failed_ranks == 2


def test_groups_leave_torch_as_it_was_also_where_the_driver_has_a_process_group(
    tmp_path: Any,
) -> None:
    c10d: Any = sys.modules["torch.distributed.distributed_c10d"]

    def state() -> tuple[Any, ...]:
        return c10d._world, c10d.rendezvous, c10d._new_process_group_helper, sys.excepthook

    before = state()
    for size in (1, 2, 1):
        with started(size) as group:
            group.place()
    assert state() == before
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with started(2) as group:
            assert [place[:2] for place in group.place()] == [(0, 2), (1, 2)]
            assert dist.get_world_size() == 1
            dist.barrier()
    finally:
        dist.destroy_process_group()
