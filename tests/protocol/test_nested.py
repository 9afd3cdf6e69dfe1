"""Jagged tensors: built from rows, joined, and repaired."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from protocol import tensordict_utils as tu
from protocol.errors import BatchError, BatchTypeError


def jagged(*lengths: int) -> torch.Tensor:
    return tu.nested_tensor_from_tensor_list([torch.arange(n) for n in lengths])


@pytest.mark.parametrize("shapes", [[(2,), (3,)], [(2,), (2,)], [(0,), (2,)], [(4,)]])
def test_rows_come_back_as_they_were(shapes: list[tuple[int, ...]]) -> None:
    rows = [torch.rand(shape) for shape in shapes]
    nested = tu.nested_tensor_from_tensor_list(rows)
    assert nested.layout is torch.jagged
    assert all(map(torch.equal, nested.unbind(), rows))


@pytest.mark.parametrize("ragged_idx", [1, 2, None])
def test_rows_of_one_shape_are_ragged_in_the_dim_asked_for(ragged_idx: int | None) -> None:
    nested = tu.nested_tensor_from_tensor_list([torch.zeros(3, 4)] * 2, ragged_idx)
    ragged = [dim for dim, size in enumerate(nested.shape) if not isinstance(size, int)]
    assert ragged == [ragged_idx or 2]


@pytest.mark.parametrize("ragged_idx", [1, 2, None])
def test_gradients_flow_to_the_rows(ragged_idx: int | None) -> None:
    rows = [torch.ones(3, 4, requires_grad=True) for _ in range(2)]
    total = tu.nested_tensor_from_tensor_list(rows, ragged_idx).values().sum()
    assert all((grad == 1).all() for grad in torch.autograd.grad(total, rows))


@pytest.mark.parametrize(
    ("rows", "ragged_idx", "match"),
    [
        ([], None, "at least one tensor"),
        ([torch.tensor(1)], None, "at least one"),
        ([torch.zeros(2), torch.zeros(2, 2)], None, "same number of dims"),
        ([torch.zeros(2)], 2, r"\[1, 1\].* ragged_idx=2"),
        ([torch.zeros(2, 3), torch.zeros(3, 2)], None, "agree"),
        ([torch.zeros(2), torch.ones(2).long()], None, "dtype"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    rows: list[torch.Tensor], ragged_idx: int | None, match: str
) -> None:
    with pytest.raises(BatchError, match=match):
        tu.nested_tensor_from_tensor_list(rows, ragged_idx)


def test_concat_joins_rows_whatever_their_lengths() -> None:
    joined = tu.concat_nested_tensors([jagged(2, 2), jagged(2), jagged(0, 5)])
    assert [len(row) for row in joined.unbind()] == [2, 2, 2, 0, 5]


def test_concat_finds_the_ragged_dim_if_some_rows_do_not_show_it() -> None:
    first = tu.nested_tensor_from_tensor_list([torch.zeros(3, 3)])
    second = tu.nested_tensor_from_tensor_list([torch.zeros(2, 3), torch.zeros(4, 3)])
    joined = tu.concat_nested_tensors([first, second])
    assert [tuple(row.shape) for row in joined.unbind()] == [(3, 3), (2, 3), (4, 3)]


def test_concat_refuses_dense_tensors() -> None:
    with pytest.raises(BatchTypeError, match="tensor 1 must be jagged"):
        tu.concat_nested_tensors([jagged(1), torch.zeros(2, 2)])


def test_concat_refuses_nothing_at_all() -> None:
    with pytest.raises(BatchError, match="at least one"):
        tu.concat_nested_tensors([])


def test_lost_ragged_dim_of_position_ids_is_restored() -> None:
    nested: Any = tu.nested_tensor_from_tensor_list([torch.ones(3, n) for n in (2, 4)], 2)
    lost = torch.nested.nested_tensor_from_jagged(nested.values(), nested.offsets())
    td = TensorDict({"position_ids": lost}, batch_size=[2])
    tu.maybe_fix_3d_position_ids(td)
    assert [tuple(row.shape) for row in td["position_ids"].unbind()] == [(3, 2), (3, 4)]


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 3),
        jagged(1, 2),
        tu.nested_tensor_from_tensor_list([torch.ones(3, 1), torch.ones(3, 2)]),
        tu.nested_tensor_from_tensor_list([torch.ones(2, 3), torch.ones(2, 3)]),
    ],
)
def test_sound_position_ids_are_left_alone(ids: torch.Tensor) -> None:
    td = TensorDict({"position_ids": ids}, batch_size=[2])
    tu.maybe_fix_3d_position_ids(td)
    assert td["position_ids"].shape == ids.shape


def test_a_batch_without_position_ids_is_left_alone() -> None:
    tu.maybe_fix_3d_position_ids(tu.get_tensordict({"a": torch.zeros(2)}))
