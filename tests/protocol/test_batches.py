"""One set of functions for both kinds of batch, and the sizes of shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import DataProto
from protocol.batches import (
    Batch,
    balanced_sizes,
    batch_rows,
    concat_batches,
    copy_batch,
    equal_sizes,
    is_batch,
    lend_rows,
    pad_batch,
    select_keys,
    slice_batch,
    split_batch,
    union_batches,
)
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)
from protocol.shards import padded_sizes
from protocol.tensordict_utils import get, get_tensordict
from protocol.wire import read_as

Make = Callable[[int], Batch]


def proto(rows: int) -> DataProto:
    return DataProto.from_dict(
        {"ids": torch.arange(rows)}, {"text": [str(i) for i in range(rows)]}, {"k": 1}
    )


def tensordict(rows: int) -> Batch:
    return get_tensordict(
        {"ids": torch.arange(rows), "text": [str(i) for i in range(rows)]}, {"k": 1}
    )


def ids(batch: Batch) -> list[int]:
    """The row numbers, after checking that tensors and objects still agree about them."""
    if isinstance(batch, DataProto):
        assert batch.batch is not None
        found, text = batch.batch["ids"].tolist(), list(batch.non_tensor_batch["text"])
    else:
        found, text = batch["ids"].tolist(), get(batch, "text")
    assert text == [str(i) for i in found]
    return list(found)


both = pytest.mark.parametrize("make", [proto, tensordict])


class TestSizes:
    @given(rows=st.integers(0, 100), parts=st.integers(1, 12))
    @settings(deadline=None)
    def test_balanced_sizes_sum_up_and_differ_by_at_most_one(self, rows: int, parts: int) -> None:
        sizes = balanced_sizes(rows, parts)
        assert sum(sizes) == rows
        assert len(sizes) == parts
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1

    @given(rows=st.integers(0, 100), parts=st.integers(1, 12))
    @settings(deadline=None)
    def test_equal_sizes_are_equal_or_refused(self, rows: int, parts: int) -> None:
        if rows % parts:
            with pytest.raises(ChunkError, match=f"DataProto {rows} and chunk {parts}"):
                equal_sizes(rows, parts)
        else:
            assert equal_sizes(rows, parts) == [rows // parts] * parts

    @given(rows=st.integers(0, 100), parts=st.integers(1, 12))
    @settings(deadline=None)
    def test_padded_sizes_are_equal_and_waste_less_than_one_row_per_part(
        self, rows: int, parts: int
    ) -> None:
        sizes = padded_sizes(rows, parts)
        assert len(set(sizes)) == 1
        assert 0 <= sum(sizes) - rows < parts

    @pytest.mark.parametrize("sizes", [equal_sizes, balanced_sizes, padded_sizes])
    def test_there_must_be_a_part(self, sizes: Callable[[int, int], list[int]]) -> None:
        with pytest.raises(ChunkError, match="at least one chunk; got 0"):
            sizes(4, 0)


def test_only_batches_are_batches() -> None:
    assert is_batch(proto(1))
    assert is_batch(tensordict(1))
    assert not any(map(is_batch, [None, 3, [proto(1)], {"ids": torch.zeros(1)}]))


@both
class TestBothKinds:
    def test_rows_are_counted_and_sliced(self, make: Make) -> None:
        assert batch_rows(make(5)) == 5
        assert ids(slice_batch(make(5), 1, 3)) == [1, 2]
        assert ids(slice_batch(make(5), 5, 5)) == []

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2)])
    def test_rows_that_are_not_there_are_refused(self, make: Make, start: int, stop: int) -> None:
        with pytest.raises(RowCountError, match=f"rows {start}:{stop} .* 5 rows"):
            slice_batch(make(5), start, stop)

    @pytest.mark.parametrize("sizes", [[2, 0, 3], [5], [0, 0, 5]])
    def test_concatenating_a_split_gives_the_batch(self, make: Make, sizes: list[int]) -> None:
        parts = split_batch(make(5), sizes)
        assert [batch_rows(part) for part in parts] == sizes
        assert ids(concat_batches(parts)) == [0, 1, 2, 3, 4]

    def test_zero_rows_split_and_concatenate(self, make: Make) -> None:
        assert ids(concat_batches(split_batch(make(0), [0, 0]))) == []

    def test_sizes_must_sum_to_the_rows(self, make: Make) -> None:
        with pytest.raises(RowCountError, match="5 rows"):
            split_batch(make(5), [2, 2])

    def test_padding_repeats_the_last_row_in_a_new_batch(self, make: Make) -> None:
        batch = make(2)
        assert ids(pad_batch(batch, 3)) == [0, 1, 1, 1, 1]
        assert batch_rows(batch) == 2
        assert ids(pad_batch(make(0), 0)) == []

    @pytest.mark.parametrize(("rows", "count"), [(0, 1), (2, -1)])
    def test_padding_needs_a_row_to_repeat(self, make: Make, rows: int, count: int) -> None:
        with pytest.raises(RowCountError, match=f"{rows} rows cannot be padded by {count}"):
            pad_batch(make(rows), count)

    @pytest.mark.parametrize("key", ["ids", "text"])
    def test_columns_are_selected_by_key(self, make: Make, key: str) -> None:
        batch = select_keys(make(2), iter([key]))
        other = ({"ids", "text"} - {key}).pop()
        assert batch_rows(batch) == 2
        with pytest.raises(MissingKeyError, match=other):
            select_keys(batch, [other])

    def test_a_union_has_the_columns_of_both(self, make: Make) -> None:
        left, right = select_keys(make(2), ["ids"]), select_keys(make(2), ["text"])
        assert ids(union_batches(left, right)) == [0, 1]

    def test_a_union_refuses_differing_values_and_rows(self, make: Make) -> None:
        with pytest.raises(ConflictError, match="ids"):
            union_batches(slice_batch(make(3), 0, 2), slice_batch(make(3), 1, 3))
        with pytest.raises(RowCountError, match=r"2.*3"):
            union_batches(make(2), make(3))


def test_missing_keys_of_any_kind_are_named() -> None:
    keys: list[Any] = ["ids", 1, None]
    with pytest.raises(MissingKeyError, match=r"keys \[1, None\] not in batch, which has "):
        select_keys(proto(1), keys)


def test_kinds_are_not_mixed() -> None:
    with pytest.raises(BatchTypeError, match=r"\['DataProto', 'TensorDict'\]"):
        concat_batches([proto(1), tensordict(1)])
    with pytest.raises(BatchTypeError, match="DataProto and TensorDict"):
        union_batches(proto(1), tensordict(1))


def test_there_must_be_something_to_concatenate() -> None:
    with pytest.raises(BatchError, match="at least one"):
        concat_batches([])


def lender() -> DataProto:
    """Its second object column holds one list twice, which only a pickler knows for the same."""
    arrays = {"n": np.arange(4), "s": [np.zeros(2) for _ in range(4)], "l": [[0]] * 4}
    return DataProto.from_dict({"x": torch.zeros(4)}, arrays, {"k": [1]})


def test_rows_lent_as_a_view_share_numbers_and_nobody_can_write_into_their_arrays() -> None:
    data = lender()
    with read_as("view"):
        seen = lend_rows(data, 0, 4)
    arrays = seen.non_tensor_batch
    assert seen.batch["x"].data_ptr() == data.batch["x"].data_ptr()
    assert arrays["n"].ctypes.data == data.non_tensor_batch["n"].ctypes.data
    assert arrays["s"][0].ctypes.data == data.non_tensor_batch["s"][0].ctypes.data
    for array in (*arrays.values(), arrays["s"][0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    arrays["l"][0].append(7)
    seen.meta_info["k"].append(7)
    assert data.diff(lender()) == []
    data.non_tensor_batch["n"][0] = 7  # the lender's own stay as they were


@pytest.mark.parametrize("how", ["own", "join"])
def test_what_is_no_column_of_numbers_is_private_to_who_joins_lent_rows(how: Any) -> None:
    data = lender()
    with read_as(how):
        seen = lend_rows(data, 1, 4)
    seen.non_tensor_batch["s"][0].fill(7)
    seen.non_tensor_batch["l"][0].append(7)
    seen.meta_info["k"].append(7)
    assert data.diff(lender()) == []


@pytest.mark.parametrize("make", [proto, tensordict])
def test_a_batch_without_rows_decides_nothing_of_the_whole(make: Make) -> None:
    for empty in (slice_batch(make(2), 0, 0), make(0), select_keys(make(0), ["ids", "none"])):
        assert ids(concat_batches([empty, make(3), empty])) == [0, 1, 2]
    odd = get_tensordict({"other": torch.zeros(0)})
    assert ids(concat_batches([odd, tensordict(2)])) == [0, 1]


@pytest.mark.parametrize("make", [proto, tensordict])
def test_a_union_of_batches_changes_neither(make: Make) -> None:
    left, right = select_keys(make(2), ["ids"]), make(2)
    assert ids(union_batches(left, right)) == [0, 1]
    kept = left.batch if isinstance(left, DataProto) else left
    assert kept is not None
    assert [*kept.keys()] == ["ids"]


def test_a_copy_of_shared_objects_has_no_graph() -> None:
    graph = torch.ones(2, requires_grad=True) * 2
    td = get_tensordict({"s": [{"x": graph}, None]}, {"k": [graph]})
    twin = copy_batch(td)
    for copied in (get(twin, "k")[0], get(twin, "s")[0]["x"]):
        assert (copied.is_leaf, copied.tolist()) == (True, [2, 2])
        assert copied.data_ptr() != graph.data_ptr()
