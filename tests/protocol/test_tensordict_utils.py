"""The functions on bare TensorDicts, with every kind of value that one can hold; that they keep the
rows is in `test_row_model`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
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


def jagged(*lengths: int) -> torch.Tensor:
    return tu.nested_tensor_from_tensor_list([torch.arange(n) for n in lengths])


def make(rows: int, start: int = 0) -> TensorDict:
    """Every kind of value; row i holds `start + i` in one form or another."""
    if not rows:
        return tu.index_select_tensor_dict(make(1), [])
    ids = range(start, start + rows)
    td = tu.get_tensordict(
        {
            "dense": torch.arange(start, start + rows).float().unsqueeze(1),
            "text": ["abcdefghij"[i % 10] for i in ids],
            "lists": [[i] * (i % 3) for i in ids],
        },
        {"shared": {"a": [1, 2]}, "flag": True},
    )
    td["jagged"] = tu.nested_tensor_from_tensor_list([torch.full((i % 4,), i) for i in ids])
    td["wide"] = tu.nested_tensor_from_tensor_list(
        [torch.full((3, i % 4 + 1), i) for i in ids], ragged_idx=2
    )
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


# Values, in and out


def test_lists_and_arrays_hold_one_object_per_row_and_non_tensors_are_shared() -> None:
    tensors = {"a": torch.zeros(2), "s": ["x", {"y": 1}], "n": np.array([[1, 2], [3, 4]])}
    td = tu.get_tensordict(tensors, {"l": [1, 2], "none": None, "w": NonTensorData(3)})
    assert td.batch_size == (2,)
    assert tu.get(td, "s") == ["x", {"y": 1}]
    assert [row.tolist() for row in tu.get(td, "n")] == [[1, 2], [3, 4]]
    assert tu.get(td, "l") == tu.get(td[0:1], "l") == [1, 2]
    assert tu.get(td, "none", default=3) is None
    assert tu.get(td, "w") == 3
    assert tensors["s"] == ["x", {"y": 1}]
    assert tu.get(tu.get_tensordict({"s": NonTensorStack("a", "b")}), "s") == ["a", "b"]
    assert tu.get_tensordict({}, {"a": 1}).batch_size == ()


def test_zero_rows_are_legal_for_every_kind_of_value() -> None:
    td = tu.get_tensordict({"a": torch.zeros(0, 3), "text": []}, {"shared": [1, 2]})
    assert td.batch_size == (0,)
    assert tu.get(td, "text") == []
    assert tu.get(td, "shared") == [1, 2]
    assert tu.get(pickle.loads(pickle.dumps(td)), "text") == []


def test_rows_of_dicts_become_jagged_columns_and_stacks_of_objects() -> None:
    td = tu.list_of_dict_to_tensordict(
        [
            {"a": torch.arange(2), "same": torch.ones(2), "n": torch.tensor(1), "s": "x"},
            {"a": torch.arange(3), "same": torch.ones(2), "n": torch.tensor(2), "s": "y"},
        ]
    )
    want = {"a": [[0, 1], [0, 1, 2]], "same": [[1.0, 1.0]] * 2, "n": [1, 2], "s": ["x", "y"]}
    assert values(td) == want
    assert td["same"].is_nested
    assert not td["n"].is_nested
    td = tu.list_of_dict_to_tensordict([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(4, 3)}])
    assert [tuple(row.shape) for row in td["a"].unbind()] == [(2, 3), (4, 3)]


def test_a_list_is_assigned_per_row_and_anything_else_shared() -> None:
    td = tu.get_tensordict({"a": torch.zeros(2), "text": ["a", "b"]})
    assert tu.assign_non_tensor(td, per_row=[[1], 2], shared=(1, 2), stack=td.get("text")) is td
    assert tu.get(td, "per_row") == [[1], 2]
    assert tu.get(td, "shared") == (1, 2)
    assert tu.get(td[0:1], "per_row") == [[1]]
    assert tu.get(td, "stack") == ["a", "b"]
    tu.assign_non_tensor_data(td, "k", [1, 2, 3])
    assert tu.get(td, "k") == [1, 2, 3]
    whole = tu.get_tensordict({})
    tu.assign_non_tensor_stack(whole, "k", [1, 2, 3])
    assert tu.get(whole, "k") == [1, 2, 3]


def test_get_unwraps_all_but_tensors_and_get_non_tensor_data_leaves_stacks() -> None:
    td = make(2)
    assert tu.get(td, "text") == ["a", "b"]
    assert tu.get(td, "flag") is tu.get_non_tensor_data(td, "flag", None) is True
    assert tu.get(td, "dense") is td.get("dense")
    assert tu.get(td, "nope") is None
    assert tu.get(td, "nope", 3) == tu.get_non_tensor_data(td, "nope", 3) == 3
    assert isinstance(tu.get_non_tensor_data(td, "text", None), NonTensorStack)
    assert tu.unwrap_non_tensor_data(NonTensorData([1])) == [1]
    assert tu.unwrap_non_tensor_data(4) == 4


def test_get_keys_shares_the_values_and_pop_removes_all_or_nothing() -> None:
    td = make(2)
    part = tu.get_keys(td, iter(["dense", "text"]))
    assert (set(part.keys()), part.batch_size) == ({"dense", "text"}, (2,))
    assert part["dense"] is td["dense"]
    with pytest.raises(KeyError, match="zz"):
        tu.pop_keys(td, ["dense", "zz"])
    popped = tu.pop_keys(td, ["dense", "text", "flag"])
    assert values(popped) == {"dense": [[0.0], [1.0]], "text": ["a", "b"], "flag": True}
    assert tu.pop(td, "lists") == [[], [1]]
    assert tu.pop(td, "text", "gone") == "gone"
    assert set(td.keys()) == {"shared", "jagged", "wide", "sub"}
    assert tu.pop_keys(td, []).batch_size == (2,)


def test_a_union_changes_the_first_alone_and_nothing_if_values_differ() -> None:
    left, right = make(2).exclude("text"), make(2).exclude("dense")
    assert tu.union_tensor_dict(left, right) is left
    assert values(left) == {**values(left), **values(make(2))}
    assert "dense" not in right.keys()  # noqa: SIM118
    nan = tu.get_tensordict({"a": torch.tensor([float("nan")]), "s": [float("nan")]})
    tu.union_tensor_dict(nan, pickle.loads(pickle.dumps(nan)))
    td = make(2)
    for other in ({"dense": torch.ones(2, 1)}, {"text": ["a", "z"]}, {"jagged": jagged(0, 2)}):
        with pytest.raises(ConflictError, match=f"^`{next(iter(other))}` in .*not the same obj"):
            tu.union_tensor_dict(td, tu.get_tensordict({"new": torch.ones(2), **other}))  # type: ignore[dict-item]
        assert "new" not in td.keys()  # noqa: SIM118
    with pytest.raises(RowCountError, match=r"identical batch size.*\[2\].*\[3\]"):
        tu.union_tensor_dict(make(2), make(3))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("dense", torch.ones(2, 1), "values of dense"),
        ("text", ["a", "z"], "values of text"),
        ("jagged", jagged(1, 1), "values of jagged"),
        ("flag", 1, "type of flag"),
        ("text", torch.zeros(2), "type of text"),
        ("new", 1, "key set diffs"),
    ],
)
def test_the_first_difference_is_named(key: str, value: object, match: str) -> None:
    other = make(2)
    tu.assert_tensordict_eq(make(2), other)
    if isinstance(value, torch.Tensor):
        other[key] = value
    else:
        tu.assign_non_tensor(other, **{key: value})
    with pytest.raises(AssertionError, match=match):
        tu.assert_tensordict_eq(make(2), other)


def test_every_tensor_is_contiguous_and_every_value_kept() -> None:
    td = make(3)
    td["dense"] = torch.arange(6.0).view(2, 3).T
    dense = tu.contiguous(td)
    assert dense["dense"].is_contiguous()
    assert not td["dense"].is_contiguous()
    assert values(dense) == values(td)


# Rows


@pytest.mark.parametrize("size", [0, 1, 3])
def test_concatenating_the_chunks_gives_every_kind_of_value_back(size: int) -> None:
    td = make(3 * size)
    parts = tu.chunk_tensordict(td, 3)
    assert [part.batch_size for part in parts] == [(size,)] * 3
    for joined in (tu.concat_tensordict(parts), tu.concat_tensordict([make(0), *parts, make(0)])):
        tu.assert_tensordict_eq(joined, td)
        assert values(joined) == values(make(3 * size))
    if size:
        parts[0]["dense"][0] = joined["dense"][-1] = 7.0  # a view, and a copy
        assert td["dense"].flatten().tolist() == [7.0, *map(float, range(1, 3 * size))]


def test_the_first_shared_object_stays_and_joins_a_stack_as_one_per_row() -> None:
    parts = [tu.assign_non_tensor(make(1), flag=value) for value in ("x", "y")]
    assert tu.get(tu.concat_tensordict(parts), "flag") == "x"
    parts = [tu.get_tensordict({"a": torch.zeros(2)}) for _ in range(2)]
    tu.assign_non_tensor(parts[0], k=["x", "y"])
    tu.assign_non_tensor(parts[1], k="z")
    assert tu.get(tu.concat_tensordict(parts), "k") == ["x", "y", "z", "z"]
    whole = [tu.get_tensordict({}, {"m": value}) for value in (1, 2)]
    assert tu.get(tu.concat_tensordict(whole), "m") == 1
    assert tu.get(tu.concat_tensordict_with_none_bsz(whole), "m") == 1


new, of_rows = tu.get_tensordict, tu.list_of_dict_to_tensordict
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: new({"a": torch.zeros(2), "s": ["x"]}),
        RowCountError,
        "tensor s is not .*Expected 2, got 1",
    ),
    (lambda: new({"a": torch.tensor(1)}), RowCountError, "a needs rows"),
    (lambda: new({"a": [torch.ones(1)]}), BatchTypeError, "a: not a list of tensors"),
    (lambda: new({"a": 1}), BatchTypeError, "a -> <class 'int'> isn't of"),  # type: ignore[dict-item]
    (lambda: new({"a": torch.zeros(1)}, {"a": 1}), ConflictError, "'a'"),
    (lambda: of_rows([]), BatchError, "at least one dict"),
    (lambda: of_rows([{"a": 1}, {}]), MissingKeyError, "row 1"),
    (lambda: of_rows([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2)}]), BatchError, "agree"),
    (
        lambda: of_rows([{"x": torch.ones(2, 2)}, {"x": jagged(4, 4)}]),
        BatchError,
        "only dense rows",
    ),
    (lambda: tu.assign_non_tensor(make(2), k=[1]), RuntimeError, "k needs one .* 2 rows; got 1"),
    (lambda: tu.get_keys(make(1), ["dense", "zz"]), MissingKeyError, r"no \['zz'\] in tensordict"),
    (lambda: tu.index_select_tensor_dict(make(3), [7]), RowIndexError, "7"),
    (lambda: tu.chunk_tensordict(make(4), 3), ChunkError, "only support equal chunk.* 4 and chu"),
    (lambda: tu.chunk_tensordict(new({}, {"a": 1}), 1), RowCountError, "=\\[\\]"),
    (lambda: tu.concat_tensordict([]), BatchError, "at least one"),
    (lambda: tu.concat_tensordict_with_none_bsz([make(2)]), RowCountError, r"batch_size=\[\]"),
    (lambda: tu.concat_tensordict([make(2), new({})]), RowCountError, "needs rows"),
    (
        lambda: tu.concat_tensordict([make(1), make(1), make(1).exclude("flag")]),
        MissingKeyError,
        r"\['flag'\] .* shard 0 and batch of shard 2",
    ),
    (lambda: tu.make_iterator(make(4), 3, 1), BatchError, "4 % 3 != 0"),
    (
        lambda: tu.concat_nested_tensors([jagged(1), torch.zeros(2, 2)]),
        BatchTypeError,
        "must be jagged",
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG)
def test_what_is_wrong_is_named(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        call()
    assert isinstance(caught.value, BatchError)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (jagged(2, 2), torch.zeros(2, 2).long()),
        (torch.zeros(2), ["a", "b"]),
        (torch.zeros(2, 2), torch.zeros(2, 3)),
    ],
)
def test_values_that_do_not_go_together_are_refused_by_key(first: Any, second: Any) -> None:
    with pytest.raises(BatchError, match=r"batch\['a'\]: "):
        tu.concat_tensordict([tu.get_tensordict({"a": value}) for value in (first, second)])


# Jagged tensors


@pytest.mark.parametrize("ragged_idx", [1, 2, None])
def test_rows_of_one_shape_are_ragged_in_the_dim_asked_for(ragged_idx: int | None) -> None:
    rows = [torch.ones(3, 4, requires_grad=True) for _ in range(2)]
    nested = tu.nested_tensor_from_tensor_list(rows, ragged_idx)
    ragged = [dim for dim, size in enumerate(nested.shape) if not isinstance(size, int)]
    assert ragged == [ragged_idx or 2]
    total = nested.values().sum()
    assert all((grad == 1).all() for grad in torch.autograd.grad(total, rows))


@pytest.mark.parametrize(
    ("rows", "ragged_idx", "match"),
    [
        ([], None, "at least one tensor"),
        ([torch.tensor(1)], None, "in .1, 0."),
        ([torch.zeros(2), torch.zeros(2, 2)], None, "agree in all dims but 0"),
        ([torch.zeros(2)], 2, r"\[1, 1\].* ragged_idx=2"),
        ([torch.zeros(2, 3), torch.zeros(3, 2)], None, "agree in all dims but 0"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Any, ragged_idx: int | None, match: str) -> None:
    with pytest.raises(BatchError, match=match):
        tu.nested_tensor_from_tensor_list(rows, ragged_idx)


def test_concat_joins_rows_and_finds_the_ragged_dim_if_some_do_not_show_it() -> None:
    joined = tu.concat_nested_tensors([jagged(2, 2), jagged(2), jagged(0, 5)])
    assert [len(row) for row in joined.unbind()] == [2, 2, 2, 0, 5]
    first = tu.nested_tensor_from_tensor_list([torch.zeros(3, 3)])
    second = tu.nested_tensor_from_tensor_list([torch.zeros(2, 3), torch.zeros(4, 3)])
    joined = tu.concat_nested_tensors([first, second])
    assert [tuple(row.shape) for row in joined.unbind()] == [(3, 3), (2, 3), (4, 3)]


def test_only_a_lost_ragged_dim_of_position_ids_is_restored() -> None:
    nested: Any = tu.nested_tensor_from_tensor_list([torch.ones(3, n) for n in (2, 4)], 2)
    lost = torch.nested.nested_tensor_from_jagged(nested.values(), nested.offsets())
    td = TensorDict({"position_ids": lost}, batch_size=[2])
    tu.maybe_fix_3d_position_ids(td)
    assert [tuple(row.shape) for row in td["position_ids"].unbind()] == [(3, 2), (3, 4)]
    for ids in (
        torch.zeros(2, 3),
        jagged(1, 2),
        tu.nested_tensor_from_tensor_list([torch.ones(3, 1), torch.ones(3, 2)]),
        tu.nested_tensor_from_tensor_list([torch.ones(2, 3), torch.ones(2, 3)]),
    ):
        td = TensorDict({"position_ids": ids}, batch_size=[2])
        tu.maybe_fix_3d_position_ids(td)
        assert td["position_ids"].shape == ids.shape
    tu.maybe_fix_3d_position_ids(tu.get_tensordict({"a": torch.zeros(2)}))
