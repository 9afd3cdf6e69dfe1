"""Which card a rank has, who may share one, and that cards are given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from ray._private.thirdparty.pynvml import pynvml

from protocol import DataProto
from single_controller import ResourceError, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
)
from tests.gpu.cards import uuid
from tests.waiting import eventually


class Card(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def which(self) -> str:
        return uuid(torch.ones(1, device=self.device))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fill(self, gib: int) -> None:
        self.kept = torch.empty(gib << 30, dtype=torch.uint8, device=self.device)
        torch.cuda.synchronize()


class Actor(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto) -> DataProto:
        data.batch["a"] = data.batch["a"].to("cuda")
        data.batch["a"] += self.rank
        return data


class Critic(Worker):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.config = config

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def sub(self, data: DataProto) -> DataProto:
        data.batch["a"] = data.batch["a"].to("cuda")
        data.batch["a"] -= self.config["b"]
        return data


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


@contextlib.contextmanager
def memory_back(gib: float = 0.5) -> Iterator[None]:
    """Afterwards, all cards have as much free memory as before, within `gib`."""
    pynvml.nvmlInit()

    def used() -> float:
        cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(pynvml.nvmlDeviceGetMemoryInfo(card).used for card in cards))

    before = used()
    yield
    assert eventually(lambda: used() <= before + gib * 2**30)


def test_ranks_share_a_card_where_they_asked_for_half_of_one(shared_card: RayResourcePool) -> None:
    with RayWorkerGroup(shared_card, RayClassWithInitArgs(Card)) as group:
        first, second = group.which()
        assert first == second
        assert all(first[:8] in row.device for row in group.describe().rows)


def test_ranks_that_were_to_have_a_card_each_may_not_share_one(gpus: int) -> None:
    with RayResourcePool([1]) as pool:
        info = RayWorkerGroup(pool, RayClassWithInitArgs(Card))._hosts.infos[0].identity
        assert info is not None
        from single_controller.ray.devices import check_devices

        with pytest.raises(ResourceError, match=rf"{info.uuid}: ranks \[0, 1\].*gpus_per_process"):
            check_devices([info, info], 1)
        check_devices([info, info], 0.5)


def test_the_colocated_actor_and_critic_on_cuda(shared_card: RayResourcePool) -> None:
    critic = RayClassWithInitArgs(Critic, config={"b": 10})
    data = DataProto.from_dict({"a": torch.zeros(10)})
    with colocate(shared_card, actor=Actor, critic=critic) as group:
        assert group.actor.add(data).batch["a"].tolist() == [0.0] * 5 + [1.0] * 5
        assert group.critic.sub(data).batch["a"].tolist() == [-10.0] * 10


def test_after_close_the_cards_memory_is_back(gpus: int) -> None:
    with (
        memory_back(),
        RayResourcePool([1]) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Card)) as group,
    ):
        group.fill(4)


def test_roles_that_do_not_fit_together_take_turns(gpus: int) -> None:
    with RayResourcePool([1]) as pool, colocate(pool, first=Large, second=Large) as group:
        for _ in range(2):
            assert group.first.place() == [("cuda", True)]
            assert group.second.place() == [("cuda", True)]
