"""What veRL's trainers read of groups and send through them besides batches with rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import ray
import torch
from tensordict import TensorDict

from protocol import DataProto
from protocol import tensordict_utils as tu
from single_controller import DispatchError
from tests.conformance.conftest import Backend


@dataclass
class Keys:
    """Names of rows that are elsewhere: neither a DataProto nor a TensorDict."""

    names: list[str]

    def chunk(self, parts: int) -> list[Keys]:
        size = len(self.names) // parts
        return [Keys(self.names[i * size : (i + 1) * size]) for i in range(parts)]

    @classmethod
    def concat(cls, parts: list[Keys]) -> Keys:
        return cls([name for part in parts for name in part.names])


class Stubborn(Keys):
    def chunk(self, parts: int) -> list[Keys]:
        return [self]


@pytest.fixture
def group(in_turn: dict[str, Any]) -> Any:
    return in_turn["Engine"]


def batch(rows: int = 4, **options: Any) -> DataProto:
    return DataProto.from_dict({"x": torch.arange(float(rows))}, **options)


def metrics(data: TensorDict) -> Any:
    assert data.batch_size == torch.Size([])
    return tu.get_non_tensor_data(data, "metrics", None)


def test_a_group_says_who_is_where_in_a_mesh_as_verls_trainers_ask(group: Any) -> None:
    role = "train"
    if role not in group._dispatch_info:
        group._dispatch_info[role] = group._query_dispatch_info(role)
    assert group._dispatch_info == {"train": [0, 1]}
    assert group._query_collect_info(role) == [True, True]
    group.update(batch())
    assert group._collect_info == {"train": [True, True]}
    group._dispatch_info[role] = [1, 0]
    assert metrics(group.update(batch()))["rank"] == 1  # the first shard is rank 1's now
    group._dispatch_info[role] = [0, 1]
    assert [place[:2] for place in group.places()] == [(0, 2), (1, 2)]
    assert all(place[3] == 2 for place in group.places())


def test_a_tensordict_without_rows_goes_whole_and_of_results_the_first_counts(
    backend: Backend, group: Any
) -> None:
    settings = tu.get_tensordict({}, {"lr": 0.5})
    expected = {"rank": 0, "rows": 2, "lr": 0.5}
    assert metrics(group.update(batch(), settings)) == expected
    assert metrics(group.update(batch(), settings=settings)) == expected
    assert metrics(group.update(batch(3, auto_padding=True), settings)) == expected
    assert tu.get_non_tensor_data(group.read(settings), "lr", None) == 0.5
    future = group.update_later(batch(), settings)
    assert metrics(future.get(timeout=60)) == expected
    assert metrics(group.read(future)) == expected
    if backend.name == "ray":
        assert len(ray.get(future.futures, timeout=60)) == 2
        assert len(future.select(["x"]).futures) == 2


def test_whatever_can_be_chunked_and_concatenated_goes_by_parts(group: Any) -> None:
    keys = Keys(["a", "b", "c", "d"])
    assert group.load(keys) == Keys(["a@0", "b@0", "c@1", "d@1"])
    assert group.load_each(keys) == [Keys(["a", "b"]), Keys(["c", "d"])]
    with pytest.raises(DispatchError, match=r"chunk\(2\) of Stubborn gave 1 parts"):
        group.load(Stubborn(["a"]))
    with pytest.raises(DispatchError, match=r"must be a DataProto.*or have chunk"):
        group.load(3)
