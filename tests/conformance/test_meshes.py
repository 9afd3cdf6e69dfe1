"""Workers in a mesh: which rank gets which rows, and who answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from protocol import DataProto, DataProtoFuture
from protocol import tensordict_utils as tu
from single_controller import CollectiveError, WorkerError
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from tests.conformance.conftest import Backend

CUBE = make_nd_compute_dataproto_dispatch_fn("cube")
SQUARE = make_nd_compute_dataproto_dispatch_fn("square")


class Member(Worker):
    """A rank of two meshes over the same processes: pp 2 × dp 2 × tp 2, and dp 4 × tp 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        self.square = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        self.register_mesh(self.cube, mesh_name="cube")
        self.register_mesh(self.square, mesh_name="square")
        self.seen: list[Any] = []

    @register(dispatch_mode=CUBE)
    def stamp(self, data: DataProto) -> DataProto:
        """Who handled each row; what a rank that is not to answer says must not come back."""
        self.seen.append(data.batch["row"].tolist())
        data.batch["by"] = torch.full((len(data),), self.rank)
        data.meta_info["metrics"] = {"rank": self.rank}
        return data

    @register(dispatch_mode=SQUARE, uneven=True, blocking=False)
    def stamp_later(self, data: DataProto) -> DataProto:
        return self.stamp(data)

    @register(dispatch_mode=CUBE)
    def sum_over_tp(self, data: DataProto) -> DataProto:
        """What each tp peer contributes is its own; only their sum is right."""
        share = data.batch["row"] * (1.0 if self.cube.get_local_rank("tp") == 0 else 10.0)
        dist.all_reduce(share, group=self.cube.get_group("tp"))
        return DataProto.from_dict({"sum": share})

    @register(dispatch_mode=SQUARE)
    def double(self, data: TensorDict) -> TensorDict:
        jagged = tu.nested_tensor_from_tensor_list([2 * row for row in data["jagged"].unbind()])
        by = [f"{text}@{self.rank}" for text in tu.get(data, "text")]
        return tu.get_tensordict({"jagged": jagged, "by": by})

    @register(dispatch_mode=SQUARE, blocking=False)
    def double_later(self, data: TensorDict) -> TensorDict:
        return self.double(data)

    @register(dispatch_mode=SQUARE, uneven=True)
    def size(self, data: TensorDict) -> TensorDict:
        rows = len(data)
        return tu.get_tensordict({"rows": torch.full((rows,), rows), "text": tu.get(data, "text")})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_seen(self) -> list[Any]:
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture(scope="module")
def started(backend: Backend) -> Iterator[Any]:
    """rank = 4 pp + 2 dp + tp in the cube, 2 dp + tp in the square."""
    with backend.group(backend.spec(Member), ranks=8) as eight:
        yield eight


@pytest.fixture
def group(started: Any) -> Any:
    started.take_seen()
    return started


def batch(rows: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"row": torch.arange(float(rows))}, **options)


def table(rows: int) -> TensorDict:
    jagged = tu.nested_tensor_from_tensor_list([torch.arange(i + 1) for i in range(rows)])
    return tu.get_tensordict(
        {"jagged": jagged, "text": [f"t{i}" for i in range(rows)]}, {"scale": 2}
    )


def by(data: DataProto) -> list[int]:
    return data.batch["by"].tolist()


def rows_of(data: DataProto) -> list[float]:
    return data.batch["row"].tolist()


def test_each_dp_rank_gets_its_rows_and_its_tp_and_pp_peers_the_same(
    group: Any,
) -> None:
    group.stamp(batch(6))
    low, high = [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]
    assert group.take_seen() == [[low], [low], [high], [high]] * 2


def test_only_the_last_stages_first_tensor_ranks_answer(group: Any) -> None:
    done = group.stamp(batch(6))
    assert by(done) == [4, 4, 4, 6, 6, 6]
    assert done.meta_info["metrics"] == {"rank": [4, 6]}
    assert rows_of(done) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_tp_peers_can_reduce_over_their_shared_rows(backend: Backend, group: Any) -> None:
    if backend.name == "inline":
        with pytest.raises(CollectiveError, match="allreduce needs 2 ranks at once") as caught:
            group.sum_over_tp(data=batch(4))
        assert isinstance(caught.value, WorkerError)
        return
    done = group.sum_over_tp(data=batch(4))
    assert done.batch["sum"].tolist() == [0.0, 11.0, 22.0, 33.0]


def test_a_padded_batch_comes_back_without_its_padding(group: Any) -> None:
    padded = batch(3, auto_padding=True)
    assert by(group.stamp(padded)) == [4, 4, 6]
    assert by(group.stamp(data=padded)) == [4, 4, 6]
    assert [[len(rows) for rows in calls] for calls in group.take_seen()] == [[2, 2]] * 8
    assert len(padded) == 3


def test_the_driver_knows_where_every_rank_stands_in_every_mesh(group: Any) -> None:
    infos = group.execute_all_sync("get_dispatch_collect")
    dp_ranks = {m: [info["dispatch_dp_rank"][m] for info in infos] for m in ("cube", "square")}
    assert dp_ranks == {"cube": [0, 0, 1, 1] * 2, "square": [0, 0, 1, 1, 2, 2, 3, 3]}
    collects = {m: [info["collect_dp_rank"][m] for info in infos] for m in ("cube", "square")}
    assert [rank for rank, answers in enumerate(collects["cube"]) if answers] == [4, 6]
    assert collects["square"] == [True, False] * 4


def test_a_tensordict_with_jagged_rows_goes_there_and_back(group: Any) -> None:
    done = group.double(table(4))
    assert type(done) is TensorDict
    expected = [[2 * j for j in range(i + 1)] for i in range(4)]
    assert [row.tolist() for row in done["jagged"].unbind()] == expected
    assert tu.get(done, "by") == ["t0@0", "t1@2", "t2@4", "t3@6"]


def test_without_blocking_the_result_is_a_future_of_the_answering_ranks_rows(
    group: Any,
) -> None:
    future = group.double_later(table(4))
    assert isinstance(future, DataProtoFuture)
    assert len(future) == 4
    assert tu.get(future.get(timeout=60), "by") == ["t0@0", "t1@2", "t2@4", "t3@6"]


def test_uneven_rows_are_split_as_evenly_as_they_can_be(group: Any) -> None:
    for rows, expected in ((6, [0, 0, 2, 2, 4, 6]), (1, [0]), (0, [])):
        assert by(group.stamp_later(batch(rows)).get(timeout=60)) == expected
    sizes = [[len(rows) for rows in calls] for calls in group.take_seen()]
    assert sizes == [[2, 1, 0]] * 2 + [[2, 0, 0]] * 2 + [[1, 0, 0]] * 4


def test_uneven_rows_of_a_tensordict_come_back_in_order(group: Any) -> None:
    done = group.size(table(5))
    assert done["rows"].tolist() == [2, 2, 1, 1, 1]
    assert tu.get(done, "text") == ["t0", "t1", "t2", "t3", "t4"]


def test_a_future_goes_from_one_mesh_into_another(group: Any) -> None:
    done = group.stamp(group.stamp_later(batch(6)))
    assert (rows_of(done), by(done)) == ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [4, 4, 4, 6, 6, 6])


def test_rows_that_do_not_divide_are_refused_before_any_rank_sees_them(
    group: Any,
) -> None:
    with pytest.raises(ValueError, match="only support equal chunk"):
        group.stamp(batch(3))
    assert group.take_seen() == [[]] * 8
