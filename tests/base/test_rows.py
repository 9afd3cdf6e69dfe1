"""Calls with several batches: that all have as many rows where any of them may be padded."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from protocol import DataProto, DataProtoFuture
from protocol.batches import batch_rows, slice_batch
from single_controller.base.dispatch import Broadcast, ByRows, Layout, PerRank
from single_controller.errors import DispatchError

FLAT2 = Layout.flat(2)
# two ranks in each of two dp groups, of which the first answers
TP = Layout((0, 0, 1, 1), (True, False, True, False), 2)


class Fake:
    """A source of rows that are there already."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def rows(self, timeout: float | None) -> int:
        return batch_rows(self.batch)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Any:
        return slice_batch(self.batch, start, stop)


def proto(rows: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"a": torch.arange(rows)}, **options)


def td(rows: int) -> TensorDict:
    return TensorDict({"a": torch.arange(rows)}, batch_size=[rows])


def late(rows: int, auto_padding: bool = False) -> DataProtoFuture:
    return DataProtoFuture([Fake(proto(rows))], auto_padding)


def column(batch: Any) -> list[int]:
    batch = batch.get() if isinstance(batch, DataProtoFuture) else batch
    return (batch.batch if isinstance(batch, DataProto) else batch)["a"].tolist()


def columns(batches: Sequence[Any]) -> list[list[int]]:
    return [column(batch) for batch in batches]


MODES = [
    (ByRows(), FLAT2),
    (ByRows(merge="list"), FLAT2),
    (ByRows(mesh="m"), TP),
    (ByRows(), Layout.flat(1)),
]


@pytest.mark.parametrize(("mode", "layout"), MODES)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (proto(4), proto(3, auto_padding=True)),
        (proto(4, auto_padding=True), td(5)),
        (td(6), proto(4, auto_padding=True)),
        (proto(0), proto(2, auto_padding=True)),
    ],
)
def test_padded_batches_that_differ_in_rows_are_refused_by_name(
    mode: ByRows, layout: Layout, first: Any, second: Any
) -> None:
    rows = f"argument 0 has {batch_rows(first)}, argument 'b' has {batch_rows(second)}"
    with pytest.raises(DispatchError, match=f"equally many rows; {rows}.*Broadcast"):
        mode.dispatch(layout, (first,), {"b": second})


@pytest.mark.parametrize(
    ("mode", "first", "second", "shards"),
    [
        (ByRows(), proto(4), late(6), [[2, 3], [2, 3]]),
        (ByRows(uneven=True), proto(5), td(4), [[3, 2], [2, 2]]),
        (
            ByRows(uneven=True, merge="list"),
            proto(1, auto_padding=True),
            proto(4),
            [[1, 2], [0, 2]],
        ),
    ],
)
def test_without_padding_each_batch_is_split_by_its_own_rows(
    mode: ByRows, first: Any, second: Any, shards: list[list[int]]
) -> None:
    _, calls = mode.dispatch(FLAT2, (first, second), {})
    assert [[len(column(v)) for v in call.args] for call in calls if call] == shards


def test_a_batch_that_is_marked_may_have_other_rows() -> None:
    others = {"whole": Broadcast(proto(5)), "each": PerRank([proto(1), proto(7)])}
    _, calls = ByRows().dispatch(FLAT2, (proto(4, auto_padding=True),), others)
    assert [[len(v) for v in call.values()] for call in calls if call] == [[2, 5, 1], [2, 5, 7]]


@pytest.mark.parametrize(
    "batches",
    [
        (proto(3), proto(3, auto_padding=True)),
        (proto(3, auto_padding=True), td(3)),
        (late(3), proto(3, auto_padding=True)),
        (proto(3), late(3, auto_padding=True)),
        (late(3, auto_padding=True), late(3)),
    ],
)
@pytest.mark.parametrize(("mode", "layout"), [(ByRows(), FLAT2), (ByRows(mesh="m"), TP)])
@pytest.mark.parametrize("returned", [0, 1])
def test_one_batch_that_may_be_padded_has_all_padded_and_the_result_has_none_of_it(
    mode: ByRows, layout: Layout, batches: tuple[Any, ...], returned: int
) -> None:
    plan, calls = mode.dispatch(layout, batches, {})
    shards = [columns(call.values()) for call in calls if call]
    assert shards[0] == [[0, 1]] * 2
    assert shards[-1] == [[2, 2]] * 2
    answers = [calls[rank] for rank in plan.answers]
    outputs = [call.args[returned] for call in answers if call]
    here = [o.get() if isinstance(o, DataProtoFuture) else o for o in outputs]
    assert column(mode.collect(plan, here)) == [0, 1, 2]
    promised = mode.promise(plan, [Fake(output) for output in here])
    assert column(pickle.loads(pickle.dumps(promised))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (proto(4), late(6, True)),
        (late(6), proto(4, auto_padding=True)),
        (late(4, True), late(6)),
        (late(4), late(5, True)),
    ],
)
def test_a_future_that_differs_in_rows_is_refused_where_it_is_read(first: Any, second: Any) -> None:
    _, calls = ByRows().dispatch(FLAT2, (first,), {"b": second})
    for call in calls:
        assert call is not None
        with pytest.raises(DispatchError, match=r"equally many rows; argument .* has 4, argument"):
            columns(pickle.loads(pickle.dumps(call.values())))


def test_one_future_in_two_arguments_is_compared_with_nothing() -> None:
    both = late(4)
    _, calls = ByRows().dispatch(FLAT2, (both,), {"b": both})
    assert [call.args[0] is call.kwargs["b"] for call in calls if call] == [True, True]
