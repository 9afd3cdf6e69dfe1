"""Faults that veRL 0.9 has and this library must not get, where no other test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from protocol import DataProto, DataProtoFuture
from single_controller import DispatchError
from single_controller.base import PerRank, Worker, decorator
from single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
    get_random_string,
    parallel_put,
)


class Probe(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info("dp", dp_rank=self.rank, is_collect=True)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def same(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def same_later(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("dp"))
    def meshed(self, data: DataProto) -> DataProto:
        data.batch["rank"] = torch.full((len(data),), self.rank)
        return data

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def lead(self, x: int) -> tuple[int, int]:
        return self.rank, x

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def class_name(self) -> str:
        return type(self).__name__

    def plain(self, *args: Any) -> tuple[Any, ...]:
        return args


class Rollout(Probe):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def generate(self) -> str:
        return "generated"


@pytest.fixture(scope="module")
def hosts(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    roles = {"actor": Probe, "actor_rollout": Rollout}
    specs = {role: RayClassWithInitArgs(ray.remote(cls)) for role, cls in roles.items()}
    started = create_colocated_worker_cls(specs)
    with RayWorkerGroup(pool, started, name_prefix="faults_") as group:
        yield group


@pytest.fixture(scope="module")
def group(hosts: RayWorkerGroup) -> RayWorkerGroup:
    return hosts.spawn({"actor"})["actor"]


def batch(rows: int, padded: bool = True) -> DataProto:
    strings = [f"s{i}" for i in range(rows)]
    tensors = {"a": torch.arange(rows)}
    return DataProto.from_dict(tensors, {"s": strings}, {"k": 1}, auto_padding=padded)


def column(data: Any, key: str = "a") -> list[int]:
    return data.batch[key].tolist()  # type: ignore[no-any-return]


def test_padding_neither_grows_the_callers_batch_nor_stays_with_results(
    group: RayWorkerGroup,
) -> None:
    data = batch(3)
    before = dict(data.meta_info)
    assert column(group.same(data)) == [0, 1, 2]
    assert (len(data), column(data), data.meta_info) == (3, [0, 1, 2], before)
    assert list(data.non_tensor_batch["s"]) == ["s0", "s1", "s2"]
    future = group.same_later(data)
    assert isinstance(future, DataProtoFuture)
    assert (len(future), column(future.get())) == (3, [0, 1, 2])
    assert column(group.same(group.same_later(data))) == [0, 1, 2]


def test_a_mesh_call_takes_keywords_removes_its_padding_and_gives_every_rank_a_shard(
    group: RayWorkerGroup,
) -> None:
    for rows in (1, 3, 4, 5):
        done = group.meshed(data=batch(rows))
        assert column(done) == list(range(rows))
        first = -(-rows // 2)
        assert column(done, "rank") == [0] * first + [1] * (rows - first)
    with pytest.raises(DispatchError, match="only support equal chunk"):
        group.meshed(batch(3, padded=False))


def test_lists_that_happen_to_have_one_element_per_rank_are_not_scattered(
    group: RayWorkerGroup,
) -> None:
    assert group.execute_all_sync("plain", [1, 2]) == [([1, 2],)] * 2
    assert group.execute_all_sync("plain", PerRank([1, 2])) == [(1,), (2,)]


def test_every_process_of_two_and_four_per_node_has_a_bundle(cluster: None) -> None:
    with RayResourcePool([2, 4], cpus_per_process=0.5) as pool:
        assert pool.world_size == 6
        assert len(set(pool.bundles())) == 6
        assert pool.local_rank_list() == [0, 1, 0, 1, 2, 3]


def test_a_role_does_not_capture_those_whose_names_begin_with_its_own(
    hosts: RayWorkerGroup, group: RayWorkerGroup
) -> None:
    rollout = hosts.spawn({"actor_rollout"})["actor_rollout"]
    assert group.class_name() == ["Probe"] * 2
    assert rollout.class_name() == ["Rollout"] * 2
    assert rollout.generate() == ["generated"] * 2
    with pytest.raises(AttributeError, match="actor has no method 'generate'"):
        group.generate  # noqa: B018
    with pytest.raises(AttributeError, match="actor has no method 'rollout_generate'"):
        group.rollout_generate  # noqa: B018


def test_chunks_have_their_own_meta_info() -> None:
    first, second = batch(4).chunk(2)
    first.meta_info["k"] = 2
    assert second.meta_info["k"] == 1


def test_starting_a_group_gives_its_spec_neither_name_nor_lifetime(hosts: RayWorkerGroup) -> None:
    assert [name.startswith("faults_") for name in hosts.worker_names] == [True, True]
    spec = hosts.ray_cls_with_init
    assert spec is not None
    assert not {"name", "lifetime", "scheduling_strategy"} & set(spec.actor_spec().options)
    single = RayClassWithInitArgs(Probe)
    single.set_additional_resource({"high_bandwidth": 1})  # one entry counts, too
    assert single.actor_spec().options["resources"] == {"high_bandwidth": 1}


def test_small_helpers_and_rank_zero_do_what_verls_were_meant_to(group: RayWorkerGroup) -> None:
    assert group.lead(5) == (0, 5)
    assert parallel_put([]) == []
    made = {get_random_string(8) for _ in range(20)}
    assert len(made) == 20
    assert all(len(text) == 8 and text.isalnum() for text in made)
    for check in (decorator._check_dispatch_mode, decorator._check_execute_mode):
        with pytest.raises(AssertionError, match="must be"):
            check("neither")
