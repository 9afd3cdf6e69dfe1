"""Copies made without pickling: the same as what pickling makes, or none."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from protocol import DataProto
from protocol.batches import batch_tensors
from protocol.plain import arrival


def proto(**meta: Any) -> DataProto:
    return DataProto.from_dict(
        {"a": torch.arange(6.0).reshape(3, 2), "expanded": torch.zeros(3, 1).expand(3, 4)},
        {"text": ["x", "y", "z"], "lists": [[1], [2], [3]], "n": np.arange(3)},
        meta,
    )


def shared() -> list[Any]:
    one = [1]
    return [one, one]


def cyclic() -> list[Any]:
    x: list[Any] = []
    x.append(x)
    return x


class Named(DataProto):
    pass


PLAIN = {
    "a batch": lambda: proto(step=3, nested={"k": [1, (2.0, None)]}, t=torch.ones(2)),
    "no rows": lambda: proto()[:0],
    "only meta_info": lambda: DataProto(meta_info={"a": 1}),
    "a TensorDict": lambda: TensorDict({"a": torch.zeros(2, 3)}, [2, 3]),
    "a list": lambda: [torch.zeros(2), {"k": np.ones(3)}, "text", True],
    "a parameter's value": lambda: torch.zeros(2, requires_grad=True),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_what_arrives_is_what_pickling_makes_in_memory_of_its_own(make: Any) -> None:
    value = make()
    twin, pickled = arrival(value, "own"), pickle.loads(pickle.dumps(value))
    if isinstance(value, DataProto):
        assert twin.diff(pickled) == []
        assert all(tensor.is_contiguous() for tensor in batch_tensors(twin))
    else:
        assert str(twin) == str(pickled)
    before = {tensor.data_ptr() for tensor in tensors(value) if tensor.numel()}
    assert not before & {tensor.data_ptr() for tensor in tensors(twin)}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return [tensor for item in items for tensor in tensors(item)]
    return batch_tensors(value) if isinstance(value, DataProto | TensorDict) else []


def test_what_is_written_into_a_copy_does_not_show_in_the_original() -> None:
    data = proto(k=[1])
    twin = arrival(data, "own")
    twin.batch["a"] += 1
    twin.non_tensor_batch["lists"][0].append(2)
    twin.non_tensor_batch["n"] += 1
    twin.meta_info["k"].append(2)
    assert data.diff(proto(k=[1])) == []


def test_a_view_shares_tensors_and_its_arrays_cannot_be_written() -> None:
    data = proto(k=[1])
    view = arrival(data, "view")
    assert view.batch["a"].data_ptr() == data.batch["a"].data_ptr()
    with pytest.raises(ValueError, match="read-only"):
        view.non_tensor_batch["n"] += 1
    view.batch["new"] = torch.zeros(3)
    view.meta_info["k"].append(2)
    view.non_tensor_batch["lists"][0].append(2)
    assert data.diff(proto(k=[1])) == []


NOT_PLAIN = {
    "an object": lambda: object(),
    "the same list twice": shared,
    "a cycle": cyclic,
    "a class of the user's own": lambda: Named(),
    "a jagged column": lambda: DataProto.from_dict(
        {"j": torch.nested.as_nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)}
    ),
    "objects": lambda: DataProto.from_dict(non_tensors={"o": [object()]}),
    "nested": lambda: DataProto(TensorDict({"in": TensorDict({"a": torch.ones(1)}, [1])}, [1])),
    "non-tensor data": lambda: TensorDict({"s": NonTensorData("s", batch_size=[1])}, [1]),
    "dims with names": lambda: TensorDict({"a": torch.ones(1)}, [1], names=["rows"]),
    "columns in Fortran's order": lambda: np.ones((2, 3), order="F"),
    "sparse": lambda: torch.ones(2).to_sparse(),
    "another device": lambda: torch.ones(2, device="meta"),
    "keys that are objects": lambda: {(1, 2): 3},
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_only_a_pickler_can_tell_is_left_to_it(make: Any) -> None:
    assert arrival(make(), "own") is None
