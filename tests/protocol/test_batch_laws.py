"""Laws that hold for every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol import columns
from protocol.data_proto import DataProto
from tests.protocol.conftest import batches, make_column

Unchanged = Callable[[DataProto, Callable[[DataProto], Any]], Any]


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
