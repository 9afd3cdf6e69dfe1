"""What a batch is built from, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack

from protocol.data_proto import DataProto
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ConflictError,
    RowCountError,
)


def empty() -> DataProto:
    return DataProto.from_dict({"a": torch.zeros(0, 2)}, {"s": []})


def test_lists_become_one_dimensional_object_arrays() -> None:
    lists = {"s": ["x", "y"], "v": [np.arange(2), np.arange(2)], "l": [[1], [2]]}
    data = DataProto.from_dict({"a": torch.arange(2)}, lists)
    assert {array.shape for array in data.non_tensor_batch.values()} == {(2,)}
    assert {array.dtype for array in data.non_tensor_batch.values()} == {np.dtype(object)}
    assert isinstance(lists["s"], list)


def test_the_callers_dicts_are_not_kept() -> None:
    tensors, arrays, meta = {"a": torch.ones(2)}, {"s": np.ones(2)}, {"m": 1}
    data = DataProto.from_dict(tensors, arrays, meta, auto_padding=True)
    data.pop(["a"], ["s"], ["m"])
    direct = DataProto(TensorDict(tensors, [2]), arrays, meta)
    direct.pop(["a"], ["s"], ["m"])
    assert (tensors.keys(), arrays.keys(), meta) == ({"a"}, {"s"}, {"m": 1})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: DataProto.from_dict({"a": torch.ones(2), "b": torch.ones(3)}),
            RowCountError,
            "a has 2 rows, b has 3 rows",
        ),
        (
            lambda: DataProto.from_dict({"a": torch.ones(2)}, {"s": np.ones(3)}),
            RowCountError,
            "key s length 3 is not equal to batch size 2",
        ),
        (lambda: DataProto(None, {"s": ["x"]}), BatchTypeError, "must be an ndarray, got list"),
        (lambda: DataProto.from_dict({"a": torch.ones(2, 2)}, num_batch_dims=2), BatchError, "=1"),
        (lambda: DataProto(TensorDict({}, [2, 2])), BatchError, r"batch_size \[2, 2\]"),
        (lambda: DataProto.from_dict({"a": torch.tensor(1)}), RowCountError, "0-dim"),
        (
            lambda: DataProto.from_single_dict({"a": 3}),
            BatchTypeError,
            "Unsupported type in data <class 'int'> under key 'a'",
        ),
    ],
)
def test_a_batch_that_cannot_be_says_why(
    build: Callable[[], DataProto], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


def test_errors_can_be_caught_as_verl_raises_them(sample: DataProto) -> None:
    with pytest.raises(AssertionError, match="only support equal chunk"):
        sample.chunk(4)
    with pytest.raises(KeyError, match=r"no \['z'\] in batch, which has the keys \['a', 'b'\]"):
        sample.select(["z"])
    with pytest.raises(IndexError):
        sample[6]
    with pytest.raises(TypeError, match="Indexing with <class 'tuple'> is not supported"):
        sample[1, 2]
    with pytest.raises(TypeError, match=r"A column is batch.batch\['a'\]"):
        sample["a"]


def test_non_tensor_data_in_a_batch_is_refused_with_the_way_out() -> None:
    batch = TensorDict({"a": torch.ones(2), "n": NonTensorData("x", batch_size=[2])}, [2])
    with pytest.raises(BatchTypeError, match="from_tensordict"):
        DataProto(batch).chunk(2)
    assert DataProto.from_tensordict(batch).meta_info == {"n": "x"}
    with pytest.raises(ConflictError, match="'n'"):
        DataProto.from_tensordict(batch, {"n": "y"})


def test_nested_tensordicts_are_columns_too() -> None:
    inner = TensorDict({"x": torch.arange(4)}, [4])
    data = DataProto(TensorDict({"in": inner, "a": torch.arange(4)}, [4]))
    first, second = data.chunk(2)
    assert second.batch["in", "x"].tolist() == [2, 3]
    assert DataProto.concat([first, second]).diff(data) == []
    assert data[[3, 0]].batch["in"]["x"].tolist() == [3, 0]


def test_from_single_dict_sorts_by_type() -> None:
    data = DataProto.from_single_dict({"a": torch.ones(2), "s": np.ones(2)}, {"m": 1})
    assert (set(data.batch.keys()), set(data.non_tensor_batch)) == ({"a"}, {"s"})


def test_a_key_that_occurs_twice_cannot_go_into_a_tensordict() -> None:
    with pytest.raises(ConflictError, match=r"\['a'\] occur twice"):
        DataProto.from_dict({"a": torch.ones(2)}, meta_info={"a": 1}).to_tensordict()


def test_empty_batches_are_legal_everywhere() -> None:
    data = empty()
    assert len(data) == len(DataProto()) == 0
    assert [len(part) for part in data.chunk(3)] == [0, 0, 0]
    assert data.split(2) == []
    assert len(DataProto.concat(data.chunk(3))) == 0
    assert len(data.repeat(2)) == len(data[[]]) == len(data[0:5]) == 0
    assert list(data) == list(data.make_iterator(2, 1, dataloader_kwargs={"shuffle": True})) == []
    assert data.union(data).diff(data) == []
    assert len(DataProto.concat([DataProto(), DataProto()])) == 0
    shards, inverse = data.balanced_chunk(2, [])
    assert [len(shard) for shard in shards] == [0, 0]
    assert len(inverse) == 0
    assert data.group_by("s") == {}
    with pytest.raises(BatchError, match="cannot add 2 padding rows to a batch of 0 rows"):
        data.pad_rows(2)


def test_arrays_that_are_more_than_their_numbers_are_refused_and_files_are_arrays(
    tmp_path: Path,
) -> None:
    for array in (np.ma.array([1, 2], mask=[0, 1]), np.zeros(2).view(np.recarray)):
        with pytest.raises(BatchTypeError, match=f"got {type(array).__name__}, of which only"):
            DataProto.from_dict(None, {"x": array})
    file = np.memmap(tmp_path / "x", "f4", "w+", shape=(3,))
    column = DataProto.from_dict(None, {"x": file}).non_tensor_batch["x"]
    assert type(column) is np.ndarray
    assert np.shares_memory(column, file)


def test_a_lazy_stack_of_rows_that_differ_is_refused_at_once() -> None:
    rows = [TensorDict({"a": torch.zeros(n)}, []) for n in (2, 3)]
    for build in (DataProto, DataProto.from_tensordict):
        with pytest.raises(BatchTypeError, match="one shape per key: build a jagged column"):
            build(lazy_stack(rows))
    alike = DataProto(lazy_stack([rows[0], rows[0].clone()]))
    assert alike[1:].batch["a"].shape == (1, 2)
