"""How values get into a TensorDict."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from protocol import tensordict_utils as tu
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)


def make(rows: int) -> TensorDict:
    return tu.get_tensordict({"dense": torch.arange(rows), "text": ["a", "b", "c"][:rows]})


def plain(td: TensorDict, key: str) -> object:
    value = tu.get(td, key)
    return [row.tolist() for row in value.unbind()] if isinstance(value, torch.Tensor) else value


def test_lists_and_arrays_hold_one_object_per_row() -> None:
    td = tu.get_tensordict(
        {"a": torch.zeros(2), "s": ["x", {"y": 1}], "n": np.array([[1, 2], [3, 4]])}
    )
    assert td.batch_size == (2,)
    assert tu.get(td, "s") == ["x", {"y": 1}]
    assert [row.tolist() for row in tu.get(td, "n")] == [[1, 2], [3, 4]]


def test_non_tensors_are_shared_by_all_rows_even_if_lists() -> None:
    td = tu.get_tensordict({"a": torch.zeros(2)}, {"l": [1, 2], "n": None, "t": 0.5})
    assert tu.get(td, "l") == [1, 2]
    assert tu.get(td[0:1], "l") == [1, 2]
    assert tu.get(td, "n", default=3) is None


def test_wrapped_values_are_not_wrapped_twice() -> None:
    td = tu.get_tensordict({"s": NonTensorStack("a", "b")}, {"x": NonTensorData(3, batch_size=[7])})
    assert tu.get(td, "s") == ["a", "b"]
    assert tu.get(td, "x") == 3


def test_only_non_tensors_give_no_batch_dim() -> None:
    assert tu.get_tensordict({}, {"a": 1}).batch_size == ()


def test_zero_rows_are_legal_for_every_kind_of_value() -> None:
    td = tu.get_tensordict({"a": torch.zeros(0, 3), "text": []}, {"shared": [1, 2]})
    assert td.batch_size == (0,)
    assert tu.get(td, "text") == []
    assert tu.get(td, "shared") == [1, 2]
    assert tu.get(pickle.loads(pickle.dumps(td)), "text") == []


def test_arguments_are_not_modified() -> None:
    tensors: dict[str, Any] = {"a": torch.zeros(2), "s": ["x", "y"]}
    shared = {"k": NonTensorData(1)}
    tu.get_tensordict(tensors, shared)
    assert tensors.keys() == {"a", "s"}
    assert tensors["s"] == ["x", "y"]
    assert shared["k"].batch_size == ()


def test_differing_rows_are_refused_by_key() -> None:
    with pytest.raises(RowCountError, match=r"tensor s is not .*Expected 2, got 1"):
        tu.get_tensordict({"a": torch.zeros(2), "s": ["x"]})


def test_a_tensor_without_rows_is_refused_by_key() -> None:
    with pytest.raises(RowCountError, match="a needs rows"):
        tu.get_tensordict({"a": torch.tensor(1)})


def test_a_list_of_tensors_is_refused_by_key() -> None:
    with pytest.raises(BatchTypeError, match=r"a: .*doesn't support torch\.Tensor"):
        tu.get_tensordict({"a": [torch.zeros(1)]})


def test_a_scalar_among_columns_is_refused_by_key() -> None:
    with pytest.raises(BatchTypeError, match=r"a -> <class 'int'> isn't of"):
        tu.get_tensordict({"a": 1})  # type: ignore[dict-item]


def test_a_key_may_not_be_in_both() -> None:
    with pytest.raises(ConflictError, match="'a'"):
        tu.get_tensordict({"a": torch.zeros(1)}, {"a": 1})


def test_tensors_become_jagged_and_objects_a_stack() -> None:
    td = tu.list_of_dict_to_tensordict(
        [{"a": torch.arange(2), "s": "x", "n": 1}, {"a": torch.arange(3), "s": "y", "n": 2}]
    )
    assert plain(td, "a") == [[0, 1], [0, 1, 2]]
    assert plain(td, "s") == ["x", "y"]
    assert plain(td, "n") == [1, 2]
    assert td["a"].is_nested


def test_rows_of_one_shape_are_jagged_all_the_same() -> None:
    td = tu.list_of_dict_to_tensordict([{"a": torch.arange(2)}, {"a": torch.arange(2)}])
    assert td["a"].is_nested
    assert plain(td, "a") == [[0, 1], [0, 1]]


def test_scalars_become_a_dense_column() -> None:
    td = tu.list_of_dict_to_tensordict([{"a": torch.tensor(1)}, {"a": torch.tensor(2)}])
    assert td["a"].tolist() == [1, 2]


def test_the_ragged_dim_is_the_one_that_differs() -> None:
    td = tu.list_of_dict_to_tensordict([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(4, 3)}])
    assert [tuple(row.shape) for row in td["a"].unbind()] == [(2, 3), (4, 3)]


def test_no_dict_is_refused() -> None:
    with pytest.raises(BatchError, match="at least one dict"):
        tu.list_of_dict_to_tensordict([])


@pytest.mark.parametrize("other", [{}, {"a": 1, "b": 2}])
def test_differing_keys_are_refused(other: dict[str, int]) -> None:
    with pytest.raises(MissingKeyError, match="row 1"):
        tu.list_of_dict_to_tensordict([{"a": 1}, other])


def test_rows_that_do_not_go_together_are_refused_by_key() -> None:
    with pytest.raises(BatchError, match="key 'a'"):
        tu.list_of_dict_to_tensordict([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2)}])


def test_a_list_is_per_row_and_anything_else_shared() -> None:
    td = make(2)
    assert tu.assign_non_tensor(td, per_row=[[1], 2], shared=(1, 2), stack=td.get("text")) is td
    assert tu.get(td, "per_row") == [[1], 2]
    assert tu.get(td, "shared") == (1, 2)
    assert tu.get(td[0:1], "per_row") == [[1]]
    assert tu.get(td, "stack") == ["a", "b"]


def test_data_is_shared_even_if_a_list() -> None:
    td = make(2)
    tu.assign_non_tensor_data(td, "k", [1, 2, 3])
    assert tu.get(td, "k") == [1, 2, 3]


def test_without_batch_dim_a_list_may_have_any_length() -> None:
    td = tu.get_tensordict({})
    tu.assign_non_tensor_stack(td, "k", [1, 2, 3])
    assert tu.get(td, "k") == [1, 2, 3]


def test_a_list_of_another_length_is_refused_by_key() -> None:
    with pytest.raises(RowCountError, match="k needs one element for each of 2 rows; got 3"):
        tu.assign_non_tensor(make(2), k=[1, 2, 3])


def test_a_stack_of_another_length_is_a_runtime_error_too() -> None:
    td = tu.get_tensordict({"x": torch.zeros(2)})
    for assign in (
        lambda: tu.assign_non_tensor_stack(td, "s", ["only"]),
        lambda: tu.assign_non_tensor(td, s=["only"]),
    ):
        with pytest.raises(RuntimeError, match="one element for each of 2 rows; got 1") as caught:
            assign()
        assert isinstance(caught.value, RowCountError)
