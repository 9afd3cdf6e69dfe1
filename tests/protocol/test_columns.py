"""What one column does that a batch of rows does not show, and which rows an index names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from protocol import columns
from protocol.checks import normalize_index
from protocol.data_proto import DataProto
from protocol.errors import BatchError, BatchTypeError, RowCountError, RowIndexError
from protocol.tensordict_utils import chunk_tensordict
from tests.protocol.conftest import make_column


@pytest.mark.parametrize("kind", ["plain", "strided", "jagged", "jagged2"])
def test_parts_are_views_and_cat_of_one_column_is_new_memory(kind: str) -> None:
    column = make_column(4, kind, torch.float32)
    whole, part, copy = (
        (c.values() if c.is_nested else c).untyped_storage().data_ptr()
        for c in (column, columns.split(column, [1, 3])[0], columns.cat([column]))
    )
    assert whole == part != copy


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float8_e4m3fn)),
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (np.zeros(2), np.array(["a", "b"])),
        (np.zeros(2, "i8"), np.zeros(2, "m8[s]")),
        (np.zeros(2, "i8"), np.zeros(2, "M8[s]")),
        (np.zeros(2), np.zeros(2, [("a", "i4")])),
        (np.zeros((2, 1)), np.zeros(2)),
        (torch.zeros(2), np.zeros(2)),
        (make_column(2, "jagged", torch.float32), torch.zeros(2, 3, 2)),
    ],
)
def test_columns_that_cannot_be_joined_are_described(a: columns.Column, b: columns.Column) -> None:
    for column in (a, b):
        with pytest.raises(BatchError, match="cannot be joined: ") as caught:
            columns.cat([a, b] if column is a else [b, a])
        assert columns.describe(column) in str(caught.value)


def test_what_cannot_be_joined_or_cut_is_refused() -> None:
    assert columns.cat([np.array(["a"]), np.array(["bcd"])]).tolist() == ["a", "bcd"]
    with pytest.raises(BatchError, match="zero columns"):
        columns.cat([])
    with pytest.raises(BatchError, match="agree in all dims but"):
        columns.cat([make_column(2, kind, torch.float32) for kind in ("jagged", "jagged2")])
    with pytest.raises(RowCountError, match=r"sum to 3 rows; got \[1, 1\]"):
        columns.split(torch.zeros(3), [1, 1])
    with pytest.raises(RowCountError, match="0-dim"):
        columns.rows(torch.tensor(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_of_strided_layout_are_no_columns() -> None:
    column = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(3, 4)])
    for build in (
        lambda: DataProto.from_dict({"n": column}),
        lambda: DataProto(TensorDict({"n": column}, [2])).chunk(2),
        lambda: chunk_tensordict(TensorDict({"n": column}, [2]), 2),
    ):
        with pytest.raises(BatchTypeError, match="a dense or jagged tensor; got"):
            build()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 3], RowIndexError, "index 3 is out of range for a batch of 3 rows"),
        ([-4], RowIndexError, "index -4"),
        (torch.tensor([True]), RowIndexError, "3 rows, 1 entries"),
        (torch.tensor([1], dtype=torch.uint8), BatchTypeError, r"\.bool\(\)"),
        (torch.ones(2, 2, dtype=torch.bool), BatchTypeError, r"got \(2, 2\)"),
        ([[1]], BatchTypeError, "integers or booleans"),
    ],
)
def test_a_wrong_index_says_what_is_wrong(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize_index(index, 3)
