"""Every mode with `blocking=False`: the call returns references, or a future of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from protocol import DataProto, DataProtoFuture
from single_controller import DispatchError
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.conformance.probe import batch, values

MESH = make_nd_compute_dataproto_dispatch_fn("dp")


def spread(worker_group: Any, x: int) -> Any:
    return ([x + rank for rank in range(worker_group.world_size)],), {}


def last(worker_group: Any, output: list[Any]) -> Any:
    return output[-1]


def stamp(worker: Worker, data: DataProto) -> DataProto:
    data.batch["a"] += 10 * worker.rank
    return data


class Later(Worker):
    def __init__(self) -> None:
        self._register_dispatch_collect_info("dp", dp_rank=self.rank, is_collect=True)

    @register(dispatch_mode=Dispatch.RANK_ZERO, blocking=False)
    def rank_zero(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, execute_mode=Execute.RANK_ZERO, blocking=False)
    def executed_on_rank_zero(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def one_to_all(self, x: Any) -> Any:
        return self.rank, x

    @register(blocking=False)
    def all_to_all(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def dp_compute(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode={"dispatch_fn": spread, "collect_fn": last}, blocking=False)
    def custom(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, blocking=False)
    def metric(self, data: DataProto) -> list[float]:
        return values(data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, blocking=False, uneven=True)
    def metric_uneven(self, data: DataProto) -> list[float]:
        return values(data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def proto(self, data: DataProto) -> DataProto:
        return stamp(self, data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False, uneven=True)
    def proto_uneven(self, data: DataProto) -> DataProto:
        return stamp(self, data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO_WITH_FUNC, blocking=False)
    def func(self, func: Any, data: DataProto) -> DataProto:
        return func(self, data)  # type: ignore[no-any-return]

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO_WITH_FUNC, blocking=False, uneven=True)
    def func_uneven(self, func: Any, data: DataProto) -> DataProto:
        return func(self, data)  # type: ignore[no-any-return]

    @register(dispatch_mode=MESH, blocking=False)
    def mesh(self, data: DataProto) -> DataProto:
        return stamp(self, data)

    @register(dispatch_mode=MESH, blocking=False, uneven=True)
    def mesh_uneven(self, data: DataProto) -> DataProto:
        return stamp(self, data)


@pytest.fixture(scope="module")
def later(cluster: None) -> Iterator[RayWorkerGroup]:
    with (
        RayResourcePool([2], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Later)) as group,
    ):
        yield group


def test_modes_that_join_nothing_return_references_in_the_shape_of_the_result(
    later: RayWorkerGroup,
) -> None:
    one, both = [later.rank_zero(1), later.executed_on_rank_zero([1, 2])], later.one_to_all(3)
    assert ray.get(one) == [(0, 1), (0, [1, 2])]
    assert ray.get(both) == [(0, 3), (1, 3)]
    assert ray.get(later.all_to_all([4, 5])) == [(0, 4), (1, 5)]
    assert ray.get(later.dp_compute([6, 7])) == [(0, 6), (1, 7)]
    assert ray.get(later.custom(8)) == (1, 9)


def test_metrics_are_references_of_every_rank_whatever_the_rows(later: RayWorkerGroup) -> None:
    assert ray.get(later.metric(batch(2))) == [[0], [1]]
    assert ray.get(later.metric(batch(3, auto_padding=True))) == [[0, 1], [2, 2]]
    assert ray.get(later.metric(batch(1, auto_padding=True))) == [[0], [0]]
    assert ray.get(later.metric_uneven(batch(3))) == [[0, 1], [2]]
    assert ray.get(later.metric_uneven(batch(1))) == [[0], []]


@pytest.mark.parametrize("mode", ["proto", "func", "mesh"])
def test_modes_that_join_batches_return_a_future_of_the_callers_rows(
    later: RayWorkerGroup, mode: str
) -> None:
    arguments = [stamp] if mode == "func" else []

    def call(name: str, rows: int, **options: Any) -> DataProtoFuture:
        future = getattr(later, name)(*arguments, batch(rows, **options))
        assert isinstance(future, DataProtoFuture)
        return future

    assert values(call(mode, 4).get(timeout=60)) == [0, 1, 12, 13]
    for rows, expected in ((0, []), (1, [0]), (3, [0, 1, 12]), (5, [0, 1, 2, 13, 14])):
        for future in (call(f"{mode}_uneven", rows), call(mode, rows, auto_padding=bool(rows))):
            assert len(future) == rows
            assert values(future.get(timeout=60)) == expected
    with pytest.raises(DispatchError, match=r"only support equal chunk.* 3 and chunk 2"):
        call(mode, 3)
