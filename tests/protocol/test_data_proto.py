"""What the methods of a batch promise."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict

from protocol import columns
from protocol.config import DataProtoConfig
from protocol.data_proto import DataProto
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
    RowIndexError,
)
from tests.protocol.conftest import batches, make_column

Unchanged = Callable[[DataProto, Callable[[DataProto], Any]], Any]


def empty() -> DataProto:
    return DataProto.from_dict({"a": torch.zeros(0, 2)}, {"s": []})


# Laws that hold for every batch


@given(data=batches(), sizes=st.lists(st.integers(0, 3), max_size=4))
def test_concat_undoes_every_split(data: DataProto, sizes: list[int]) -> None:
    if len(data) or data.batch is not None or data.non_tensor_batch:
        for chunks in (n for n in (1, 2, 3) if len(data) % n == 0):
            assert DataProto.concat(data.chunk(chunks)).diff(data) == []
        if len(data):
            assert DataProto.concat(data.split(2)).diff(data) == []
        rest = len(data) - sum(sizes)
        if rest >= 0:
            assert DataProto.concat(data.split_sizes([*sizes, rest])).diff(data) == []


OPERATIONS: dict[str, Callable[[DataProto], Any]] = {
    "index": lambda data: data[list(range(len(data)))[::-1]],
    "slice": lambda data: data.slice(0, None, 2),
    "rows": list,
    "select": lambda data: data.select(),
    "deepcopy": lambda data: data.select(deepcopy=True),
    "chunk": lambda data: data.chunk(1),
    "split": lambda data: data.split(2),
    "split_sizes": lambda data: data.split_sizes([0, len(data)]),
    "pad_rows": lambda data: data.pad_rows(3 if len(data) else 0),
    "repeat": lambda data: data.repeat(2),
    "repeat blockwise": lambda data: data.repeat(2, interleave=False),
    "sample_level_repeat": lambda data: data.sample_level_repeat([2] * len(data)),
    "unfold": lambda data: data.unfold_column_chunks(2),
    "union": lambda data: data.union(data),
    "concat": lambda data: DataProto.concat([data, data]),
    "balanced": lambda data: data.balanced_chunk(2, [1.0] * len(data)),
    "iterate": lambda data: list(data.make_iterator(max(len(data), 1), 2)),
    "to_tensordict": lambda data: data.to_tensordict(),
    "repr": repr,
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=batches())
def test_no_method_but_the_in_place_ones_changes_its_batch(
    name: str, data: DataProto, unchanged: Unchanged
) -> None:
    unchanged(data, OPERATIONS[name])


@pytest.mark.parametrize("name", set(OPERATIONS) - {"rows", "to_tensordict", "repr", "balanced"})
def test_every_result_has_its_own_dicts(name: str, sample: DataProto) -> None:
    result = OPERATIONS[name](sample)
    for batch in result if isinstance(result, list) else [result]:
        batch.meta_info["new"] = 1
        batch.batch["new"] = torch.zeros(len(batch))
        batch.non_tensor_batch["new"] = np.zeros(len(batch))
        batch.pop(["a"], ["s"])
    assert set(sample.batch.keys()) == {"a", "b"}
    assert sample.non_tensor_batch.keys() == {"s"}
    assert sample.meta_info == {"m": 1}


@given(data=batches())
def test_a_tensordict_and_back_is_the_same_batch(data: DataProto) -> None:
    for key, array in data.non_tensor_batch.items():
        data.non_tensor_batch[key] = columns.as_object_array(list(array))
    assert DataProto.from_tensordict(data.to_tensordict()).diff(data) == []


@given(data=batches(min_rows=1), weights=st.data(), chunks=st.integers(1, 4))
def test_balanced_chunks_hold_every_row_once(
    data: DataProto, weights: st.DataObject, chunks: int
) -> None:
    rows = len(data)
    load = weights.draw(st.lists(st.integers(0, 50), min_size=rows, max_size=rows))
    shards, inverse = data.balanced_chunk(chunks, load)
    assert len(shards) == chunks
    if data.batch is not None or data.non_tensor_batch:
        assert DataProto.concat(shards).select_idxs(inverse).diff(data) == []


@given(st.data())
def test_every_index_form_picks_the_rows_that_torch_picks(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    batch = DataProto.from_dict(
        {"a": torch.arange(rows), "j": make_column(rows, "jagged", torch.int64)},
        {"s": list(range(rows))},
    )
    positions = data.draw(st.lists(st.integers(-rows, rows - 1), max_size=5))
    mask = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    for index in (positions, torch.tensor(positions).long(), mask, torch.tensor(mask)):
        want = torch.arange(rows)[index].tolist()
        for picked in (batch[index], batch.select_idxs(index)):
            assert picked.batch["a"].tolist() == picked.non_tensor_batch["s"].tolist() == want
            lengths = batch.batch["j"].offsets().diff()
            assert picked.batch["j"].offsets().diff().tolist() == lengths[want].tolist()
    for row in range(-rows, rows):
        assert batch[row].batch["a"] == batch[row].non_tensor_batch["s"] == row % rows


# Build


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


# Empty batches


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


# Read


def test_a_row_of_a_jagged_column_is_dense() -> None:
    column = torch.nested.nested_tensor_from_jagged(torch.arange(5), torch.tensor([0, 2, 5]))
    data = DataProto.from_dict({"j": column})
    assert [row.batch["j"].tolist() for row in data] == [[0, 1], [2, 3, 4]]


def test_a_scalar_tensor_or_array_is_an_int_index(sample: DataProto) -> None:
    for index in (np.int64(2), torch.tensor(2), np.array(2), -4):
        assert sample[index].non_tensor_batch == {"s": "s2"}  # type: ignore[index]
    with pytest.raises(RowIndexError, match="row -7 is out of range for a batch of 6 rows"):
        sample[-7]
    with pytest.raises(BatchTypeError):
        sample[True]


def test_select_skips_absent_arrays_and_meta_but_not_tensors(sample: DataProto) -> None:
    some = sample.select(["a"], ["nope"], ["nope"])
    assert (set(some.batch.keys()), some.non_tensor_batch, some.meta_info) == ({"a"}, {}, {})
    assert some.batch["a"] is sample.batch["a"]
    assert sample.select(["a"], deepcopy=True).batch["a"].data_ptr() != sample.batch["a"].data_ptr()
    assert len(sample.select([], [])) == 6
    with pytest.raises(MissingKeyError):
        sample.select(["nope"])


def test_slices_and_chunks_are_views(sample: DataProto) -> None:
    sample.slice(2, 4).batch["a"].fill_(0)
    sample.chunk(2)[1].batch["a"].fill_(7)
    assert sample.batch["a"].tolist() == [0, 1, 0, 7, 7, 7]


def test_the_repr_shows_keys_kinds_and_shapes_but_no_data(sample: DataProto) -> None:
    data = sample.union(DataProto.from_dict({"j": make_column(6, "jagged", torch.bfloat16)}))
    assert repr(data).splitlines() == [
        "DataProto(rows=6",
        "  batch['a']: int64 (6,)",
        "  batch['b']: float32 (6, 2)",
        "  batch['j']: bfloat16 jagged (6, *, 2)",
        "  non_tensor_batch['s']: object array (6,)",
        "  meta_info['m']: 1",
        ")",
    ]
    assert repr(DataProto()) == "DataProto(rows=0)"


def test_get_data_info_tells_shapes_and_types(sample: DataProto) -> None:
    sample.meta_info = {"l": [1], "d": {"a": 1.0}, "t": torch.ones(2), "n": None, "v": np.ones(2)}
    sample.meta_info["p"] = (1, "x")
    assert sample.get_data_info().splitlines() == [
        "batch",
        "  a: (6,) (torch.int64) cpu",
        "  b: (6, 2) (torch.float32) cpu",
        "non_tensor_batch",
        "  s: ndarray(6,) (object)",
        "meta_info",
        "  l: list[int]",
        "  d: dict[str: float]",
        "  t: Tensor",
        "  n: NoneType",
        "  v: ndarray(2,) (float64)",
        "  p: tuple(int, str)",
    ]


def test_print_size_logs(sample: DataProto, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="protocol.table"):
        assert sample.print_size("before") is None
    assert caplog.messages[0].startswith("before, Size of tensordict: ")


def test_diff_tells_what_differs(sample: DataProto) -> None:
    other = copy.deepcopy(sample)
    assert sample.equal(other)
    other.batch["a"][3] = 9
    other.batch["b"] = torch.zeros(6)
    other.non_tensor_batch["new"] = other.non_tensor_batch.pop("s")
    other.meta_info["m"] = 2
    assert not sample.equal(other)
    assert sample.diff(other) == [
        "batch['a']: 1 of 6 rows differ, first row 3: 3 here, 9 there",
        "batch['b']: float32 (6, 2) here, float32 (6,) there",
        "non_tensor_batch['s']: only here",
        "non_tensor_batch['new']: only there",
        "meta_info['m']: 1 here, 2 there",
    ]
    assert sample.diff(sample[:5])[0] == "rows: 6 here, 5 there"


# In place


def test_pop_moves_keys_into_a_new_batch(sample: DataProto) -> None:
    tensordict = sample.batch
    popped = sample.pop(["a"], ["s"], ["m"])
    assert (set(popped.batch.keys()), set(popped.non_tensor_batch)) == ({"a"}, {"s"})
    assert popped.meta_info == {"m": 1}
    assert (set(sample.batch.keys()), sample.non_tensor_batch, sample.meta_info) == ({"b"}, {}, {})
    assert set(tensordict.keys()) == {"a", "b"}
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


# Combine


def test_chunk_needs_equal_shards_unless_padding_is_enabled(
    sample: DataProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ChunkError) as caught:
        sample.chunk(4)
    assert str(caught.value).startswith(
        "only support equal chunk. Got size of DataProto 6 and chunk 4."
    )
    assert "uneven=True" in str(caught.value)
    assert "auto_padding=True" in str(caught.value)
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
    other.batch["a"] = other.batch["a"].float()
    with pytest.raises(BatchError, match=r"batch\['a'\]: .* shard 0 has int64 \(6,\) and shard 1"):
        DataProto.concat([sample, other])


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
    with pytest.raises(ConflictError, match=r"a in .* are not the same object: 1 of 6 rows differ"):
        sample.union(twin)
    with pytest.raises(RowCountError, match=r"identical batch size\. Got 6 and 5"):
        sample.union(sample[:5])
    with pytest.raises(ConflictError, match=r"s in .* are not the same object"):
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


# Iterate


def test_make_iterator_goes_in_order_or_shuffles_by_seed(sample: DataProto) -> None:
    def run(**kwargs: Any) -> list[list[int]]:
        return [batch.batch["a"].tolist() for batch in sample.make_iterator(3, 2, **kwargs)]

    assert run() == run(seed=1) == [[0, 1, 2], [3, 4, 5]] * 2
    shuffled = run(seed=1, dataloader_kwargs={"shuffle": True})
    assert shuffled == [[0, 4, 5], [1, 2, 3], [1, 0, 4], [3, 2, 5]]  # what veRL 0.9.1 gives
    assert shuffled == run(seed=1, dataloader_kwargs={"shuffle": True})


def test_mini_batches_are_copies_with_their_own_meta_info(sample: DataProto) -> None:
    for batch in sample.make_iterator(3, 2):
        batch.batch["a"].zero_()
        batch.meta_info["m"] = 2
    assert sample.batch["a"].sum() == 15
    assert sample.meta_info == {"m": 1}


def test_mini_batches_must_divide_unless_the_rest_is_dropped(sample: DataProto) -> None:
    with pytest.raises(BatchError, match="6 % 4 != 0"):
        sample.make_iterator(4, 1)
    dropping = sample.make_iterator(4, 1, dataloader_kwargs={"drop_last": True})
    assert [len(batch) for batch in dropping] == [4]
    with pytest.raises(BatchError, match="batch_size"):
        sample.make_iterator(3, 1, dataloader_kwargs={"batch_size": 2})
