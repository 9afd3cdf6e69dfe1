"""Every mode as two pure functions: arguments and a layout in, per-rank calls and a result out."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from protocol import DataProto, DataProtoConfig, DataProtoFuture
from protocol.batches import Batch, batch_rows, concat_batches, pad_batch, slice_batch
from protocol.errors import BatchError
from protocol.tensordict_utils import assert_tensordict_eq
from single_controller.base import dispatch
from single_controller.base.dispatch import ByRows, Mode
from single_controller.base.plan import Broadcast, Layout, PerRank
from single_controller.errors import DispatchError

FLAT2, FLAT3 = Layout.flat(2), Layout.flat(3)
# rank = pp * 4 + dp * 2 + tp; the last pipeline stage answers, its first tp rank alone
PP_DP_TP = Layout((0, 0, 1, 1, 0, 0, 1, 1), tuple(r in (4, 6) for r in range(8)), 2)
# rank = dp * 4 + pp * 2 + tp
DP_PP_TP = Layout((0, 0, 0, 0, 1, 1, 1, 1), tuple(r in (2, 6) for r in range(8)), 2)
# two ranks in each of two dp groups, of which the first answers
TP = Layout((0, 0, 1, 1), (True, False, True, False), 2)
REVERSED = Layout((2, 1, 0), (True, True, True), 3)  # dp counts backwards


@dataclass(frozen=True)
class Here:
    """A source of rows that are there already."""

    batch: Batch

    def rows(self, timeout: float | None) -> int:
        return batch_rows(self.batch)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        return slice_batch(self.batch, start, stop)


class NotYet:
    """A source of which nobody may ask for the rows yet."""

    def rows(self, timeout: float | None) -> int:
        raise AssertionError


def proto(rows: int, **options: Any) -> DataProto:
    texts = np.array([f"t{i}" for i in range(rows)], dtype=object)
    return DataProto.from_dict({"a": torch.arange(rows)}, {"t": texts}, {"step": 1}, **options)


def td(rows: int) -> TensorDict:
    return TensorDict({"a": torch.arange(rows)}, batch_size=[rows])


def late(rows: int, auto_padding: bool = False) -> DataProtoFuture:
    return DataProtoFuture([Here(proto(rows))], auto_padding)


def here(batch: Any) -> Any:
    return batch.get() if isinstance(batch, DataProtoFuture) else batch


def column(batch: Any) -> list[int]:
    batch = here(batch)
    return (batch.batch if isinstance(batch, DataProto) else batch)["a"].tolist()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, TensorDict):
        assert_tensordict_eq(left, right)
        return True
    return bool(left.equal(right))


def roundtrip(
    mode: Mode, layout: Layout, batch: Any, work: Callable[[Any], Any] = lambda shard: shard
) -> Any:
    """Dispatch one argument, run `work` on every rank, collect."""
    plan, calls = mode.dispatch(layout, (batch,), {})
    outputs = [work(here(call.args[0])) if call else None for call in calls]
    return mode.collect(plan, [outputs[rank] for rank in plan.answers])


ONE, ALL = dispatch.OneToAll(), dispatch.AllToAll()
ZERO, EACH = dispatch.RankZero(), dispatch.PerElement()
makers = pytest.mark.parametrize("make", [proto, td, late])


@pytest.mark.parametrize(
    ("mode", "layout", "args", "kwargs", "per_rank"),
    [
        (ONE, FLAT2, (1, [2, 3]), {"k": "v"}, [((1, [2, 3]), {"k": "v"})] * 2),
        (ONE, FLAT2, (), {}, [((), {})] * 2),
        (ONE, FLAT2, (PerRank("ab"),), {}, [(("a",), {}), (("b",), {})]),
        (ONE, FLAT2, (), {"k": PerRank([1, 2])}, [((), {"k": 1}), ((), {"k": 2})]),
        (ONE, FLAT2, (Broadcast([1]),), {}, [(([1],), {})] * 2),
        (ALL, FLAT2, ([1, 2],), {"k": [3, 4]}, [((1,), {"k": 3}), ((2,), {"k": 4})]),
        (ALL, FLAT2, ([1, 2], 7), {}, [(([1, 2], 7), {})] * 2),
        (ALL, FLAT2, ([1, 2],), {"k": "s"}, [(([1, 2],), {"k": "s"})] * 2),
        (ALL, FLAT2, ((1, 2), {"d": 1}), {}, [(((1, 2), {"d": 1}), {})] * 2),
        (ALL, FLAT2, ([1, 2], Broadcast([5])), {}, [((1, [5]), {}), ((2, [5]), {})]),
        (ALL, FLAT2, (7, PerRank([1, 2])), {}, [((7, 1), {}), ((7, 2), {})]),
        (ALL, FLAT2, (Broadcast([1, 2]),), {}, [(([1, 2],), {})] * 2),
        (ALL, FLAT2, (), {}, [((), {})] * 2),
        (ALL, Layout.flat(1), ([1],), {}, [((1,), {})]),
        (ZERO, FLAT3, ([1, 2], 3), {"k": 4}, [(([1, 2], 3), {"k": 4}), None, None]),
        (ZERO, FLAT2, (PerRank([1, 2]),), {}, [((1,), {}), None]),
        (EACH, FLAT2, ([1, 2],), {"k": (3, 4)}, [((1,), {"k": 3}), ((2,), {"k": 4})]),
        (EACH, FLAT2, (Broadcast(1), PerRank([2, 3])), {}, [((1, 2), {}), ((1, 3), {})]),
        (EACH, PP_DP_TP, (["x", "y"],), {}, [((v,), {}) for v in "xxyyxxyy"]),
    ],
)  # fmt: skip
def test_each_rank_gets_the_arguments_that_its_mode_says(
    mode: Mode, layout: Layout, args: Any, kwargs: Any, per_rank: list[Any]
) -> None:
    _, calls = mode.dispatch(layout, args, kwargs)
    assert [call and (call.args, call.kwargs) for call in calls] == per_rank


@pytest.mark.parametrize(
    ("mode", "args", "kwargs", "distinct"),
    [
        (ONE, (), {}, 1),
        (ONE, ("x",), {"k": Broadcast([1])}, 1),
        (ONE, ("x", PerRank(range(1_000, 1_008))), {}, 8),
        (EACH, (["x", "y"],), {}, 2),
        (ByRows(mesh="m"), (proto(4), Broadcast(1)), {"k": td(4)}, 2),
    ],
)
def test_ranks_that_get_the_same_arguments_share_one_call(
    mode: Mode, args: Any, kwargs: Any, distinct: int
) -> None:
    _, calls = mode.dispatch(PP_DP_TP, args, kwargs)
    assert len({id(call) for call in calls}) == distinct


@pytest.mark.parametrize(
    ("mode", "args", "kwargs", "named"),
    [
        (ALL, ([1, 2, 3],), {}, "length 3"),
        (ALL, ([],), {}, "length 0"),
        (ALL, (1, [1]), {}, "argument 1"),
        (ALL, (), {"x": [1]}, r"argument 'x'.*Broadcast"),
        (ONE, (PerRank([1]),), {}, "argument 0 needs one value for each of 2 ranks; got 1"),
        (EACH, ([1, 2, 3],), {}, "length 3"),
        (EACH, ("ab",), {}, "str"),
        (ByRows(), (5,), {}, "int"),
        (ByRows(), ([1, 2],), {}, "list"),
        (ByRows(), (), {"data": 3}, "argument 'data'"),
        (ByRows(), (proto(3),), {}, "only support equal chunk"),
        (ByRows(), (proto(3),), {}, r"3 and chunk 2.*uneven=True.*auto_padding=True"),
        (ByRows(function_first=True), (proto(2),), {}, "function"),
        (ByRows(function_first=True), (), {}, "function"),
    ],
)
def test_arguments_that_cannot_be_spread_are_refused_by_name(
    mode: Mode, args: Any, kwargs: Any, named: str
) -> None:
    for known in (DispatchError, ValueError, AssertionError):
        with pytest.raises(known, match=named):
            mode.dispatch(FLAT2, args, kwargs)


@pytest.mark.parametrize(
    ("mode", "layout", "outputs", "answers", "result"),
    [
        (ONE, FLAT3, ["a", "b", "c"], (0, 1, 2), ["a", "b", "c"]),
        (ALL, FLAT2, ["a", None], (0, 1), ["a", None]),
        (ZERO, FLAT3, ["a"], (0,), "a"),
        (EACH, PP_DP_TP, ["e", "g"], (4, 6), ["e", "g"]),
        (ByRows(merge="list"), FLAT2, [1.5, {}], (0, 1), [1.5, {}]),
        (ByRows(merge="list"), DP_PP_TP, ["c", "g"], (2, 6), ["c", "g"]),
    ],
)
def test_outputs_of_the_ranks_that_answer_become_the_result(
    mode: Mode, layout: Layout, outputs: list[Any], answers: tuple[int, ...], result: Any
) -> None:
    plan = mode.plan(layout)
    assert plan.answers == answers
    assert mode.collect(plan, outputs) == mode.promise(plan, outputs) == result
    assert not mode.batched


@makers
@pytest.mark.parametrize(
    ("mode", "layout", "rows", "per_rank"),
    [
        (ByRows(), FLAT2, 4, [[0, 1], [2, 3]]),
        (ByRows(), FLAT2, 0, [[], []]),
        (ByRows(uneven=True), FLAT3, 4, [[0, 1], [2], [3]]),
        (ByRows(uneven=True), FLAT3, 2, [[0], [1], []]),
        (ByRows(mesh="m"), PP_DP_TP, 4, [[0, 1], [0, 1], [2, 3], [2, 3]] * 2),
        (ByRows(mesh="m"), DP_PP_TP, 4, [[0, 1]] * 4 + [[2, 3]] * 4),
        (ByRows(mesh="m", uneven=True), PP_DP_TP, 3, [[0, 1], [0, 1], [2], [2]] * 2),
        (ByRows(mesh="m"), REVERSED, 3, [[2], [1], [0]]),
    ],
)
def test_batches_are_split_by_rows_over_the_dp_ranks_and_joined_in_order(
    make: Any, mode: Mode, layout: Layout, rows: int, per_rank: list[list[int]]
) -> None:
    batch = make(rows)
    _, calls = mode.dispatch(layout, (batch,), {})
    shards = [call.args[0] for call in calls if call]
    assert [column(shard) for shard in shards] == per_rank
    assert len({id(shard) for shard in shards}) == layout.dp_size
    assert same(roundtrip(mode, layout, batch), here(batch))


def test_dispatch_leaves_the_callers_values_as_they_are() -> None:
    batch = proto(3, auto_padding=True)
    kwargs = {"data": batch, "flag": Broadcast(1)}
    plan, calls = ByRows().dispatch(FLAT2, (), kwargs)
    assert ByRows().collect(plan, [c.kwargs["data"] for c in calls if c]).equal(batch)
    for call in filter(None, calls):
        call.kwargs["data"].meta_info["new"] = 1
    assert kwargs == {"data": batch, "flag": Broadcast(1)}
    assert batch.equal(proto(3, auto_padding=True))


def test_several_batches_and_marks_are_split_each_in_its_way() -> None:
    _, calls = ByRows(uneven=True).dispatch(FLAT2, (proto(3),), {"k": td(3), "x": PerRank("ab")})
    got = [(column(c.args[0]), column(c.kwargs["k"]), c.kwargs["x"]) for c in calls if c]
    assert got == [([0, 1], [0, 1], "a"), ([2], [2], "b")]
    _, calls = ByRows(function_first=True).dispatch(FLAT2, (len, proto(2)), {})
    assert [(c.args[0], column(c.args[1])) for c in calls if c] == [(len, [0]), (len, [1])]


class Rows(list):  # type: ignore[type-arg]
    """What is no batch, and can be chunked and concatenated."""

    def chunk(self, parts: int) -> list[Rows]:
        return [Rows(self[i::parts]) for i in range(parts if self else 1)]

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        return Rows(value for part in parts for value in part)


def test_a_value_with_chunk_and_concat_is_split_and_joined_by_them() -> None:
    assert roundtrip(ByRows(), FLAT2, Rows([1, 2, 3])) == Rows([1, 3, 2])
    assert roundtrip(ByRows(), Layout.flat(1), Rows([1, 2])) == Rows([1, 2])
    with pytest.raises(DispatchError, match=r"chunk\(2\) of Rows gave 1 parts"):
        ByRows().dispatch(FLAT2, (Rows(),), {})
    with pytest.raises(DispatchError, match="rank 1 returned list"):
        ByRows().collect(ByRows().plan(FLAT2), [proto(1), [1]])


def test_a_tensordict_without_rows_goes_whole_and_the_first_of_the_outputs_counts() -> None:
    whole = TensorDict({"a": torch.tensor(3)}, batch_size=[])
    plan, calls = ByRows().dispatch(FLAT2, (whole, proto(2)), {})
    assert [call.args[0] is whole for call in calls if call] == [True, True]
    assert ByRows().collect(plan, [whole, whole])["a"] == 3


def test_a_list_of_padded_shards_is_cut_and_of_other_outputs_is_not() -> None:
    mode = ByRows(merge="list")
    plan, calls = mode.dispatch(FLAT3, (proto(4, auto_padding=True),), {})
    shards = [c.args[0] for c in calls if c]
    assert [column(shard) for shard in shards] == [[0, 1], [2, 3], [3, 3]]
    assert [column(shard) for shard in mode.collect(plan, shards)] == [[0, 1], [2, 3], []]
    for outputs in ([{"loss": r} for r in range(3)], [proto(1)] * 3):
        assert mode.collect(plan, outputs) == outputs


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([proto(1), None], "rank 1 .*NoneType.*_METRIC"),
        ([proto(1), [proto(1)]], "rank 1 .*list.*_METRIC"),
        ([{"a": 1}, proto(1)], "rank 0 .*dict.*_METRIC"),
        ([proto(1), td(1)], "joined"),
        ([proto(1), DataProto.from_dict({"b": torch.ones(1)})], "joined"),
    ],
)
def test_outputs_that_are_not_one_batch_are_refused(outputs: list[Any], message: str) -> None:
    with pytest.raises(DispatchError, match=message):
        ByRows().collect(ByRows().plan(FLAT2), outputs)


def promised(batch: Any, work: Callable[[Any], Any] = lambda shard: shard) -> DataProtoFuture:
    """What a call on two ranks that does not block returns, as another process has it."""
    plan, calls = ByRows().dispatch(FLAT2, (batch,), {})
    future = ByRows().promise(plan, [Here(work(here(call.args[0]))) for call in calls if call])
    return pickle.loads(pickle.dumps(future))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_promise_of_a_padded_call_has_no_padding(rows: int) -> None:
    padded = proto(rows, auto_padding=True)
    for sent, whole in ((padded, padded), (late(rows, auto_padding=True), proto(rows))):
        future = promised(sent)
        assert len(future) == rows
        assert future.get().equal(whole)
        assert future.select(["a"]).get().equal(whole.select(["a"], []))
    padding = ByRows().dispatch(FLAT2, (late(rows, auto_padding=True),), {})[0].padding
    assert padding is not None
    assert padding.rows == rows == pickle.loads(pickle.dumps(padding)).batch


def test_padding_is_not_guessed_at_where_a_worker_changed_the_number_of_rows() -> None:
    batch = proto(3, auto_padding=True)
    with pytest.raises(DispatchError, match=r"padding cannot be removed.*uneven=True"):
        roundtrip(ByRows(), FLAT2, batch, lambda shard: shard.repeat(2))
    with pytest.raises((DispatchError, BatchError)):
        promised(batch, lambda shard: shard.repeat(2)).get()


@pytest.mark.parametrize("first", [proto(4), td(6), proto(0)])
@pytest.mark.parametrize("mode", [ByRows(), ByRows(merge="list"), ByRows(mesh="m")])
def test_padded_batches_that_differ_in_rows_are_refused_by_name(mode: ByRows, first: Any) -> None:
    rows = f"argument 0 has {len(here(first))}, argument 'b' has 3"
    for layout in (TP, Layout.flat(1)):
        with pytest.raises(DispatchError, match=f"equally many rows; {rows}.*Broadcast"):
            mode.dispatch(layout, (first,), {"b": proto(3, auto_padding=True)})


@pytest.mark.parametrize(
    ("mode", "args", "shards"),
    [
        (ByRows(), (proto(4), late(6)), [[2, 3], [2, 3]]),
        (ByRows(uneven=True), (proto(5), td(4)), [[3, 2], [2, 2]]),
        (ByRows(uneven=True), (proto(1, auto_padding=True), proto(4)), [[1, 2], [0, 2]]),
        (ByRows(), (proto(2, auto_padding=True), Broadcast(proto(5))), [[1, 5], [1, 5]]),
        (ByRows(), (proto(4, auto_padding=True), PerRank([td(1), td(7)])), [[2, 1], [2, 7]]),
    ],
)
def test_batches_may_differ_in_rows_without_padding_or_where_they_are_marked(
    mode: ByRows, args: tuple[Any, ...], shards: list[list[int]]
) -> None:
    _, calls = mode.dispatch(FLAT2, args, {})
    assert [[len(column(v)) for v in call.args] for call in calls if call] == shards


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
    shards = [[column(value) for value in call.values()] for call in calls if call]
    assert (shards[0], shards[-1]) == ([[0, 1]] * 2, [[2, 2]] * 2)
    answers = [calls[rank] for rank in plan.answers]
    outputs = [here(call.args[returned]) for call in answers if call]
    assert column(mode.collect(plan, outputs)) == [0, 1, 2]
    future = mode.promise(plan, [Here(output) for output in outputs])
    assert column(pickle.loads(pickle.dumps(future))) == [0, 1, 2]


def test_a_future_alone_that_may_be_padded_is_not_waited_for() -> None:
    both = DataProtoFuture([NotYet()], auto_padding=True)  # type: ignore[list-item]
    _, calls = ByRows().dispatch(FLAT2, (both,), {"b": both})
    assert [call.args[0] is call.kwargs["b"] for call in calls if call] == [True, True]


def test_futures_beside_what_may_be_padded_are_not_waited_for_and_have_to_have_as_many_rows() -> (
    None
):
    future = DataProtoFuture([NotYet()])  # type: ignore[list-item]
    other = DataProtoFuture([NotYet()], auto_padding=True)  # type: ignore[list-item]
    for batches in ((proto(4, auto_padding=True), future), (future, other)):
        assert len(ByRows().dispatch(FLAT2, batches, {})[1]) == 2
    for batches in ((proto(4, auto_padding=True), late(2)), (late(4, auto_padding=True), late(2))):
        _, calls = ByRows().dispatch(FLAT2, batches, {})
        with pytest.raises(DispatchError, match=r"argument 0 has 4, argument 1 has 2"):
            [call.args[1].get() for call in calls if call]


def test_a_dp_rank_without_exactly_one_collecting_rank_is_refused_before_sending() -> None:
    for collects in ((True, False, False, False), (True, True, True, False), (False,) * 4):
        layout = Layout((0, 0, 1, 1), collects, 2)
        with pytest.raises(DispatchError, match=r"mesh 'm'.*exactly one rank that collects"):
            ByRows(mesh="m").dispatch(layout, (proto(2),), {})


@settings(deadline=None, max_examples=60)
@given(
    make=st.sampled_from([proto, td]),
    rows=st.integers(0, 17),
    ranks=st.integers(1, 5),
    how=st.sampled_from(["uneven", "padded"]),
    future=st.booleans(),
    replicas=st.integers(1, 2),
    backwards=st.booleans(),
)
def test_what_ranks_return_unchanged_is_the_batch_again(
    make: Any, rows: int, ranks: int, how: str, future: bool, replicas: int, backwards: bool
) -> None:
    batch = make(rows)
    shards = range(ranks)[::-1] if backwards else range(ranks)
    layout = Layout.of(
        [dp for dp in shards for _ in range(replicas)],
        [copy == 0 for _ in range(ranks) for copy in range(replicas)],
    )
    sent = DataProtoFuture([Here(batch)]) if future else batch
    DataProtoConfig.auto_padding = how == "padded"
    try:
        mode = ByRows(mesh="m", uneven=how == "uneven")
        plan, calls = mode.dispatch(layout, (sent,), {})
        outputs = [here(call.args[0]) for call in calls if call]
        answers = [outputs[rank] for rank in plan.answers]
        assert same(mode.collect(plan, answers), make(rows))
    finally:
        DataProtoConfig.auto_padding = None
    assert same(batch, make(rows))
    sizes = [batch_rows(output) for output in answers]
    assert max(sizes) - min(sizes) <= (how == "uneven")
    added = -rows % ranks if how == "padded" and rows else 0
    assert same(concat_batches(answers), pad_batch(batch, added))


@pytest.mark.parametrize(
    ("mode", "ranks", "as_views"),
    [(ByRows(), 2, True), (ByRows(), 1, False), (ByRows(merge="list"), 2, False)],
)
def test_outputs_that_are_joined_are_copied_once_and_others_are_private(
    mode: ByRows, ranks: int, as_views: bool
) -> None:
    views: list[pickle.PickleBuffer] = []
    data = pickle.dumps(proto(3), protocol=5, buffer_callback=views.append)
    buffers = [np.frombuffer(view, np.uint8).copy() for view in views]
    for buffer in buffers:
        buffer.flags.writeable = False  # as memory is that others may read too

    def held(batch: DataProto) -> bool:
        return any(np.shares_memory(batch.batch["a"].numpy(), buffer) for buffer in buffers)

    plan = mode.plan(Layout.flat(ranks))
    with mode.reading(plan):
        outputs = [pickle.loads(data, buffers=buffers) for _ in range(ranks)]
    assert [held(output) for output in outputs] == [as_views] * ranks
    result = mode.collect(plan, outputs)
    parts = result if isinstance(result, list) else [result]
    assert [i for part in parts for i in column(part)] == [0, 1, 2] * ranks
    assert not any(map(held, parts))
