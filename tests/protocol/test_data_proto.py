"""What the verbs that change or combine batches promise."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from protocol import columns
from protocol.batches import pad_batch, select_keys
from protocol.config import DataProtoConfig
from protocol.data_proto import DataProto
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)


def test_pop_moves_keys_into_a_new_batch(sample: DataProto) -> None:
    tensordict = sample.batch
    popped = sample.pop(["a"], ["s"], ["m"])
    assert (set(popped.batch.keys()), set(popped.non_tensor_batch)) == ({"a"}, {"s"})
    assert popped.meta_info == {"m": 1}
    assert (set(sample.batch.keys()), sample.non_tensor_batch, sample.meta_info) == ({"b"}, {}, {})
    assert sample.batch is tensordict
    with pytest.raises(MissingKeyError, match="non_tensor_batch"):
        sample.pop(["b"], ["nope"])
    assert set(sample.batch.keys()) == {"b"}
    assert len(sample.pop(["b"])) == len(sample) == 6


def test_rename_keeps_the_order_of_columns_and_can_swap(sample: DataProto) -> None:
    assert sample.rename("a", "z") is sample
    assert list(sample.batch.keys()) == ["z", "b"]
    sample.rename(["z", "b"], ["b", "z"])
    assert list(sample.batch.keys()) == ["b", "z"]
    with pytest.raises(ConflictError, match="taken"):
        sample.rename("b", "z")
    with pytest.raises(MissingKeyError):
        sample.rename("nope", "x")
    with pytest.raises(ValueError, match="same length, but got 1 and 2"):
        sample.rename(["b", "z"], ["x"])
    with pytest.raises(TypeError, match="list or a string"):
        sample.rename(3, "x")  # type: ignore[arg-type]


def test_reorder_and_padding_work_in_place(sample: DataProto) -> None:
    assert sample.reorder(torch.tensor([5, 4, 3, 2, 1, 0])) is None
    assert sample.batch["a"].tolist() == [5, 4, 3, 2, 1, 0]
    assert sample.non_tensor_batch["s"][0] == "s5"
    assert sample.padding(2) is None
    sample.padding(1, "first")
    assert sample.batch["a"].tolist() == [5, 4, 3, 2, 1, 0, 0, 0, 5]
    assert len(sample) == len(sample.non_tensor_batch["s"]) == 9
    with pytest.raises(RowCountError, match="select_idxs"):
        sample.reorder([0])
    with pytest.raises(BatchError, match="'middle'"):
        sample.padding(1, "middle")


def test_to_moves_the_batch_itself(sample: DataProto) -> None:
    assert sample.to("cpu") is sample
    assert sample.batch.device == torch.device("cpu")
    assert sample.chunk(2)[0].batch.device == torch.device("cpu")


def test_chunk_needs_equal_shards_unless_padding_is_enabled(
    sample: DataProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ChunkError) as caught:
        sample.chunk(4)
    chunked = "only support equal chunk. Got size of DataProto 6 and chunk 4."
    assert str(caught.value) == chunked  # and nothing of register, which is for groups
    padded = DataProto.from_dict({"a": torch.arange(6)}, auto_padding=True)
    assert padded.is_padding_enabled()
    assert [len(part) for part in padded.chunk(4)] == [2, 2, 1, 1]
    assert len(padded) == 6
    monkeypatch.setenv("VERL_AUTO_PADDING", "TRUE")
    assert DataProtoConfig.auto_padding
    assert sample.is_padding_enabled()
    try:
        DataProtoConfig.auto_padding = False
        assert not sample.is_padding_enabled()
    finally:
        DataProtoConfig.auto_padding = None  # the environment decides again


@pytest.mark.parametrize("chunks", [0, -1])
def test_there_must_be_a_chunk(sample: DataProto, chunks: int) -> None:
    with pytest.raises(BatchError):
        sample.chunk(chunks)
    with pytest.raises(BatchError):
        sample.split(chunks)


def test_concat_collects_metrics_and_checks_keys(sample: DataProto) -> None:
    other = copy.deepcopy(sample)
    sample.meta_info["metrics"], other.meta_info["metrics"] = {"loss": 1.0}, [{"loss": 2.0}]
    both = DataProto.concat([sample, other])
    assert both.meta_info == {"m": 1, "metrics": {"loss": [1.0, 2.0]}}
    other.meta_info["m"] = 2
    with pytest.raises(ConflictError, match="Conflicting values for meta_info key 'm'"):
        DataProto.concat([sample, other])
    with pytest.raises(BatchError, match=r"batch of shard 1 lacks \['b'\] and adds \[\]"):
        DataProto.concat([sample, sample.select(["a"])])
    with pytest.raises(BatchError, match="zero batches"):
        DataProto.concat([])
    other.batch["a"] = other.batch["b"]
    with pytest.raises(BatchError, match=r"batch\['a'\]: .* shard 0 has int64 \(6,\) and shard 1"):
        DataProto.concat([sample, other])


@pytest.mark.parametrize(
    "empty",
    [
        DataProto(),
        DataProto(meta_info={"metrics": {"n": 1}}),
        DataProto.from_dict({"a": torch.zeros(0, 3)}, {"s": np.array([])}),
        DataProto.from_dict({"other": torch.zeros(0)}),
    ],
)
def test_a_shard_without_rows_decides_neither_columns_nor_dtypes(
    sample: DataProto, empty: DataProto
) -> None:
    for shards in ([sample, empty], [empty, sample], [empty, sample, empty]):
        whole = DataProto.concat(shards)
        assert whole.select(meta_info_keys=["m"]).diff(sample) == []
        assert {key: array.dtype for key, array in whole.non_tensor_batch.items()} == {"s": "O"}
        assert (
            whole.meta_info.get("metrics", {}).keys() == empty.meta_info.get("metrics", {}).keys()
        )
    assert len(DataProto.concat([empty, empty])) == 0
    columns_of = DataProto.concat([DataProto(), sample[:0]])
    assert (set(columns_of.batch.keys()), len(columns_of)) == ({"a", "b"}, 0)
    both = [select_keys(shard, ["a"]) for shard in (empty, sample)]
    assert DataProto.concat(both).batch["a"].tolist() == sample.batch["a"].tolist()


def test_numbers_of_several_dtypes_are_joined_as_torch_and_numpy_promote_them() -> None:
    shards = [
        DataProto.from_dict({"x": torch.zeros(1, dtype=dtype)}, {"n": np.zeros(1, kind), "s": text})
        for dtype, kind, text in (
            (torch.int64, "i8", np.array(["a"])),
            (torch.float32, "f4", columns.as_object_array([None])),
            (torch.float64, "?", np.array(["bcd"])),
        )
    ]
    whole = DataProto.concat(shards)
    assert whole.batch["x"].dtype == torch.float64
    assert whole.non_tensor_batch["n"].dtype == np.float64
    assert whole.non_tensor_batch["s"].tolist() == ["a", None, "bcd"]


def test_what_is_popped_or_renamed_is_gone_from_the_tensordict_that_one_has(
    sample: DataProto,
) -> None:
    for lock in (False, True):
        data = copy.deepcopy(sample)
        held = data.batch.lock_() if lock else data.batch
        data.pop(["a"])
        data.rename("b", "c")
        assert [*data.batch.keys()] == ["c"]
        assert [*held.keys()] == (["a", "b"] if lock else ["c"])
    nested = DataProto(TensorDict({"in": TensorDict({"x": torch.ones(2)}, [2])}, [2]))
    nested.pop([("in", "x")])
    assert [*nested.batch.keys()] == []


def test_a_key_named_twice_is_not_renamed(sample: DataProto) -> None:
    for old, new in ((["a", "a"], ["c", "d"]), (["a", "b"], ["c", "c"])):
        with pytest.raises(ConflictError, match="named twice"):
            sample.rename(old, new)
    assert [*sample.batch.keys()] == ["a", "b"]


def test_rows_of_nan_are_one_group() -> None:
    nan = float("nan")
    objects = columns.as_object_array([nan, "x", np.float32("nan"), nan])
    data = DataProto.from_dict({"t": torch.tensor([1.0, nan, nan, 1.0])}, {"o": objects})
    assert {key: len(rows) for key, rows in data.group_by("t").items()} == {1.0: 2, math.nan: 2}
    assert data.group_by("o")[math.nan].batch["t"].isnan().tolist() == [False, True, False]


def test_lists_of_equal_length_are_cut_with_the_columns() -> None:
    lists = {"l": [[1, 2, 3, 4], [5, 6, 7, 8]], "t": ["ab", "cd"]}
    data = DataProto.from_dict({"x": torch.arange(1, 9).view(2, 4)}, lists)
    cut = data.unfold_column_chunks(2, ["x", "l"])
    assert cut.non_tensor_batch["l"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert cut.batch["x"].tolist() == cut.non_tensor_batch["l"].tolist()
    assert cut.non_tensor_batch["t"].tolist() == ["ab", "ab", "cd", "cd"]
    for rows in ([[1, 2], [1]], [[1], [2]], ["ab", "cd"]):
        with pytest.raises(BatchError, match="n_split=2 equal parts"):
            DataProto.from_dict(None, {"l": rows}).unfold_column_chunks(2, ["l"])


def test_concat_of_one_batch_is_new_memory(sample: DataProto) -> None:
    whole = DataProto.concat([sample])
    whole.batch["a"].zero_()
    whole.non_tensor_batch["s"][0] = "changed"
    assert sample.batch["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sample.non_tensor_batch["s"][0] == "s0"


def test_union_takes_what_both_have_if_it_is_equal(sample: DataProto) -> None:
    twin = copy.deepcopy(sample)
    twin.batch["new"] = torch.full((6,), float("nan"))
    both = sample.union(twin).union(copy.deepcopy(twin))
    assert set(both.batch.keys()) == {"a", "b", "new"}
    assert both.batch["a"] is twin.batch["a"] or both.batch["a"] is not None
    twin.batch["a"][2] = 7
    with pytest.raises(ConflictError, match=r"^`a` in .* are not the same object\. 1 of 6 rows"):
        sample.union(twin)
    with pytest.raises(RowCountError, match=r"identical batch size\. Got 6 and 5"):
        sample.union(sample[:5])
    with pytest.raises(ConflictError, match=r"^`s` in .* are not the same object\."):
        sample.union(DataProto(non_tensor_batch={"s": np.arange(6)}))


def test_union_works_without_tensors_on_either_side(sample: DataProto) -> None:
    words = DataProto(non_tensor_batch={"w": np.arange(6)}, meta_info={"k": 2})
    for both in (sample.union(words), words.union(sample)):
        assert (set(both.batch.keys()), set(both.non_tensor_batch)) == ({"a", "b"}, {"s", "w"})
        assert both.meta_info == {"m": 1, "k": 2}
    assert DataProto(meta_info={"k": 2}).union(sample).meta_info == {"m": 1, "k": 2}


def test_repeat_and_sample_level_repeat(sample: DataProto) -> None:
    assert sample[:2].repeat(2).batch["a"].tolist() == [0, 0, 1, 1]
    assert sample[:2].repeat(2, interleave=False).non_tensor_batch["s"].tolist() == ["s0", "s1"] * 2
    for times in ([1, 2, 0], (1, 2, 0), torch.tensor([1, 2, 0]), np.array([1, 2, 0])):
        repeated = sample[:3].sample_level_repeat(times)  # type: ignore[arg-type]
        assert repeated.batch["a"].tolist() == [0, 1, 1]
    with pytest.raises(BatchError, match="one count"):
        sample.sample_level_repeat([1])
    with pytest.raises(BatchError, match="repeat_times type"):
        sample.sample_level_repeat(2)  # type: ignore[arg-type]
    with pytest.raises(BatchError, match="sample_level_repeat"):
        sample.repeat([1] * 6)  # type: ignore[arg-type]


def test_unfold_column_chunks_cuts_some_columns_and_repeats_the_others() -> None:
    data = DataProto.from_dict(
        {"p": torch.arange(12).reshape(2, 6), "q": torch.arange(2)}, {"s": ["x", "y"]}
    )
    unfolded = data.unfold_column_chunks(3, ["p"])
    assert unfolded.batch["p"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert unfolded.batch["q"].tolist() == [0, 0, 0, 1, 1, 1]
    assert unfolded.non_tensor_batch["s"].tolist() == ["x"] * 3 + ["y"] * 3
    with pytest.raises(BatchError, match=r"'p' is int64 \(2, 6\).* n_split=4"):
        data.unfold_column_chunks(4, ["p"])


def test_balanced_chunk_balances_weights(sample: DataProto) -> None:
    shards, inverse = sample.balanced_chunk(2, torch.tensor([9, 1, 1, 1, 5, 1]))
    assert [shard.batch["a"].tolist() for shard in shards] == [[0], [1, 2, 3, 4, 5]]
    assert DataProto.concat(shards).select_idxs(inverse).diff(sample) == []
    for weights in ([1], [1, 1, 1, 1, 1, -1], [1, 1, 1, 1, 1, float("nan")]):
        with pytest.raises(BatchError, match="one weight >= 0 for each of 6 rows"):
            sample.balanced_chunk(2, weights)


def test_group_by_keeps_rows_in_order() -> None:
    data = DataProto.from_dict({"a": torch.tensor([1, 2, 1])}, {"u": ["x", "y", "y"]})
    assert {k: g.batch["a"].tolist() for k, g in data.group_by("u").items()} == {
        "x": [1],
        "y": [2, 1],
    }
    assert {k: g.non_tensor_batch["u"].tolist() for k, g in data.group_by("a").items()} == {
        1: ["x", "y"],
        2: ["y"],
    }
    with pytest.raises(MissingKeyError):
        data.group_by("nope")
    with pytest.raises(BatchTypeError, match="hashable"):
        DataProto.from_dict(non_tensors={"l": [[1], [2]]}).group_by("l")
    with pytest.raises(BatchError, match="one value per row"):
        DataProto.from_dict({"m": torch.zeros(2, 2)}).group_by("m")


def test_tensors_with_a_graph_and_sparse_ones_may_be_anywhere_in_a_batch(
    sample: DataProto,
) -> None:
    graph = torch.ones(2, requires_grad=True) * 2
    sample.meta_info.update(deep={"x": [graph]}, inside=SimpleNamespace(graph=graph))
    sample.meta_info["sparse"] = torch.eye(2).to_sparse()
    sample.non_tensor_batch["o"] = columns.as_object_array([{"x": graph}] * 6)
    for twin in (copy.deepcopy(sample), sample.select(deepcopy=True), sample.detached()):
        assert twin.diff(sample) == []
        for tensor in (twin.meta_info["deep"]["x"][0], twin.meta_info["inside"].graph):
            assert (tensor.is_leaf, tensor.requires_grad) == (True, True)
            assert tensor.data_ptr() != graph.data_ptr()
        assert DataProto.concat([sample, twin]).meta_info.keys() == sample.meta_info.keys()
        assert sample.union(twin).diff(sample) == []
    twin.meta_info["sparse"] = (2 * torch.eye(2)).to_sparse()
    assert twin.diff(sample)[0].startswith("meta_info['sparse']: ")
    with pytest.raises(ConflictError, match="'sparse' in the two batches"):
        sample.union(twin)


def test_the_same_mistake_is_the_same_error_everywhere(sample: DataProto) -> None:
    for cut in (lambda: sample.chunk(0), lambda: sample.balanced_chunk(0, [1] * 6)):
        with pytest.raises(ChunkError, match="at least one chunk; got 0"):
            cut()
    for pad in (lambda: sample.pad_rows(-1), lambda: pad_batch(sample, -1)):
        with pytest.raises(RowCountError, match="batch of 6 rows"):
            pad()


def test_no_words_are_made_of_an_index_that_is_right(sample: DataProto) -> None:
    class Silent(list[int]):
        def __repr__(self) -> str:
            raise AssertionError("nobody asked")

    assert sample.select_idxs(Silent([1, 0])).batch["a"].tolist() == [1, 0]


def test_a_batch_without_tensors_takes_those_of_another(sample: DataProto) -> None:
    words = DataProto(non_tensor_batch={"w": np.arange(6)})
    both = words.union(sample.select(["a"]))
    assert both.batch["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert words.batch is None
