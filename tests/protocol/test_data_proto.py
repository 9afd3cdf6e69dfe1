"""What a DataProto is built from, what one learns from it, and what its verbs promise; that they
keep the rows is in `test_row_model`."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from tensordict import NonTensorData, TensorDict, lazy_stack

from protocol import columns
from protocol.batches import detach_batch, pad_batch, select_keys
from protocol.data_proto import DataProto, DataProtoConfig
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

NAN = float("nan")
Unchanged = Callable[[DataProto, Callable[[DataProto], Any]], Any]

# Build


def test_the_callers_dicts_are_not_kept() -> None:
    tensors, arrays, meta = {"a": torch.ones(2)}, {"s": np.ones(2)}, {"m": 1}
    data = DataProto.from_dict(tensors, {**arrays, "v": [[1], [2]]}, meta, auto_padding=True)  # type: ignore[dict-item]
    assert data.non_tensor_batch["v"].shape == (2,)  # not an array of two dims
    single = DataProto.from_single_dict({**tensors, **arrays}, meta)
    assert single.diff(DataProto.from_dict(tensors, arrays, meta)) == []
    data.pop(["a"], ["s"], ["m"])
    DataProto(TensorDict(tensors, [2]), arrays, meta).pop(["a"], ["s"], ["m"])
    assert (tensors.keys(), arrays.keys(), meta) == ({"a"}, {"s"}, {"m": 1})


new = DataProto.from_dict
WRONG: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (
        lambda _: new({"a": torch.ones(2), "b": torch.ones(3)}),
        RowCountError,
        "Got {'a': 2, 'b': 3}",
    ),
    (
        lambda _: new({"a": torch.ones(2)}, {"s": np.ones(3)}),
        RowCountError,
        "key s length 3 is not equal to batch size 2",
    ),
    (lambda _: DataProto(None, {"s": ["x"]}), BatchTypeError, "must be an ndarray, got list"),
    (lambda _: new({"a": torch.eye(2)}, num_batch_dims=2), BatchError, "=1"),
    (lambda _: DataProto(TensorDict({}, [2, 2])), BatchError, r"one batch dim; got \[2, 2\]"),
    (lambda _: new({"a": torch.tensor(1)}), RowCountError, "0-dim"),
    (lambda _: DataProto({"a": torch.ones(2)}), BatchTypeError, "TensorDict or None; got dict"),
    (lambda _: new({"a": [1]}), BatchTypeError, r"tensors\['a'\].* got list"),
    (lambda _: new(None, {"s": "ab"}), BatchTypeError, "'s'.* got str 'ab'"),
    (
        lambda _: new({"a": torch.eye(2).to_sparse()}),
        BatchTypeError,
        r"tensors\['a'\] must be .* a dense or jagged tensor; got Tensor",
    ),
    (lambda data: data.chunk(4), AssertionError, "only support equal chunk"),
    (lambda data: data.select(["z"]), KeyError, r"no \['z'\] in batch, which has the keys"),
    (lambda data: data.select("a"), BatchTypeError, "batch_keys must be a list of keys; got st"),
    (lambda data: data[6], IndexError, "row 6 is out of range for a batch of 6 rows"),
    (lambda data: data[1, 2], TypeError, "Indexing with <class 'tuple'> is not supported"),
    (lambda data: data["a"], TypeError, r"a column is batch.batch\[key\]"),
    (lambda data: data[True], BatchTypeError, "not supported"),
    (lambda data: data[[0.5]], BatchTypeError, r"float64; make a mask with .bool\(\)"),
    (lambda data: DataProto.concat(data), BatchTypeError, r"data\[0\] must be of type DataProto"),
    (lambda data: DataProto.concat([data, None]), BatchTypeError, r"data\[1\] must be of type"),
    (lambda data: DataProto.concat([]), BatchError, "zero batches"),
    (lambda data: data.split(0), BatchError, "split_size must be at least 1; got 0"),
    (lambda data: data.repeat(-1), BatchError, "at least 0; got -1"),
    (lambda _: new({"a": torch.ones(2)}, None, {"a": 1}).to_tensordict(), ConflictError, "'a'"),
    (lambda data: data.sample_level_repeat([1]), BatchError, "one count .* each of 6 rows"),
    (lambda data: data.make_iterator(4, 1), BatchError, "6 % 4 != 0"),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG)
def test_what_is_wrong_is_named_with_what_was_wanted(
    sample: DataProto, call: Callable[[Any], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        call(sample)
    assert isinstance(caught.value, BatchError)
    assert isinstance(caught.value, AssertionError)  # which programs written for veRL catch


def test_non_tensor_data_in_a_batch_is_refused_with_the_way_out() -> None:
    batch = TensorDict({"a": torch.ones(2), "n": NonTensorData("x", batch_size=[2])}, [2])
    with pytest.raises(BatchTypeError, match="from_tensordict"):
        DataProto(batch).chunk(2)
    assert DataProto.from_tensordict(batch).meta_info == {"n": "x"}
    with pytest.raises(ConflictError, match="`n` in meta_info and tensor_dict"):
        DataProto.from_tensordict(batch, {"n": "y"})


def test_nested_tensordicts_are_columns_too() -> None:
    inner = TensorDict({"x": torch.arange(4)}, [4])
    data = DataProto(TensorDict({"in": inner, "a": torch.arange(4)}, [4]))
    assert DataProto.concat(data.chunk(2)).diff(data) == []
    assert data[[3, 0]].batch["in"]["x"].tolist() == [3, 0]
    path: Any = ("in", "x")
    with pytest.raises(MissingKeyError, match=r"no \['in'\] in batch.*\('in', 'x'\)"):
        data.select(["in"])
    assert data.pop([path]).batch[path].tolist() == [0, 1, 2, 3]


@given(data=batches())
def test_a_tensordict_and_back_is_the_same_batch(data: DataProto) -> None:
    for key, array in data.non_tensor_batch.items():
        data.non_tensor_batch[key] = columns.as_object_array(list(array))
    assert DataProto.from_tensordict(data.to_tensordict()).diff(data) == []


def test_empty_batches_are_legal_everywhere() -> None:
    data = DataProto.from_dict({"a": torch.zeros(0, 2)}, {"s": []})
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
    with pytest.raises(RowCountError, match="0 rows cannot be padded by 2 rows"):
        data.padding(2)


def test_arrays_that_are_more_than_their_numbers_are_refused() -> None:
    for array in (np.ma.array([1, 2], mask=[0, 1]), np.zeros(2).view(np.recarray)):
        with pytest.raises(BatchTypeError, match=f"got {type(array).__name__}: "):
            DataProto.from_dict(None, {"x": array})


def test_a_lazy_stack_of_rows_that_differ_is_refused_at_once() -> None:
    rows = [TensorDict({"a": torch.zeros(n)}, []) for n in (2, 3)]
    for build in (DataProto, DataProto.from_tensordict):
        with pytest.raises(RuntimeError, match="Failed to stack tensors"):
            build(lazy_stack(rows))
    alike = DataProto(lazy_stack([rows[0], rows[0].clone()]))
    assert alike[1:].batch["a"].shape == (1, 2)


# Read


def test_a_scalar_tensor_or_array_is_an_int_index(sample: DataProto) -> None:
    for index in (np.int64(2), torch.tensor(2), np.array(2), -4):
        assert sample[index].non_tensor_batch == {"s": "s2"}  # type: ignore[index]
    with pytest.raises(RowIndexError, match="row -7 is out of range for a batch of 6 rows"):
        sample[-7]


def test_select_skips_absent_arrays_and_meta_but_not_tensors(sample: DataProto) -> None:
    some = sample.select(["a"], ["nope"], ["nope"])
    assert (set(some.batch.keys()), some.non_tensor_batch, some.meta_info) == ({"a"}, {}, {})
    assert some.batch["a"] is sample.batch["a"]
    assert sample.select(["a"], deepcopy=True).batch["a"].data_ptr() != sample.batch["a"].data_ptr()
    assert len(sample.select([], [])) == 6


def test_slices_and_chunks_are_views_and_concat_is_new_memory(sample: DataProto) -> None:
    whole = DataProto.concat([sample])
    sample.slice(2, 4).batch["a"].fill_(0)
    sample.chunk(2)[1].batch["a"].fill_(7)
    assert sample.batch["a"].tolist() == [0, 1, 0, 7, 7, 7]
    whole.non_tensor_batch["s"][0] = "changed"
    assert whole.batch["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sample.non_tensor_batch["s"][0] == "s0"


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
    assert data.get_data_info() == repr(data)
    assert repr(DataProto()) == "DataProto(rows=0)"


def test_print_size_logs(sample: DataProto, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="protocol.data_proto"):
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
        "batch['a']: at 3: tensor(3) here, tensor(9) there",
        "batch['b']: float32 (6, 2) here, float32 (6,) there",
        "non_tensor_batch['s']: only here",
        "non_tensor_batch['new']: only there",
        "meta_info['m']: 1 here, 2 there",
    ]


def test_two_equal_signs_compare_batches_and_rows_by_their_values(sample: DataProto) -> None:
    twin, other = copy.deepcopy(sample), sample.repeat(2)
    assert twin in [other, sample]
    assert sample[1] == twin[1]
    assert sample[1] != twin[2]
    assert sample not in (1, None, {"a": 1}, sample[1], other)


# In place


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
    with pytest.raises(MissingKeyError):
        sample.rename("nope", "x")
    for old, new in (("b", "z"), ("bz", "x"), ("bb", "cd"), ("bz", "cc")):
        with pytest.raises(ConflictError, match="as many keys, each once, and none taken"):
            sample.rename([*old], [*new])
    assert list(sample.batch.keys()) == ["b", "z"]


def test_what_is_popped_or_renamed_is_gone_from_the_tensordict_that_one_has(
    sample: DataProto,
) -> None:
    held = sample.batch
    sample.pop(["a"])
    sample.rename("b", "c")
    assert [*held.keys()] == ["c"]
    held.lock_()  # then it stays as it is
    sample.rename("c", "d")
    assert ([*held.keys()], [*sample.batch.keys()]) == (["c"], ["d"])


def test_reorder_padding_and_to_work_in_place(sample: DataProto) -> None:
    assert sample.reorder(torch.tensor([5, 4, 3, 2, 1, 0])) is None
    assert sample.batch["a"].tolist() == [5, 4, 3, 2, 1, 0]
    assert sample.non_tensor_batch["s"][0] == "s5"
    assert sample.padding(2) is None
    sample.padding(1, "first")
    assert sample.batch["a"].tolist() == [5, 4, 3, 2, 1, 0, 0, 0, 5]
    assert len(sample) == len(sample.non_tensor_batch["s"]) == 9
    assert sample.to("cpu") is sample
    assert sample.batch.device == sample.chunk(3)[0].batch.device == torch.device("cpu")


OPERATIONS: dict[str, Callable[[DataProto], Any]] = {
    "index": lambda data: data[list(range(len(data)))[::-1]],
    "slice": lambda data: data.slice(0, None, 2),
    "rows": list,
    "select": lambda data: data.select(),
    "deepcopy": lambda data: data.select(deepcopy=True),
    "chunk": lambda data: data.chunk(1),
    "split": lambda data: data.split(2),
    "pad": lambda data: pad_batch(data, 3 if len(data) else 0),
    "repeat": lambda data: data.repeat(2),
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


def test_every_result_has_its_own_dicts(sample: DataProto) -> None:
    for name in OPERATIONS.keys() - {"rows", "to_tensordict", "repr", "balanced"}:
        result = OPERATIONS[name](sample)
        for batch in result if isinstance(result, list) else [result]:
            batch.meta_info["new"] = 1
            batch.batch["new"] = torch.zeros(len(batch))
            batch.non_tensor_batch["new"] = np.zeros(len(batch))
            batch.pop(["a"], ["s"])
        assert set(sample.batch.keys()) == {"a", "b"}, name
        assert (sample.non_tensor_batch.keys(), sample.meta_info) == ({"s"}, {"m": 1}), name


# Combine


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
    for cut in (lambda: sample.chunk(0), lambda: sample.balanced_chunk(0, [1] * 6)):
        with pytest.raises(ChunkError, match="at least one chunk; got 0"):
            cut()


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
    other.batch["a"] = other.batch["b"]
    with pytest.raises(BatchError, match=r"batch\['a'\]: .*int64 \(6,\)', 'float32 \(6, 2\)"):
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
        assert whole.non_tensor_batch["s"].dtype == object
        assert whole.meta_info.get("metrics", {}).keys() == (
            empty.meta_info.get("metrics", {}).keys()
        )
    assert len(DataProto.concat([empty, empty])) == 0
    columns_of = DataProto.concat([DataProto(), sample[:0]])
    assert (set(columns_of.batch.keys()), len(columns_of)) == ({"a", "b"}, 0)
    both = [select_keys(shard, ["a"]) for shard in (empty, sample)]
    assert DataProto.concat(both).batch["a"].tolist() == sample.batch["a"].tolist()  # type: ignore[arg-type]


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


def test_union_takes_what_both_have_if_it_is_equal(sample: DataProto) -> None:
    twin = copy.deepcopy(sample)
    twin.batch["new"] = torch.full((6,), NAN)
    both = sample.union(twin).union(copy.deepcopy(twin))
    assert set(both.batch.keys()) == {"a", "b", "new"}
    twin.batch["a"][2] = 7
    with pytest.raises(ConflictError, match=r"^`a` in .* are not the same object\. at 2: "):
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
    assert words.batch is None
    assert DataProto(meta_info={"k": 2}).union(sample).meta_info == {"m": 1, "k": 2}


def test_some_columns_and_lists_of_equal_length_are_cut_and_other_rows_repeated() -> None:
    lists = {"l": [[1, 2, 3, 4], [5, 6, 7, 8]], "t": ["ab", "cd"]}
    tensors = {"x": torch.arange(1, 9).view(2, 4), "q": torch.arange(2)}
    data = DataProto.from_dict(tensors, lists)
    cut = data.unfold_column_chunks(2, ["x", "l"])
    assert cut.non_tensor_batch["l"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert cut.batch["x"].tolist() == cut.non_tensor_batch["l"].tolist()
    assert cut.non_tensor_batch["t"].tolist() == ["ab", "ab", "cd", "cd"]
    assert cut.batch["q"].tolist() == [0, 0, 1, 1]
    with pytest.raises(BatchError, match=r"'x' is int64 \(2, 4\).* n_split=3"):
        data.unfold_column_chunks(3, ["x"])
    for rows in ([[1, 2], [1]], [[1], [2]]):
        with pytest.raises(BatchError, match="n_split=2 equal parts"):
            DataProto.from_dict(None, {"l": rows}).unfold_column_chunks(2, ["l"])


def test_balanced_chunk_balances_weights(sample: DataProto) -> None:
    shards, inverse = sample.balanced_chunk(2, torch.tensor([9, 1, 1, 1, 5, 1]))
    assert [shard.batch["a"].tolist() for shard in shards] == [[0], [1, 2, 3, 4, 5]]
    assert DataProto.concat(shards).select_idxs(inverse).diff(sample) == []
    for weights in ([1], [1, 1, 1, 1, 1, -1], [1, 1, 1, 1, 1, NAN]):
        with pytest.raises(BatchError, match="one weight >= 0 for each of 6 rows"):
            sample.balanced_chunk(2, weights)


def test_group_by_keeps_rows_in_order_and_rows_of_nan_are_one_group() -> None:
    objects = columns.as_object_array([NAN, "x", np.float32("nan"), NAN])
    data = DataProto.from_dict({"t": torch.tensor([1.0, NAN, NAN, 1.0])}, {"o": objects})
    assert {key: len(rows) for key, rows in data.group_by("t").items()} == {1.0: 2, math.nan: 2}
    assert data.group_by("o")[math.nan].batch["t"].isnan().tolist() == [False, True, False]
    with pytest.raises(MissingKeyError):
        data.group_by("nope")
    with pytest.raises(BatchError, match="one value per row"):
        DataProto.from_dict({"m": torch.zeros(2, 2)}).group_by("m")


def test_make_iterator_goes_in_order_or_shuffles_by_seed_and_gives_copies(
    sample: DataProto,
) -> None:
    def run(**kwargs: Any) -> list[list[int]]:
        return [batch.batch["a"].tolist() for batch in sample.make_iterator(3, 2, **kwargs)]

    assert run() == run(seed=1) == [[0, 1, 2], [3, 4, 5]] * 2
    shuffled = run(seed=1, dataloader_kwargs={"shuffle": True})
    assert shuffled == [[0, 4, 5], [1, 2, 3], [1, 0, 4], [3, 2, 5]]  # what veRL 0.9.1 gives
    dropping = sample.make_iterator(4, 1, dataloader_kwargs={"drop_last": True})
    assert [len(batch) for batch in dropping] == [4]
    for batch in sample.make_iterator(3, 2):
        batch.batch["a"].zero_()
        batch.meta_info["m"] = 2
    assert (int(sample.batch["a"].sum()), sample.meta_info) == (15, {"m": 1})


def test_tensors_with_a_graph_and_sparse_ones_may_be_anywhere_in_a_batch(
    sample: DataProto,
) -> None:
    graph = torch.ones(2, requires_grad=True) * 2
    sample.meta_info.update(deep={"x": [graph]}, inside=SimpleNamespace(graph=graph))
    sample.meta_info["sparse"] = torch.eye(2).to_sparse()
    sample.non_tensor_batch["o"] = columns.as_object_array([{"x": graph}] * 6)
    for twin in (copy.deepcopy(sample), sample.select(deepcopy=True), detach_batch(sample)):
        assert isinstance(twin, DataProto)
        assert twin.diff(sample) == []
        for tensor in (twin.meta_info["deep"]["x"][0], twin.meta_info["inside"].graph):
            assert (tensor.is_leaf, tensor.requires_grad) == (True, True)
            assert tensor.data_ptr() != graph.data_ptr()
        assert DataProto.concat([sample, twin]).meta_info.keys() == sample.meta_info.keys()
        assert sample.union(twin).diff(sample) == []
    twin.meta_info["sparse"] = (2 * torch.eye(2)).to_sparse()
    assert twin.diff(sample)[0].startswith("meta_info['sparse']: ")
    with pytest.raises(ConflictError, match="`sparse` in the meta_info of the two batches"):
        sample.union(twin)
