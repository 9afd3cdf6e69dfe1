"""`torch.distributed` in inline groups: real with one rank, refused where ranks would wait."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

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
        one, two = torch.ones(1), torch.ones(2)
        other = (self.rank + 1) % self.world_size
        return {
            "all_gather": lambda: dist.all_gather([one, one], one),
            "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
            "all_reduce": lambda: dist.all_reduce(one),
            "all_to_all_single": lambda: dist.all_to_all_single(two, two),
            "barrier": lambda: dist.barrier(),
            "broadcast": lambda: dist.broadcast(one, src=0),
            "ddp": lambda: torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1)),
            "gather": lambda: dist.gather(one, [one, one] if self.rank == 0 else None),
            "reduce": lambda: dist.reduce(one, dst=0),
            "scatter": lambda: dist.scatter(one, [one, one] if self.rank == 0 else None),
            "recv": lambda: dist.recv(one, src=other),
            "send": lambda: dist.send(one, dst=other),
        }[name]()


COLLECTIVES = [
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "ddp",
    "gather",
    "reduce",
    "scatter",
    "recv",
    "send",
]


@pytest.fixture(scope="module")
def two() -> Any:
    with InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(Member)) as group:
        yield group


def test_one_rank_has_a_real_process_group_and_so_has_each_group_of_one() -> None:
    with (
        InlineWorkerGroup(None, ClassWithInitArgs(Member)) as first,
        InlineWorkerGroup(None, ClassWithInitArgs(Member)) as second,
    ):
        for group in (first, second, first):
            assert group.place() == [(0, 1, "gloo")]
            assert group.total("dp") == [1.0]
            group.collective("barrier")
        assert not dist.is_initialized()


def test_several_ranks_know_their_places_and_their_meshes(two: Any) -> None:
    assert [place[:2] for place in two.place()] == [(0, 2), (1, 2)]
    assert two.total("tp") == [1.0, 1.0]
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_of_several_ranks_is_refused_at_once(two: Any, name: str) -> None:
    with pytest.raises(CollectiveError, match=r"needs 2 ranks at once.*one rank, or run") as caught:
        two.collective(name)
    assert isinstance(caught.value, WorkerError)
    assert caught.value.failed_ranks == 2


def test_closing_a_group_leaves_torch_as_it_was() -> None:
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    before = (c10d._world, c10d.rendezvous, c10d._new_process_group_helper, sys.excepthook)  # type: ignore[attr-defined]
    for size in (1, 2, 1):
        with InlineWorkerGroup(ResourcePool([size]), ClassWithInitArgs(Member)) as group:
            group.place()
    assert before == (
        c10d._world,  # type: ignore[attr-defined]
        c10d.rendezvous,  # type: ignore[attr-defined]
        c10d._new_process_group_helper,  # type: ignore[attr-defined]
        sys.excepthook,
    )


def test_the_drivers_own_process_group_is_not_the_workers(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(Member)) as group:
            assert [place[:2] for place in group.place()] == [(0, 2), (1, 2)]
            assert dist.get_world_size() == 1
            dist.barrier()
    finally:
        dist.destroy_process_group()
    assert "RANK" not in os.environ
