"""How the meta_info of several batches becomes one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from protocol import meta
from protocol.checks import short
from protocol.errors import BatchError, BatchTypeError, ConflictError


def test_metrics_become_a_dict_of_lists() -> None:
    shards: list[dict[str, Any]] = [
        {"metrics": {"loss": 1.0}},
        {"metrics": [{"loss": 2.0, "lr": 0.1}, {"loss": 3.0}]},
        {"metrics": None},
        {},
    ]
    assert meta.merge(shards) == {"metrics": {"loss": [1.0, 2.0, 3.0], "lr": [0.1]}}
    assert meta.merge([{"metrics": None}, {}]) == {}
    assert meta.merge([{"metrics": {"loss": [1, 2]}}]) == {"metrics": {"loss": [[1, 2]]}}


def test_metrics_of_another_kind_are_refused_by_shard() -> None:
    with pytest.raises(BatchTypeError, match="shard 1 has 3"):
        meta.merge([{}, {"metrics": 3}])


def test_keys_of_any_shard_are_kept_and_equal_ones_agree() -> None:
    nan = {"a": [float("nan"), np.arange(2), torch.ones(2)]}
    twin = {"a": [float("nan"), np.arange(2), torch.ones(2)]}
    assert meta.merge([{"x": 1}, {"y": 2}, {"x": 1}]) == {"x": 1, "y": 2}
    assert meta.merge([{"k": nan}, {"k": twin}])["k"] is nan


def test_a_conflict_names_key_values_and_all_shards() -> None:
    shards = [{"k": 1}, {"k": 2}, {}, {"k": 1}, {"k": 2}]
    with pytest.raises(ConflictError) as caught:
        meta.merge(shards)
    message = str(caught.value)
    assert message.startswith("Conflicting values for meta_info key 'k': ")
    assert "1 in shard 0, shard 3; 2 in shard 1, shard 4" in message
    assert "'metrics'" in message
    with pytest.raises(ConflictError, match="2 in rank 5"):
        meta.merge([{"k": 1}, {"k": 2}], names=["rank 4", "rank 5"])


def test_merging_changes_nothing_and_shares_no_dict() -> None:
    shards: list[dict[str, Any]] = [{"x": 1, "metrics": {"l": 1}}, {"metrics": {"l": 2}}]
    merged = meta.merge(shards)
    merged["x"], merged["metrics"]["l"] = 9, []
    assert shards == [{"x": 1, "metrics": {"l": 1}}, {"metrics": {"l": 2}}]
    assert meta.merge([]) == {}


def test_union_keeps_all_keys_and_refuses_differences() -> None:
    a, b = {"x": 1, "n": float("nan")}, {"y": 2, "n": float("nan")}
    assert meta.union(a, b).keys() == {"x", "y", "n"}
    assert a.keys() == {"x", "n"}
    with pytest.raises(
        ConflictError, match="'x' in the two batches are not the same object: 1 and"
    ):
        meta.union(a, {"x": 2})
    assert issubclass(ConflictError, (BatchError, AssertionError, ValueError))


def test_a_conflict_of_objects_says_that_their_class_has_no_eq() -> None:
    class Tag:
        def __init__(self, name: str) -> None:
            self.name = name

    assert meta.merge([{"k": [Tag("a")]}, {"k": [Tag("a")]}]).keys() == {"k"}
    assert meta.union({"k": Tag("a")}, {"k": Tag("a")}).keys() == {"k"}
    with pytest.raises(ConflictError, match="Tag has no __eq__"):
        meta.merge([{"k": [Tag("a")]}, {"k": [Tag("b")]}])
    with pytest.raises(ConflictError, match="Tag has no __eq__"):
        meta.union({"k": Tag("a")}, {"k": Tag("b")})
    with pytest.raises(ConflictError) as caught:
        meta.merge([{"k": [1, "a", None]}, {"k": [2, "a", None]}])
    assert "__eq__" not in str(caught.value)


def test_short_fits_on_one_line() -> None:
    assert short(torch.zeros(2, 2)) == "tensor([[0., 0.], [0., 0.]])"
    assert len(short("x" * 1000)) == 80
