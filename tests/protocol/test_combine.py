"""How the meta_info of several batches becomes one, and which values are equal."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protocol import columns
from protocol.combine import equal, merge_meta, union, union_numpy_dict
from protocol.errors import BatchTypeError, ConflictError


def test_metrics_become_a_dict_of_lists_and_what_was_there_stays_as_it_is() -> None:
    shards: list[dict[str, Any]] = [
        {"x": 1, "metrics": {"loss": 1.0}},
        {"metrics": [{"loss": 2.0, "lr": 0.1}, {"loss": 3.0}]},
        {"metrics": None},
        {},
    ]
    merged = merge_meta(shards)
    assert merged == {"x": 1, "metrics": {"loss": [1.0, 2.0, 3.0], "lr": [0.1]}}
    merged["x"], merged["metrics"]["loss"] = 9, []
    assert shards[0] == {"x": 1, "metrics": {"loss": 1.0}}
    assert merge_meta([{"metrics": None}, {}]) == merge_meta([]) == {}
    assert merge_meta([{"metrics": {"loss": [1, 2]}}]) == {"metrics": {"loss": [[1, 2]]}}
    with pytest.raises(BatchTypeError, match="shard 1 has 3"):
        merge_meta([{}, {"metrics": 3}])


def test_keys_of_any_shard_are_kept_and_equal_ones_agree() -> None:
    nan = {"a": [float("nan"), np.arange(2), torch.ones(2)]}
    twin = {"a": [float("nan"), np.arange(2), torch.ones(2)]}
    assert merge_meta([{"x": 1}, {"y": 2}, {"x": 1}]) == {"x": 1, "y": 2}
    assert merge_meta([{"k": nan}, {"k": twin}])["k"] is nan


def test_a_conflict_names_key_values_and_shards() -> None:
    message = "^Conflicting values for meta_info key 'k': 1 in shard 1, 2 in shard 3. .*'metrics'"
    with pytest.raises(ConflictError, match=message):
        merge_meta([{}, {"k": 1}, {"k": 1}, {"k": 2}])


def test_a_union_keeps_all_keys_and_refuses_differences() -> None:
    a, b = {"x": 1, "n": float("nan")}, {"y": 2, "n": float("nan")}
    assert union(a, b).keys() == {"x", "y", "n"}
    assert a.keys() == {"x", "n"}
    same = "in tensor_dict1 and tensor_dict2 are not the same object."
    with pytest.raises(ConflictError, match=f"^`x` {same} 1 here, 2 there"):
        union(a, {"x": 2})
    nan = {"x": np.array([None, float("nan")], dtype=object)}
    assert union_numpy_dict(nan, {"x": nan["x"].copy(), "y": np.ones(2)}) is nan
    assert nan.keys() == {"x", "y"}
    with pytest.raises(ConflictError, match=rf"^`y` {same} at 0: .*1\.0"):
        union_numpy_dict(nan, {"z": np.ones(2), "y": np.arange(2.0)})
    assert nan.keys() == {"x", "y"}


NAN = float("nan")
LOOP: list[Any] = [1]
LOOP.append(LOOP)
LOOP2: list[Any] = [1]
LOOP2.append(LOOP2)
SPARSE = torch.eye(2).to_sparse()
JAGGED = torch.nested.nested_tensor_from_jagged(torch.arange(4.0), torch.tensor([0, 1, 4]))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (NAN, float("nan"), True),
        ({"x": [NAN, (1, None)]}, {"x": [float("nan"), (1, None)]}, True),
        (np.array([NAN, 1.0]), np.array([float("nan"), 1.0]), True),
        (torch.tensor([NAN, 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([complex(NAN, 1)]), torch.tensor([complex(NAN, 1)]), True),
        (columns.as_object_array([None, NAN, np.arange(2)]),) * 2 + (True,),
        (LOOP, LOOP2, True),
        ([1, 2], (1, 2), False),
        (1, "1", False),
        (torch.ones(2), torch.ones(2).int(), False),
        (torch.ones(2), np.ones(2), False),
        (torch.ones(2), torch.ones(3), False),
        (np.array(["a"]), np.array(["a"], dtype="<U9"), True),
        (np.arange(2), np.arange(2.0), False),
        ({"a": 1}, {"b": 1}, False),
        (torch.zeros(0, 2), torch.zeros(0, 3), False),
        (torch.ones(2), torch.ones(1).expand(2), True),
        (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2]), False),
        (SPARSE, torch.eye(2).to_sparse(), True),
        (SPARSE, (2 * torch.eye(2)).to_sparse(), False),
        (SPARSE, torch.eye(2), False),
        (
            JAGGED,
            torch.nested.nested_tensor_from_jagged(torch.arange(4.0), torch.tensor([0, 2, 4])),
            False,
        ),
    ],
)
def test_equality_is_deep_and_of_kinds(a: object, b: object, expected: bool) -> None:
    assert equal(a, b) is expected
    assert equal(b, a) is expected


def test_equal_does_not_trust_an_object_that_cannot_be_compared() -> None:
    class Odd(SimpleNamespace):
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

    assert not equal(Odd(x=1), Odd(x=2))
    assert equal(Odd(x=np.ones(2)), Odd(x=np.ones(2)))


class NoEq:
    def __init__(self, value: object) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


@pytest.mark.parametrize("kind", [NoEq, Slotted])
def test_objects_whose_class_has_no_eq_are_equal_if_what_is_pickled_of_them_is(kind: Any) -> None:
    lock = threading.Lock()
    tensor = kind({"t": torch.ones(2), "nan": [1.0, NAN]})
    assert equal(tensor, pickle.loads(pickle.dumps(tensor)))
    assert equal(kind(lock), kind(lock))
    assert not equal(kind(1), kind(2))
    assert not equal(kind(lock), kind(threading.Lock()))
    assert not equal(NoEq(1), Slotted(1))
    loops = [kind(None), kind(None)]
    for one in loops:
        one.value = one
    assert equal(*loops)
    assert merge_meta([{"k": [kind("a")]}, {"k": [kind("a")]}]).keys() == {"k"}
    with pytest.raises(ConflictError):
        merge_meta([{"k": [kind("a")]}, {"k": [kind("b")]}])
