"""Workers in a mesh: which rank gets which rows, and who answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from protocol import DataProto, DataProtoFuture
from protocol import tensordict_utils as tu
from single_controller import CollectiveError, WorkerError
from tests.conformance.conftest import Backend


@pytest.fixture
def group(four: dict[str, Any]) -> Any:
    four["Member"].take_seen()
    return four["Member"]


def batch(rows: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"row": torch.arange(float(rows))}, **options)


def table(rows: int) -> TensorDict:
    jagged = tu.nested_tensor_from_tensor_list([torch.arange(i + 1) for i in range(rows)])
    return tu.get_tensordict(
        {"jagged": jagged, "text": [f"t{i}" for i in range(rows)]}, {"scale": 2}
    )


def by(data: DataProto) -> list[int]:
    return data.batch["by"].tolist()


def test_each_dp_rank_gets_its_rows_and_the_last_stages_first_tensor_ranks_answer(
    group: Any,
) -> None:
    done = group.stamp(batch(6))
    assert group.take_seen() == [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]] * 2
    assert done.meta_info["metrics"] == {"rank": [2, 3]}
    for found in (done, group.stamp(group.stamp_later(batch(6)))):  # also from another mesh
        assert by(found) == [2, 2, 2, 3, 3, 3]
        assert found.batch["row"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


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
    assert by(group.stamp(padded)) == [2, 2, 3]
    assert by(group.stamp(data=padded)) == [2, 2, 3]
    assert [[len(rows) for rows in calls] for calls in group.take_seen()] == [[2, 2]] * 4
    assert len(padded) == 3


def test_the_driver_knows_where_every_rank_stands_in_every_mesh(group: Any) -> None:
    infos = group.execute_all_sync("get_dispatch_collect")
    dp_ranks = {m: [info["dispatch_dp_rank"][m] for info in infos] for m in ("stages", "square")}
    assert dp_ranks == {"stages": [0, 1, 0, 1], "square": [0, 0, 1, 1]}
    collects = {m: [info["collect_dp_rank"][m] for info in infos] for m in ("stages", "square")}
    assert collects == {"stages": [False, False, True, True], "square": [True, False, True, False]}


def test_a_tensordict_with_jagged_rows_goes_there_and_back(group: Any) -> None:
    done = group.double(table(4))
    assert type(done) is TensorDict
    expected = [[2 * j for j in range(i + 1)] for i in range(4)]
    assert [row.tolist() for row in done["jagged"].unbind()] == expected
    future = group.double_later(table(4))
    assert isinstance(future, DataProtoFuture)
    assert len(future) == 4
    for made in (done, future.get(timeout=60)):
        assert tu.get(made, "by") == ["t0@0", "t1@0", "t2@2", "t3@2"]


def test_uneven_rows_are_split_as_evenly_as_they_can_be(group: Any) -> None:
    for rows, expected in ((5, [0, 0, 0, 2, 2]), (1, [0]), (0, [])):
        assert by(group.stamp_later(batch(rows)).get(timeout=60)) == expected
    sizes = [[len(rows) for rows in calls] for calls in group.take_seen()]
    assert sizes == [[3, 1, 0]] * 2 + [[2, 0, 0]] * 2
    done = group.size(table(5))
    assert done["rows"].tolist() == [3, 3, 3, 2, 2]
    assert tu.get(done, "text") == ["t0", "t1", "t2", "t3", "t4"]
