"""The functions on bare TensorDicts, with every kind of value that one can hold."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorData, NonTensorStack, TensorDict

from protocol import tensordict_utils as tu
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
    RowIndexError,
)

LETTERS = "abcdefghij"


def jagged(*lengths: int) -> torch.Tensor:
    return tu.nested_tensor_from_tensor_list([torch.arange(n) for n in lengths] or [torch.ones(1)])


def make(rows: int, start: int = 0) -> TensorDict:
    """Every kind of value; row i holds `start + i` in one form or another."""
    ids = range(start, start + rows)
    td = tu.get_tensordict(
        {
            "dense": torch.arange(start, start + rows).float().unsqueeze(1),
            "text": [LETTERS[i % 10] for i in ids],
            "lists": [[i] * (i % 3) for i in ids],
        },
        {"shared": {"a": [1, 2]}, "flag": True},
    )
    if rows:
        td["jagged"] = tu.nested_tensor_from_tensor_list([torch.full((i % 4,), i) for i in ids])
        td["wide"] = tu.nested_tensor_from_tensor_list(
            [torch.full((3, i % 4 + 1), i) for i in ids], ragged_idx=2
        )
    else:
        td["jagged"] = tu.index_select_tensor_dict(make(1), [])["jagged"]
        td["wide"] = tu.index_select_tensor_dict(make(1), [])["wide"]
    td["sub"] = TensorDict({"x": torch.arange(start, start + rows)}, batch_size=[rows])
    return td


def values(td: TensorDict) -> dict[str, object]:
    """Plain Python values, one list entry per row where there are rows."""
    plain: dict[str, object] = {}
    for key in map(str, td.keys()):
        value = tu.get(td, key)
        if isinstance(value, torch.Tensor):
            value = [row.tolist() for row in value.unbind()]
        plain[key] = values(value) if isinstance(value, TensorDict) else value
    return plain


def rows_of(td: TensorDict) -> list[float]:
    return [float(x) for x in td["dense"].flatten()]


class TestReading:
    def test_get_unwraps_all_but_tensors(self) -> None:
        td = make(2)
        assert tu.get(td, "text") == ["a", "b"]
        assert tu.get(td, "flag") is True
        assert tu.get(td, "dense") is td.get("dense")
        assert tu.get(td, "nope") is None
        assert tu.get(td, "nope", 3) == 3

    def test_get_non_tensor_data_leaves_stacks_as_they_are(self) -> None:
        td = make(2)
        assert tu.get_non_tensor_data(td, "flag", None) is True
        assert isinstance(tu.get_non_tensor_data(td, "text", None), NonTensorStack)
        assert tu.get_non_tensor_data(td, "nope", 3) == 3

    def test_unwrap_returns_what_is_not_wrapped(self) -> None:
        assert tu.unwrap_non_tensor_data(NonTensorData([1])) == [1]
        assert tu.unwrap_non_tensor_data(4) == 4

    def test_get_keys_shares_the_values(self) -> None:
        td = make(2)
        part = tu.get_keys(td, iter(["dense", "text"]))
        assert set(part.keys()) == {"dense", "text"}
        assert part["dense"] is td["dense"]
        assert part.batch_size == (2,)

    def test_get_keys_names_the_missing_key(self) -> None:
        with pytest.raises(MissingKeyError, match=r"key zz not in tensordict.*dense"):
            tu.get_keys(make(1), ["dense", "zz"])

    def test_pop_returns_what_get_would_and_removes_it(self) -> None:
        td = make(2)
        assert tu.pop(td, "text") == ["a", "b"]
        assert tu.pop(td, "flag") is True
        assert tu.pop(td, "text", "gone") == "gone"
        assert not {"text", "flag"} & set(td.keys())

    def test_pop_keys_removes_all_or_nothing(self) -> None:
        td = make(2)
        with pytest.raises(KeyError, match="zz"):
            tu.pop_keys(td, ["dense", "zz"])
        assert "dense" in td.keys()  # noqa: SIM118
        popped = tu.pop_keys(td, ["dense", "text", "flag"])
        assert values(popped) == {"dense": [[0.0], [1.0]], "text": ["a", "b"], "flag": True}
        assert not {"dense", "text", "flag"} & set(td.keys())

    def test_popping_no_keys_keeps_the_rows(self) -> None:
        assert tu.pop_keys(make(2), []).batch_size == (2,)


class TestRows:
    @given(rows=st.integers(0, 8), data=st.data())
    @settings(deadline=None, max_examples=30)
    def test_selected_rows_are_those_of_the_index(self, rows: int, data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(-rows, rows - 1), max_size=10)) if rows else []
        td = make(rows)
        picked = tu.index_select_tensor_dict(td, index)
        expected = [range(rows)[i] for i in index]
        assert rows_of(picked) == expected
        assert tu.get(picked, "text") == [LETTERS[i] for i in expected]
        assert tu.get(picked, "lists") == [[i] * (i % 3) for i in expected]
        assert [row.tolist() for row in picked["jagged"].unbind()] == [
            [i] * (i % 4) for i in expected
        ]
        assert [tuple(row.shape) for row in picked["wide"].unbind()] == [
            (3, i % 4 + 1) for i in expected
        ]
        assert picked["sub"]["x"].tolist() == expected
        assert tu.get(picked, "shared") == {"a": [1, 2]}

    @pytest.mark.parametrize(
        "mask", [[True, False, True], np.array([True, False, True]), torch.tensor([1, 0, 1]).bool()]
    )
    def test_a_mask_selects_rows_too(self, mask: object) -> None:
        assert rows_of(tu.index_select_tensor_dict(make(3), mask)) == [0, 2]  # type: ignore[arg-type]

    def test_a_row_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(RowIndexError, match="7"):
            tu.index_select_tensor_dict(make(3), [7])

    @pytest.mark.parametrize("index", [torch.zeros(1, 1).long(), 1, slice(0, 1)])
    def test_an_index_must_be_one_list(self, index: object) -> None:
        with pytest.raises(BatchTypeError):
            tu.index_select_tensor_dict(make(3), index)  # type: ignore[arg-type]

    @given(size=st.integers(0, 3), chunks=st.integers(1, 4))
    @settings(deadline=None, max_examples=15)
    def test_concatenating_the_chunks_gives_the_batch(self, size: int, chunks: int) -> None:
        td = make(size * chunks)
        parts = tu.chunk_tensordict(td, chunks)
        assert [part.batch_size for part in parts] == [(size,)] * chunks
        tu.assert_tensordict_eq(tu.concat_tensordict(parts), td)
        assert values(tu.concat_tensordict(parts)) == values(make(size * chunks))

    def test_chunks_share_tensors_with_the_batch(self) -> None:
        td = make(4)
        tu.chunk_tensordict(td, 2)[1]["dense"][0] = 7.0
        assert td["dense"][2] == 7.0

    @pytest.mark.parametrize("chunks", [3, 8])
    def test_rows_that_do_not_divide_are_refused(self, chunks: int) -> None:
        with pytest.raises(ChunkError, match=rf"only support equal chunk.* 4 and chunk {chunks}"):
            tu.chunk_tensordict(make(4), chunks)

    def test_less_than_one_chunk_is_refused(self) -> None:
        with pytest.raises(ChunkError, match="at least one"):
            tu.chunk_tensordict(make(4), 0)

    def test_without_batch_dim_there_are_no_rows(self) -> None:
        with pytest.raises(RowCountError, match=r"batch_size=\[\]"):
            tu.chunk_tensordict(tu.get_tensordict({}, {"a": 1}), 1)


class TestConcat:
    def test_the_first_shared_object_stays(self) -> None:
        parts = [tu.assign_non_tensor(make(1), flag=value) for value in ("x", "y")]
        assert tu.get(tu.concat_tensordict(parts), "flag") == "x"

    def test_a_shared_object_joins_a_stack_as_one_per_row(self) -> None:
        parts = [tu.get_tensordict({"a": torch.zeros(2)}) for _ in range(2)]
        tu.assign_non_tensor(parts[0], k=["x", "y"])
        tu.assign_non_tensor(parts[1], k="z")
        assert tu.get(tu.concat_tensordict(parts), "k") == ["x", "y", "z", "z"]

    @pytest.mark.parametrize("order", [1, -1])
    def test_zero_rows_add_nothing(self, order: int) -> None:
        parts = [make(0), make(3)][::order]
        assert values(tu.concat_tensordict(parts)) == values(make(3))

    def test_one_tensordict_is_copied(self) -> None:
        td = make(2)
        joined = tu.concat_tensordict([td])
        joined["dense"][0] = 7.0
        assert td["dense"][0] == 0.0

    def test_without_batch_dims_the_first_is_taken(self) -> None:
        parts = [tu.get_tensordict({}, {"m": value}) for value in (1, 2)]
        assert tu.get(tu.concat_tensordict(parts), "m") == 1
        assert tu.get(tu.concat_tensordict_with_none_bsz(parts), "m") == 1

    @pytest.mark.parametrize("concat", [tu.concat_tensordict, tu.concat_tensordict_with_none_bsz])
    def test_nothing_to_concatenate_is_refused(self, concat: object) -> None:
        with pytest.raises(BatchError, match="at least one tensordict"):
            concat([])  # type: ignore[operator]

    def test_a_batch_dim_is_refused_where_there_should_be_none(self) -> None:
        with pytest.raises(RowCountError, match=r"got \[2\]"):
            tu.concat_tensordict_with_none_bsz([make(2)])

    def test_a_batch_dim_must_be_in_all_or_none(self) -> None:
        with pytest.raises(RowCountError, match="no rows"):
            tu.concat_tensordict([make(2), tu.get_tensordict({})])

    def test_differing_keys_are_named(self) -> None:
        with pytest.raises(MissingKeyError, match=r"\['flag'\] .* shard 0 and shard 2"):
            tu.concat_tensordict([make(1), make(1), make(1).exclude("flag")])

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (jagged(2, 2), torch.zeros(2, 2).long()),
            (torch.zeros(2), ["a", "b"]),
            (torch.zeros(2, 2), torch.zeros(2, 3)),
        ],
    )
    def test_values_that_do_not_go_together_are_refused_by_key(
        self, first: object, second: object
    ) -> None:
        parts = [tu.get_tensordict({"a": value}) for value in (first, second)]  # type: ignore[dict-item]
        with pytest.raises(BatchError, match="key 'a'"):
            tu.concat_tensordict(parts)


class TestUnion:
    def test_the_first_gets_the_columns_of_both_and_the_second_keeps_its_own(self) -> None:
        left, right = make(2).exclude("text"), make(2).exclude("dense")
        assert tu.union_tensor_dict(left, right) is left
        assert values(left) == values(make(2))
        assert "dense" not in right.keys()  # noqa: SIM118

    def test_nan_equals_nan(self) -> None:
        td = tu.get_tensordict({"a": torch.tensor([float("nan")]), "s": [float("nan")]})
        tu.union_tensor_dict(td, pickle.loads(pickle.dumps(td)))

    @pytest.mark.parametrize(
        "other",
        [
            {"dense": torch.ones(2, 1)},
            {"text": ["a", "z"]},
            {"jagged": jagged(0, 2)},
        ],
    )
    def test_differing_values_are_refused_by_key_with_both(
        self, other: dict[str, torch.Tensor]
    ) -> None:
        with pytest.raises(
            ConflictError, match=f"^`{next(iter(other))}` in .*not the same object. "
        ):
            tu.union_tensor_dict(make(2), tu.get_tensordict(other))

    def test_differing_batch_sizes_are_refused(self) -> None:
        with pytest.raises(RowCountError, match=r"identical batch size.*\[2\].*\[3\]"):
            tu.union_tensor_dict(make(2), make(3))


class TestEquality:
    def test_equal_batches_pass(self) -> None:
        tu.assert_tensordict_eq(make(3), make(3))

    def test_a_differing_key_set_is_named(self) -> None:
        with pytest.raises(AssertionError, match="key set diffs"):
            tu.assert_tensordict_eq(make(1), make(1).exclude("flag"))

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("dense", torch.ones(2, 1), "values of dense"),
            ("text", ["a", "z"], "values of text"),
            ("jagged", jagged(1, 1), "values of jagged"),
            ("flag", 1, "type of flag"),
            ("text", torch.zeros(2), "type of text"),
        ],
    )
    def test_the_first_difference_is_named(self, key: str, value: object, match: str) -> None:
        other = make(2)
        if isinstance(value, torch.Tensor):
            other[key] = value
        else:
            tu.assign_non_tensor(other, **{key: value})
        with pytest.raises(AssertionError, match=match):
            tu.assert_tensordict_eq(make(2), other)


class TestPadding:
    def test_rows_from_the_top_are_repeated(self) -> None:
        padded, pad_size = tu.pad_to_divisor(make(2), 5)
        assert pad_size == 3
        assert rows_of(padded) == [0, 1, 0, 1, 0]
        assert tu.get(padded, "text") == list("ababa")

    @given(rows=st.integers(0, 7), divisor=st.integers(1, 6))
    @settings(deadline=None, max_examples=20)
    def test_unpad_undoes_pad(self, rows: int, divisor: int) -> None:
        td = make(rows)
        padded, pad_size = tu.pad_to_divisor(td, divisor)
        assert padded.batch_size[0] % divisor == 0
        assert values(tu.unpad(padded, pad_size)) == values(td)

    @pytest.mark.parametrize("rows", [0, 4])
    def test_what_divides_is_returned_as_it_is(self, rows: int) -> None:
        td = make(rows)
        padded, pad_size = tu.pad_to_divisor(td, 2)
        assert padded is td
        assert pad_size == 0
        assert tu.unpad(td, 0) is td

    def test_only_a_tensordict_can_be_padded(self) -> None:
        with pytest.raises(BatchTypeError, match="must be a TensorDict; got dict"):
            tu.pad_to_divisor({}, 2)  # type: ignore[arg-type]

    def test_a_divisor_below_one_is_refused(self) -> None:
        with pytest.raises(BatchError, match="at least 1; got 0"):
            tu.pad_to_divisor(make(2), 0)

    @pytest.mark.parametrize("pad_size", [-1, 3])
    def test_only_rows_that_are_there_can_be_removed(self, pad_size: int) -> None:
        with pytest.raises(RowCountError, match=f"between 0 and 2 rows; got {pad_size}"):
            tu.unpad(make(2), pad_size)


class TestContiguous:
    def test_every_tensor_is_contiguous_and_every_value_kept(self) -> None:
        td = make(3)
        td["dense"] = torch.arange(6.0).view(2, 3).T
        dense = tu.contiguous(td)
        assert dense["dense"].is_contiguous()
        assert not td["dense"].is_contiguous()
        assert values(dense) == values(td)


class TestIterator:
    def test_rows_keep_their_order_in_every_epoch(self) -> None:
        batches = list(tu.make_iterator(make(4), mini_batch_size=2, epochs=2))
        assert [rows_of(batch) for batch in batches] == [[0, 1], [2, 3]] * 2
        assert tu.get(batches[1], "text") == ["c", "d"]

    def test_a_seed_makes_shuffled_rows_repeatable(self) -> None:
        def shuffled(seed: int) -> list[list[float]]:
            batches = tu.make_iterator(make(8), 4, 2, seed, {"shuffle": True})
            return [rows_of(batch) for batch in batches]

        assert shuffled(1) == shuffled(1) != shuffled(2)
        assert sorted(row for batch in shuffled(1) for row in batch) == sorted([*range(8)] * 2)

    @pytest.mark.parametrize("size", [0, 3])
    def test_rows_that_do_not_divide_are_refused_at_once(self, size: int) -> None:
        with pytest.raises(
            BatchError, match=f"4 % {size} != 0|mini_batch_size must be at least 1; got 0"
        ):
            tu.make_iterator(make(4), size, 1)
