"""What the functions on one column promise."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol import columns
from protocol.errors import BatchError, BatchTypeError, RowCountError, RowIndexError
from protocol.indices import normalize_index
from tests.protocol.conftest import DTYPES, LAYOUTS, make_array, make_column

KINDS = [*LAYOUTS, "numbers", "strings", "objects"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(rows: int, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return make_column(rows, kind, dtype) if kind in LAYOUTS else make_array(rows, kind)


def as_list(column: Any) -> list[Any]:
    """The rows as Python values, read without the code under test."""
    if isinstance(column, torch.Tensor) and column.is_nested:
        return [row.tolist() for row in column.unbind()] if column.size(0) else []
    return column.tolist()


def same(a: object, b: object) -> bool:
    return repr(a) == repr(b)  # NaN and arrays included


@every_kind
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_split_and_cat_are_inverse(kind: str, rows: int) -> None:
    column = make(rows, kind)
    parts = columns.split(column, [0, rows // 2, rows - rows // 2, 0])
    assert [columns.rows(part) for part in parts] == [0, rows // 2, rows - rows // 2, 0]
    assert columns.equal(columns.cat(parts), column)
    assert same(as_list(columns.cat(parts)), as_list(column))


@every_kind
def test_take_agrees_with_a_list_of_rows(kind: str) -> None:
    column, index = make(5, kind), [3, 0, 0, 4]
    rows = as_list(column)
    assert same(as_list(columns.take(column, torch.tensor(index))), [rows[i] for i in index])
    assert columns.rows(columns.take(column, torch.tensor([], dtype=torch.int64))) == 0


@every_kind
def test_slice_rows_agrees_with_a_list_of_rows(kind: str) -> None:
    column = make(5, kind)
    for bounds in [(0, 5, 1), (1, 3, 1), (2, 2, 1), (0, 5, 2), (1, 4, 3)]:
        assert same(
            as_list(columns.slice_rows(column, *bounds)), as_list(column)[slice(*bounds)]
        ), bounds


@every_kind
def test_repeat_agrees_with_a_list_of_rows(kind: str) -> None:
    column = make(3, kind)
    rows = as_list(column)
    assert same(as_list(columns.repeat(column, 2, False)), rows * 2)
    assert same(as_list(columns.repeat(column, 2, True)), [r for r in rows for _ in range(2)])
    assert same(as_list(columns.repeat(column, [2, 0, 1], True)), [rows[0], rows[0], rows[2]])
    assert columns.rows(columns.repeat(column, 0, True)) == 0


@every_kind
def test_row_is_one_row(kind: str) -> None:
    column = make(4, kind)
    row = columns.row(column, 2)
    assert same(row.tolist() if isinstance(row, torch.Tensor) else row, as_list(column)[2]) or (
        np.array_equal(row, as_list(column)[2])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_taken_repeated_joined_and_compared(dtype: torch.dtype) -> None:
    column = make_column(4, "plain", dtype)
    assert columns.equal(columns.take(column, torch.arange(4)), column)
    assert columns.equal(columns.repeat(column, 1, True), column)
    assert columns.equal(columns.cat(columns.split(column, [1, 3])), column)
    other = make_column(4, "plain", dtype, seed=1)
    assert columns.equal(column, other) is (as_list(column) == as_list(other))


@pytest.mark.parametrize("kind", ["plain", "strided", "jagged", "numbers", "objects"])
def test_cat_of_one_column_is_new_memory(kind: str) -> None:
    column = make(4, kind)
    copy = columns.cat([column])
    if isinstance(column, np.ndarray):
        assert not np.shares_memory(copy, column)
    else:
        old, new = (c.values() if c.is_nested else c for c in (column, copy))
        assert old.data_ptr() != new.data_ptr()


@pytest.mark.parametrize("kind", ["plain", "strided", "jagged", "jagged2"])
def test_split_gives_views(kind: str) -> None:
    column = make(4, kind)
    part = columns.split(column, [1, 3])[0]
    whole, part = (c.values() if c.is_nested else c for c in (column, part))
    assert whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


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
        (make_column(2, "jagged", torch.float32), make_column(2, "jagged2", torch.float32)),
    ],
)
def test_cat_names_the_shard_that_does_not_fit(a: columns.Column, b: columns.Column) -> None:
    with pytest.raises(BatchError, match=r"shard 0 has .* and shard 2 has "):
        columns.cat([a, a, b])


def test_cat_joins_strings_of_different_width() -> None:
    joined = columns.cat([np.array(["a"]), np.array(["bcd"])])
    assert joined.tolist() == ["a", "bcd"]


def test_cat_of_nothing_and_bad_sizes_are_refused() -> None:
    with pytest.raises(BatchError, match="zero columns"):
        columns.cat([])
    with pytest.raises(RowCountError, match=r"sum to 3 rows; got \[1, 1\]"):
        columns.split(torch.zeros(3), [1, 1])
    with pytest.raises(BatchError, match="one count"):
        columns.repeat(torch.zeros(3), [1, 2], True)
    with pytest.raises(BatchError, match="at least 0"):
        columns.repeat(torch.zeros(3), -1, True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_rows_of_a_strided_nested_tensor_may_differ_in_several_dims() -> None:
    rows = [torch.ones(2, 3), torch.zeros(3, 4), torch.ones(1, 5)]
    column = torch.nested.nested_tensor(rows)
    taken = columns.take(column, torch.tensor([2, 0]))
    assert taken.layout is torch.strided
    assert as_list(taken) == [[[1.0] * 5], [[1.0] * 3] * 2]
    assert columns.equal(columns.cat(columns.split(column, [1, 2])), column)
    assert not columns.equal(column, columns.take(column, torch.tensor([0, 1, 0])))
    assert columns.nbytes(column) == 4 * (6 + 12 + 5)
    assert columns.equal(columns.row(column, 1), rows[1])
    assert columns.rows(columns.cat(columns.split(column, [0, 3])[:1])) == 0
    jagged = columns.from_rows([torch.ones(2, 3), torch.zeros(1, 3)])
    assert columns.equal(torch.nested.nested_tensor([*jagged.unbind()]), jagged)


def test_from_rows_finds_the_ragged_dim_or_is_told() -> None:
    found = columns.from_rows([torch.zeros(3, 2), torch.zeros(3, 5)])
    assert columns.describe(found) == "float32 jagged (2, 3, *)"
    told = columns.from_rows([torch.zeros(3, 2), torch.zeros(3, 2)], ragged_idx=2)
    assert columns.describe(told) == "float32 jagged (2, 3, *)"
    for rows in (
        [],
        [torch.zeros(1), torch.zeros(1).int()],
        [torch.zeros(1, 2), torch.zeros(2, 1)],
    ):
        with pytest.raises(BatchError):
            columns.from_rows(rows)


def test_an_object_array_of_equal_arrays_stays_one_dimensional() -> None:
    array = columns.as_object_array([np.arange(2), np.arange(2)])
    assert array.shape == (2,)
    assert columns.take(array, torch.tensor([1, 1, 0])).shape == (3,)
    assert columns.cat([array, array]).shape == (4,)
    assert columns.repeat(array, 2, True).shape == (4,)


@given(st.data())
def test_every_index_form_agrees_with_torch(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 6))
    column = torch.arange(rows)
    positions = data.draw(st.lists(st.integers(-rows, rows - 1), max_size=5)) if rows else []
    mask = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    bound = st.none() | st.integers(-9, 9)
    piece = slice(data.draw(bound), data.draw(bound), data.draw(st.none() | st.integers(1, 3)))
    indices: list[Any] = [positions, torch.tensor(positions, dtype=torch.int32), piece]
    indices += [np.array(positions, dtype=np.int16), torch.tensor(mask, dtype=torch.bool)]
    indices += [np.array(mask, dtype=bool), *([mask] if rows else [])]
    for index in indices:
        at = normalize_index(index, rows)
        if not isinstance(at, slice):
            assert at.dtype == torch.int64
        expected = column.numpy()[index] if isinstance(index, np.ndarray) else column[index]
        assert column[at].tolist() == expected.tolist(), index


def test_a_slice_may_go_backwards() -> None:
    at = normalize_index(slice(None, None, -2), 5)
    assert isinstance(at, torch.Tensor)
    assert at.tolist() == [4, 2, 0]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 3], RowIndexError, "index 3 is out of range for a batch of 3 rows"),
        ([-4], RowIndexError, "index -4"),
        (torch.tensor([True]), RowIndexError, "3 rows, 1 entries"),
        ([1.5], BatchTypeError, "integers or booleans"),
        (torch.tensor([1], dtype=torch.uint8), BatchTypeError, r"\.bool\(\)"),
        ([[1]], BatchTypeError, "integers or booleans"),
        ([None], BatchTypeError, "integers or booleans"),
        ((0, 1), BatchTypeError, "not supported"),
        ("a", BatchTypeError, "not supported"),
    ],
)
def test_a_wrong_index_says_what_is_wrong(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize_index(index, 3)


NAN = float("nan")
LOOP: list[Any] = [1]
LOOP.append(LOOP)
LOOP2: list[Any] = [1]
LOOP2.append(LOOP2)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (NAN, float("nan"), True),
        ({"x": [NAN, (1, None)]}, {"x": [float("nan"), (1, None)]}, True),
        (np.array([NAN, 1.0]), np.array([float("nan"), 1.0]), True),
        (torch.tensor([NAN, 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([complex(NAN, 1)]), torch.tensor([complex(NAN, 1)]), True),
        (columns.as_object_array([None, NAN, np.arange(2)]),) * 2 + (True,),
        (LOOP, LOOP2, True),
        ([1, 2], (1, 2), False),
        (1, "1", False),
        (torch.ones(2), torch.ones(2).int(), False),
        (torch.ones(2), np.ones(2), False),
        (torch.ones(2), torch.ones(3), False),
        (np.array(["a"]), np.array(["a"], dtype="<U9"), True),
        (np.arange(2), np.arange(2.0), False),
        ({"a": 1}, {"b": 1}, False),
        (torch.zeros(0, 2), torch.zeros(0, 3), False),
        (torch.ones(2), torch.ones(1).expand(2), True),
    ],
)
def test_equal(a: object, b: object, expected: bool) -> None:
    assert columns.equal(a, b) is expected
    assert columns.equal(b, a) is expected


def test_equal_does_not_trust_an_object_that_cannot_be_compared() -> None:
    class Odd(SimpleNamespace):
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

    assert not columns.equal(Odd(x=1), Odd(x=2))
    assert columns.equal(Odd(x=np.ones(2)), Odd(x=np.ones(2)))


class NoEq:
    def __init__(self, value: object) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


@pytest.mark.parametrize("kind", [NoEq, Slotted])
def test_objects_whose_class_has_no_eq_are_equal_if_what_is_pickled_of_them_is(kind: Any) -> None:
    lock = threading.Lock()
    assert columns.equal(kind([1.0, float("nan")]), kind([1.0, float("nan")]))
    assert columns.equal(
        kind({"t": torch.ones(2)}), pickle.loads(pickle.dumps(kind({"t": torch.ones(2)})))
    )
    assert columns.equal(kind(lock), kind(lock))
    assert not columns.equal(kind(1), kind(2))
    assert not columns.equal(kind(lock), kind(threading.Lock()))
    assert not columns.equal(NoEq(1), Slotted(1))
    loops = [kind(None), kind(None)]
    for one in loops:
        one.value = one
    assert columns.equal(*loops)


def test_masks_and_sparse_tensors_count_in_equality() -> None:
    masked = np.ma.array([1, 2], mask=[False, True])
    assert columns.equal(masked, np.ma.array([1, 3], mask=[False, True]))
    assert not columns.equal(masked, np.ma.array([1, 2]))
    sparse = torch.eye(2).to_sparse()
    assert columns.equal(sparse, torch.eye(2).to_sparse())
    assert not columns.equal(sparse, (2 * torch.eye(2)).to_sparse())
    assert not columns.equal(sparse, torch.eye(2))


def test_jagged_columns_that_split_rows_differently_differ() -> None:
    values = torch.arange(4.0)
    a, b = (
        torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets))
        for offsets in ([0, 1, 4], [0, 2, 4])
    )
    assert not columns.equal(a, b)


def test_a_value_without_rows_is_no_column() -> None:
    with pytest.raises(RowCountError, match="batch dim"):
        columns.rows(torch.tensor(1))


def test_nbytes_counts_elements() -> None:
    assert columns.nbytes(torch.zeros(2, 3)) == 24
    assert columns.nbytes(np.zeros(2)) == 16
    column = torch.nested.nested_tensor_from_jagged(torch.zeros(5), torch.tensor([0, 2, 5]))
    assert columns.nbytes(column) == 20
