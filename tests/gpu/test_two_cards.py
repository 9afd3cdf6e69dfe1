"""Ranks with a card each: collectives over NCCL, meshes, batches from card to card, a rank that
dies inside a collective."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from examples.colocated_actor_critic import make_workers
from examples.two_groups import ModelWorker
from examples.two_models import MLP, Attention, check_different, make_data
from protocol import DataProto
from single_controller import ResourceError, Worker, WorkerDiedError
from single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
    split_resource_pool,
)
from tests.gpu.cards import ROWS, Consumer, Producer, check, rows

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
MESH = make_nd_compute_dataproto_dispatch_fn("mesh")


class Collective(Worker):
    def __init__(self) -> None:
        super().__init__()
        torch.cuda.set_device(self.device)
        dist.init_process_group("nccl", device_id=self.device)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def total(self) -> float:
        """The sum over ranks of rank + 1."""
        x = torch.full((1,), float(self.rank + 1), device=self.device)
        dist.all_reduce(x)
        return x.item()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def die_inside(self) -> None:
        """Rank 1 dies while rank 0 waits for it in a collective."""
        self.total()
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.total()


class Meshed(Collective):
    def __init__(self, dp: int, tp: int) -> None:
        super().__init__()
        self.mesh = init_device_mesh("cuda", (dp, tp), mesh_dim_names=("dp", "tp"))
        self.register_mesh(self.mesh, mesh_name="mesh")
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 4, generator=generator).to(self.device)
        self.weight = distribute_tensor(weight, self.mesh["tp"], [Shard(0)])

    @register(dispatch_mode=MESH)
    def linear(self, data: DataProto) -> DataProto:
        """x · weightᵀ, with the weight's rows cut over tp."""
        x = data.batch["x"].to(self.device)
        whole = DTensor.from_local(x, self.mesh["tp"])
        y = torch.nn.functional.linear(whole, self.weight).full_tensor()
        return DataProto.from_dict({"y": y, "by": torch.full((len(x),), self.rank)})


@pytest.fixture(scope="module")
def pair(two_cards: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(two_cards, RayClassWithInitArgs(Collective)) as group:
        yield group


def test_nccl_meets_without_arguments(pair: RayWorkerGroup) -> None:
    assert pair.total() == [3.0, 3.0]
    places = {row.device for row in pair.describe().rows}
    assert len(places) == 2


def test_the_colocated_actor_and_critic_with_a_card_per_rank(two_cards: RayResourcePool) -> None:
    actor, critic = make_workers(uneven=False)
    config = RayClassWithInitArgs(critic, config={"b": 10})
    data = DataProto.from_dict({"a": torch.zeros(10)})
    with colocate(two_cards, actor=actor, critic=config) as group:
        print(group.describe())
        added, subtracted = group.actor.add(data), group.critic.sub(data)
    assert added.batch["a"].tolist() == [0.0] * 5 + [1.0] * 5
    assert subtracted.batch["a"].tolist() == [-10.0] * 10


def test_two_groups_at_once_each_on_a_card(two_cards: RayResourcePool) -> None:
    halves = split_resource_pool(two_cards, 1)
    groups = [
        RayWorkerGroup(half, RayClassWithInitArgs(ModelWorker, model))
        for half, model in zip(halves, (Attention, MLP), strict=True)
    ]
    pending = [
        group.train_step.submit([data]) for group, data in zip(groups, make_data(), strict=True)
    ]
    gradients = [future.result()[0][1] for future in pending]
    check_different(*gradients)
    for group in groups:
        group.close()


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2)])
def test_meshes_of_dtensors(two_cards: RayResourcePool, dp: int, tp: int) -> None:
    x = torch.arange(24.0).reshape(6, 4)
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with RayWorkerGroup(two_cards, RayClassWithInitArgs(Meshed, dp, tp)) as group:
        out = group.linear(DataProto.from_dict({"x": x})).batch
    assert torch.allclose(out["y"], x @ weight.T, atol=1e-4)
    assert out["by"].tolist() == ([0] * 3 + [1] * 3 if dp == 2 else [0] * 6)


@pytest.mark.parametrize("cross", [False, True])
def test_batches_go_from_card_to_card(two_cards: RayResourcePool, cross: bool) -> None:
    first, second = split_resource_pool(two_cards, 1)
    with (
        RayWorkerGroup(first, RayClassWithInitArgs(Producer)) as producer,
        RayWorkerGroup(two_cards if cross else second, RayClassWithInitArgs(Consumer)) as reader,
    ):
        found = reader.look(producer.by_device(rows()))
        check(found, "cuda")
        assert len({one["own"] for one in found}) == len(found)
        assert producer.stats()["by_device"].bytes_between < 20_000
        big = producer.big(rows(ROWS))
        assert sum(value for value, _ in reader.sum(big)) == sum(range(ROWS))
        there = reader.sum_there(big)
        assert sum(value for value, _ in there) == sum(range(ROWS))
        assert all(size < 64 << 20 for _, size in there)
        assert producer.stats()["big"].bytes_between < 20_000


def test_a_batch_arrives_on_a_ranks_own_card_where_it_sees_all(two_cards: RayResourcePool) -> None:
    env = {NOSET: "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    with (
        RayWorkerGroup(two_cards, RayClassWithInitArgs(Producer), worker_env=env) as producer,
        RayWorkerGroup(two_cards, RayClassWithInitArgs(Consumer), worker_env=env) as reader,
    ):
        found = reader.look(producer.by_device(rows()))
        check(found, "cuda")
        assert len({one["own"] for one in found}) == 2


def test_ranks_that_were_to_have_a_card_each_may_not_share_one(two_cards: RayResourcePool) -> None:
    env = {NOSET: "1", "CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(ResourceError, match=r"[0-9a-f-]{36}: ranks \[0, 1\].*gpus_per_process"):
        RayWorkerGroup(two_cards, RayClassWithInitArgs(Consumer), worker_env=env)


def test_a_rank_that_dies_inside_a_collective_is_named_and_the_group_restarts(
    two_cards: RayResourcePool,
) -> None:
    with RayWorkerGroup(two_cards, RayClassWithInitArgs(Collective)) as group:
        assert group.total() == [3.0, 3.0]
        began = time.monotonic()
        with pytest.raises(WorkerDiedError, match=r"rank 1") as caught:
            group.die_inside()
        print(f"\nseconds until the driver's error: {time.monotonic() - began:.2f}")
        print(str(caught.value)[:1500])
        began = time.monotonic()
        group.restart()
        assert group.total() == [3.0, 3.0]
        print(f"seconds until the restarted group's first result: {time.monotonic() - began:.2f}")
