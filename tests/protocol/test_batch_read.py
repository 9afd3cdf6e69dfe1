"""What one learns from a batch, row by row, in words, and in mini-batches."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch

from protocol import columns
from protocol.data_proto import DataProto
from protocol.errors import (
    BatchError,
    BatchTypeError,
    MissingKeyError,
    RowIndexError,
)
from tests.protocol.conftest import LAYOUTS, make_column


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


def test_two_equal_signs_compare_as_equal_does(sample: DataProto) -> None:
    twin, other = copy.deepcopy(sample), sample.repeat(2)
    assert sample == twin
    assert sample != other
    assert twin in [other, sample]
    for stranger in (1, None, "x", {"a": 1}):
        assert sample != stranger
    with pytest.raises(TypeError, match="unhashable"):
        hash(sample)


def test_items_are_compared_by_their_values(sample: DataProto) -> None:
    twin = copy.deepcopy(sample)
    assert sample[1] == twin[1]
    assert sample[1] != twin[2]
    assert sample[1] != "a row"
    twin.meta_info["m"] = 2
    assert sample[1] != twin[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_iterating_gives_the_rows_that_indexing_gives(layout: str) -> None:
    column = make_column(5, layout, torch.float32)
    data = DataProto.from_dict({"x": column}, {"o": [*range(5)]}, {"m": 1})
    assert [*data] == [data[i] for i in range(5)]
    assert columns.equal([item.batch["x"] for item in data], [*column.unbind()])
    assert [*data[:0]] == []
