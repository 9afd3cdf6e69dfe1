"""One set of functions for both kinds of batch, the sizes of shards, and veRL's functions on whole
batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from protocol import (
    BatchData,
    DataProto,
    collate_fn,
    fold_batch_dim,
    pad_dataproto_to_divisor,
    unfold_batch_dim,
    unpad_dataproto,
)
from protocol.batches import (
    Batch,
    batch_rows,
    concat_batches,
    copy_batch,
    lend_rows,
    pad_batch,
    select_keys,
    slice_batch,
    split_batch,
    union_batches,
)
from protocol.checks import balanced_sizes, equal_sizes, padded_sizes
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)
from protocol.tensordict_utils import get, get_tensordict
from protocol.wire import read_as
from tests.protocol.test_future import future

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
        found, text = batch.batch["ids"].tolist(), list(batch.non_tensor_batch["text"])
    else:
        found, text = batch["ids"].tolist(), get(batch, "text")
    assert text == [str(i) for i in found]
    return list(found)


both = pytest.mark.parametrize("make", [proto, tensordict])


@given(rows=st.integers(0, 100), parts=st.integers(1, 12))
def test_shards_have_the_sizes_that_their_names_say(rows: int, parts: int) -> None:
    sizes = balanced_sizes(rows, parts)
    assert (sum(sizes), len(sizes)) == (rows, parts)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    padded = padded_sizes(rows, parts)
    assert (len(padded), len(set(padded))) == (parts, 1)
    assert 0 <= sum(padded) - rows < parts
    if rows % parts:
        with pytest.raises(ChunkError, match=f"DataProto {rows} and chunk {parts}"):
            equal_sizes(rows, parts)
    else:
        assert equal_sizes(rows, parts) == sizes == padded
    for function in (equal_sizes, balanced_sizes, padded_sizes):
        with pytest.raises(ChunkError, match="at least one chunk; got 0"):
            function(rows, 0)


@both
class TestBothKinds:
    def test_rows_are_counted_and_sliced(self, make: Make) -> None:
        assert batch_rows(make(5)) == 5
        assert ids(slice_batch(make(5), 1, 3)) == [1, 2]
        assert ids(slice_batch(make(5), 5, 5)) == []
        for start, stop in ((-1, 2), (0, 6), (3, 2)):
            with pytest.raises(RowCountError, match=f"rows {start}:{stop} .* 5 rows"):
                slice_batch(make(5), start, stop)

    def test_parts_have_the_sizes_asked_for_and_these_sum_to_the_rows(self, make: Make) -> None:
        assert [*map(ids, split_batch(make(5), [2, 0, 3]))] == [[0, 1], [], [2, 3, 4]]
        with pytest.raises(RowCountError, match="5 rows"):
            split_batch(make(5), [2, 2])

    def test_padding_repeats_the_last_row(self, make: Make) -> None:
        assert ids(pad_batch(make(2), 3)) == [0, 1, 1, 1, 1]
        assert ids(pad_batch(make(0), 0)) == []
        for rows, count in ((0, 1), (2, -1)):
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
        left, right = select_keys(make(2), ["ids"]), make(2)
        assert ids(union_batches(left, right)) == [0, 1]
        kept = left.batch if isinstance(left, DataProto) else left
        assert [*kept.keys()] == ["ids"]

    def test_a_union_refuses_differing_values_and_rows(self, make: Make) -> None:
        with pytest.raises(ConflictError, match="ids"):
            union_batches(slice_batch(make(3), 0, 2), slice_batch(make(3), 1, 3))
        with pytest.raises(RowCountError, match=r"2.*3"):
            union_batches(make(2), make(3))


def test_kinds_are_not_mixed() -> None:
    for batches in ([proto(1), tensordict(1)], [tensordict(1), proto(1)]):
        with pytest.raises(BatchTypeError, match=r"\[1\] must be of type .*DataProto"):
            concat_batches(batches)
    with pytest.raises(BatchTypeError, match="a union is of two"):
        union_batches(proto(1), tensordict(1))


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
    for array in arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    arrays["l"][0].append(7)
    arrays["s"][0].fill(7)
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


def test_a_tensordict_without_rows_decides_nothing_of_the_whole() -> None:
    odd = get_tensordict({"other": torch.zeros(0)})
    for empty in (slice_batch(tensordict(2), 0, 0), select_keys(tensordict(0), ["none"]), odd):
        assert ids(concat_batches([empty, tensordict(3), empty])) == [0, 1, 2]


def test_a_copy_of_shared_objects_has_no_graph() -> None:
    graph = torch.ones(2, requires_grad=True) * 2
    td = get_tensordict({"s": [{"x": graph}, None]}, {"k": [graph]})
    twin = copy_batch(td)
    for copied in (get(twin, "k")[0], get(twin, "s")[0]["x"]):
        assert (copied.is_leaf, copied.tolist()) == (True, [2, 2])
        assert copied.data_ptr() != graph.data_ptr()


@both
def test_what_divides_is_not_copied_and_what_is_not_there_not_removed(make: Make) -> None:
    batch: Any = make(2)
    assert pad_dataproto_to_divisor(batch, 2)[0] is unpad_dataproto(batch, 0) is batch
    with pytest.raises(RowCountError, match="rows 0:-7 are not in a batch of 2 rows"):
        unpad_dataproto(batch, 9)
    with pytest.raises(BatchError, match="at least 1; got 0"):
        pad_dataproto_to_divisor(batch, 0)


def test_collate_fn_undoes_taking_single_rows(sample: DataProto) -> None:
    collated = collate_fn(list(sample))
    assert collated.diff(sample) == ["meta_info['m']: only there"]
    with pytest.raises(BatchError, match="zero rows"):
        collate_fn([])
    with pytest.raises(MissingKeyError, match=r"batch of row 1 lacks \['b'\]"):
        collate_fn([sample[0], sample.select(["a"])[0]])
    both_kinds = (
        DataProto.from_dict({"k": torch.zeros(1)})[0],
        DataProto.from_dict(None, {"k": [1]})[0],
    )
    with pytest.raises(MissingKeyError, match="batch of row 1 "):
        collate_fn(both_kinds)


def test_unfold_undoes_fold(sample: DataProto) -> None:
    folded = fold_batch_dim(sample, 3)
    assert folded.batch["b"].shape == (3, 2, 2)
    assert folded.non_tensor_batch["s"].tolist() == [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]]
    assert unfold_batch_dim(folded).diff(sample) == []
    with pytest.raises(RuntimeError, match=r"'\[4, 1\]' is invalid"):
        fold_batch_dim(sample, 4)
    with pytest.raises(RowCountError):
        unfold_batch_dim(sample)


def test_batches_and_futures_can_be_chunked_and_lists_of_them_concatenated() -> None:
    for data in (proto(4), TensorDict({"ids": torch.arange(4)}, [4]), future(4)):
        assert BatchData(data).is_chunkable()
        assert not BatchData(data).is_concatable()
        parts = BatchData(data).chunk(2)
        assert isinstance(parts, list)
        assert [len(part) for part in parts] == [2, 2]
        assert not BatchData(parts).is_chunkable()
        assert BatchData(parts).is_concatable()
        joined = BatchData(tuple(parts)).concat()
        assert type(joined) is type(data)
        assert len(joined) == 4
    for kind in (proto(5), tensordict(5)):
        with pytest.raises(ChunkError, match="only support equal chunk"):
            BatchData(kind).chunk(2)


@pytest.mark.parametrize("data", [3, None, [], [3], [DataProto(), 3], [DataProto(), future(1)]])
def test_anything_else_is_neither_chunked_nor_concatenated(data: object) -> None:
    assert not BatchData(data).is_chunkable()
    assert not BatchData(data).is_concatable()


GATHER = """
import sys, torch, torch.distributed as dist
from protocol.batches import all_gather_data_proto
from protocol.data_proto import DataProto
from protocol.errors import BatchError
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
rows = [3, 1][rank]
jagged = torch.nested.nested_tensor_from_jagged(torch.arange(2 * rows), torch.arange(rows + 1) * 2)
data = DataProto.from_dict(
    {"j": jagged, "a": torch.full((rows, 2), rank)}, {"s": [f"{rank}.{i}" for i in range(rows)]},
    {"rank": rank},
)
all_gather_data_proto(data, dist.group.WORLD)
assert set(data.batch.keys()) == {"j", "a"}
assert data.batch["a"][:, 0].tolist() == [0, 0, 0, 1]
assert data.batch["j"].offsets().tolist() == [0, 2, 4, 6, 8]
assert data.non_tensor_batch["s"].tolist() == ["0.0", "0.1", "0.2", "1.0"]
assert data.meta_info == {"rank": rank}

data = DataProto.from_dict({"a": torch.ones(2)}, {"s": ["x", "y"]}) if rank else DataProto()
all_gather_data_proto(data, dist.group.WORLD)
assert data.batch["a"].tolist() == [1, 1] and data.non_tensor_batch["s"].tolist() == ["x", "y"]

try:
    all_gather_data_proto(DataProto.from_dict({"a": torch.zeros(1, 1 + rank)}), dist.group.WORLD)
except BatchError as error:
    assert "cannot be joined" in str(error)
else:
    raise SystemExit("not refused")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_gather_gives_every_rank_the_rows_of_all(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHER, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
