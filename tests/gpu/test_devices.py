"""Which card a rank has, who may share one, and that cards are given back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from ray._private.thirdparty.pynvml import pynvml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from single_controller import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
)
from tests.gpu.cards import uuid
from tests.waiting import eventually

WIDTH = 4096


class Card(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def which(self) -> str:
        return uuid(torch.ones(1, device=self.device))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fill(self, gib: int) -> None:
        self.kept = torch.empty(gib << 30, dtype=torch.uint8, device=self.device)
        torch.cuda.synchronize()


class Large(Worker):
    """Needs most of the memory that its process may have, so that two do not fit."""

    takes_turns = True

    def __init__(self) -> None:
        super().__init__()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction((2 << 30) / total, self.device)
        weight = torch.zeros(5 << 20, 64, device=self.device)  # 1.25 GiB
        self.model = torch.nn.Embedding.from_pretrained(weight)
        self.before = self.model.weight

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def place(self) -> tuple[str, bool]:
        """Where the model is during a call, and whether its parameter is the same object."""
        return self.model.weight.device.type, self.model.weight is self.before


class Trainer(Worker):
    """A sharded module with an optimizer."""

    def __init__(self, takes_turns: bool) -> None:
        super().__init__()
        self.takes_turns = takes_turns
        if not dist.is_initialized():
            dist.init_process_group("nccl", device_id=self.device)
        torch.manual_seed(0)
        layers = [torch.nn.Linear(WIDTH, WIDTH, device=self.device) for _ in range(2)]
        mesh = init_device_mesh("cuda", (self.world_size,))
        self.module = fully_shard(torch.nn.Sequential(*layers), mesh=mesh)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-5)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def step(self) -> tuple[float, int]:
        """The loss, and the bytes of the card in use afterwards."""
        loss = self.module(torch.ones(4, WIDTH, device=self.device)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), torch.cuda.memory_allocated()


@contextlib.contextmanager
def memory_back(gib: float = 0.5) -> Iterator[Callable[[], float]]:
    """Afterwards, all cards have as much free memory as before, within `gib`. Until then, the
    function tells how many GiB more are in use.
    """
    pynvml.nvmlInit()

    def used() -> float:
        cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(pynvml.nvmlDeviceGetMemoryInfo(card).used for card in cards))

    before = used()
    while eventually(lambda seen=before: used() < seen, 1):  # processes are still ending
        before = used()
    yield lambda: (used() - before) / 2**30
    assert eventually(lambda: used() <= before + gib * 2**30)


def test_ranks_share_a_card_where_they_asked_for_half_of_one(gpus: int) -> None:
    with (
        RayResourcePool([2], cpus_per_process=0.5, gpus_per_process=0.5) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Card)) as group,
    ):
        first, second = group.which()
        assert first == second
        assert all(first[:8] in row.device for row in group.describe().rows)


def test_after_close_the_cards_memory_is_back(gpus: int) -> None:
    with (
        memory_back() as taken,
        RayResourcePool([1]) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Card)) as group,
    ):
        group.fill(4)
        assert taken() >= 4


def test_roles_that_do_not_fit_together_take_turns(gpus: int) -> None:
    with RayResourcePool([1]) as pool, colocate(pool, first=Large, second=Large) as group:
        for _ in range(2):
            assert group.first.place() == [("cuda", True)]
            assert group.second.place() == [("cuda", True)]


def test_a_sharded_model_and_its_optimizer_learn_the_same_when_they_take_turns(gpus: int) -> None:
    turns, stays = RayClassWithInitArgs(Trainer, True), RayClassWithInitArgs(Trainer, False)
    with RayResourcePool([1]) as pool:
        with RayWorkerGroup(pool, stays) as group:
            alone = [group.step()[0] for _ in range(3)]
        with colocate(pool, first=turns, second=turns) as team:
            by_turns = [(team.first.step()[0], team.second.step()[0]) for _ in range(3)]
    assert alone[0][0] > alone[2][0]
    for (loss, bytes_used), pair in zip(alone, by_turns, strict=True):
        for other_loss, other_bytes in pair:
            assert other_loss == pytest.approx(loss, rel=1e-3)
            assert other_bytes < 1.2 * bytes_used  # the other role is not there
