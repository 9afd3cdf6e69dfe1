"""Every mode as two pure functions: arguments and a layout in, per-rank calls and a result out."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from single_controller.base.dispatch import Broadcast, ByRows, Layout, Mode, PerRank
from single_controller.errors import DispatchError

FLAT2, FLAT3 = Layout.flat(2), Layout.flat(3)
# rank = pp * 4 + dp * 2 + tp; the last pipeline stage answers, its first tp rank alone
PP_DP_TP = Layout((0, 0, 1, 1, 0, 0, 1, 1), tuple(r in (4, 6) for r in range(8)), 2)
# rank = dp * 4 + pp * 2 + tp
DP_PP_TP = Layout((0, 0, 0, 0, 1, 1, 1, 1), tuple(r in (2, 6) for r in range(8)), 2)
# dp counts backwards
REVERSED = Layout((2, 1, 0), (True, True, True), 3)


Work: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Fake:
    """A source of rows that are there already."""

    batch: Batch

    def rows(self, timeout: float | None) -> int:
        return batch_rows(self.batch)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        return slice_batch(self.batch, start, stop)


def proto(rows: int, **options: Any) -> DataProto:
    texts = np.array([f"t{i}" for i in range(rows)], dtype=object)
    return DataProto.from_dict({"a": torch.arange(rows)}, {"t": texts}, {"step": 1}, **options)


def td(rows: int) -> TensorDict:
    return TensorDict({"a": torch.arange(rows)}, batch_size=[rows])


def column(batch: Any) -> list[int]:
    if isinstance(batch, DataProtoFuture):
        batch = batch.get()
    return (batch.batch if isinstance(batch, DataProto) else batch)["a"].tolist()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, TensorDict):
        assert_tensordict_eq(left, right)
        return True
    return bool(left.equal(right))


def roundtrip(mode: Mode, layout: Layout, batch: Any, work: Work = lambda shard: shard) -> Any:
    """Dispatch one argument, run `work` on every rank, collect."""
    plan, calls = mode.dispatch(layout, (batch,), {})
    outputs = [work(call.args[0]) if call else None for call in calls]
    return mode.collect(plan, [outputs[rank] for rank in plan.answers])


@pytest.fixture
def auto_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_AUTO_PADDING", "1")


ONE, ALL = dispatch.OneToAll(), dispatch.AllToAll()
ZERO, EACH = dispatch.RankZero(), dispatch.PerElement()


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
    ("mode", "args", "named"),
    [
        (ALL, ([1, 2, 3],), "length 3"),
        (ALL, ([],), "length 0"),
        (ALL, (1, [1]), "argument 1"),
        (ALL, ([1, 2], [1]), "argument 1"),
        (ONE, (PerRank([1]),), "PerRank needs one value for each of 2 ranks; got 1"),
        (EACH, ([1, 2, 3],), "length 3"),
        (EACH, (5,), "int"),
        (EACH, ("ab",), "str"),
        (ByRows(), (5,), "int"),
        (ByRows(), ([1, 2],), "list"),
        (ByRows(), (proto(3),), "only support equal chunk"),
        (ByRows(function_first=True), (proto(2),), "function"),
        (ByRows(function_first=True), (), "function"),
    ],
)
def test_arguments_that_cannot_be_spread_are_refused_by_name(
    mode: Mode, args: Any, named: str
) -> None:
    for known in (DispatchError, ValueError, AssertionError):
        with pytest.raises(known, match=named):
            mode.dispatch(FLAT2, args, {})


def test_a_keyword_argument_that_cannot_be_spread_is_named() -> None:
    with pytest.raises(DispatchError, match="argument 'data'"):
        ByRows().dispatch(FLAT2, (), {"data": 3})
    with pytest.raises(DispatchError, match=r"argument 'x'.*Broadcast"):
        ALL.dispatch(FLAT2, (), {"x": [1]})


def test_rows_that_do_not_divide_are_named_with_both_ways_out() -> None:
    with pytest.raises(DispatchError, match=r"3 and chunk 2.*uneven=True.*auto_padding=True"):
        ByRows().dispatch(FLAT2, (proto(3),), {})


def test_a_direct_rollout_method_cannot_be_called_through_a_group() -> None:
    with pytest.raises(NotImplementedError, match="Direct rollout call is forbidden"):
        dispatch.Direct().dispatch(FLAT2, (), {})


@pytest.mark.parametrize(
    ("mode", "layout", "outputs", "answers", "result"),
    [
        (ONE, FLAT3, ["a", "b", "c"], (0, 1, 2), ["a", "b", "c"]),
        (ALL, FLAT2, ["a", None], (0, 1), ["a", None]),
        (ZERO, FLAT3, ["a"], (0,), "a"),
        (EACH, FLAT2, ["a", "b"], (0, 1), ["a", "b"]),
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
    assert mode.collect(plan, outputs) == result
    assert mode.promise(plan, outputs) == result or mode.batched


@pytest.mark.parametrize("make", [proto, td], ids=["DataProto", "TensorDict"])
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
@pytest.mark.parametrize("future", [False, True], ids=["here", "future"])
def test_batches_are_split_by_rows_over_the_dp_ranks_and_joined_in_order(
    make: Any, mode: Mode, layout: Layout, rows: int, per_rank: list[list[int]], future: bool
) -> None:
    batch = make(rows)
    sent = DataProtoFuture([Fake(batch)]) if future else batch
    _, calls = mode.dispatch(layout, (sent,), {})
    assert [column(call.args[0]) for call in calls if call] == per_rank
    assert same(roundtrip(mode, layout, sent, lambda x: x.get() if future else x), batch)


@pytest.mark.parametrize("make", [proto, td], ids=["DataProto", "TensorDict"])
@pytest.mark.parametrize("future", [False, True], ids=["here", "future"])
@pytest.mark.parametrize("layout", [FLAT3, REVERSED, PP_DP_TP], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5, 6])
def test_auto_padding_repeats_the_last_row_and_the_result_has_none_of_it(
    make: Any, future: bool, layout: Layout, rows: int, auto_padding: None
) -> None:
    batch, mode = make(rows), ByRows(mesh="m")
    before = column(batch)
    sent = DataProtoFuture([Fake(batch)]) if future else batch
    _, calls = mode.dispatch(layout, (sent,), {})
    size = -(-rows // layout.dp_size)
    padded = before + [rows - 1] * (size * layout.dp_size - rows)
    assert [column(call.args[0]) for call in calls if call] == [
        padded[dp * size : (dp + 1) * size] for dp in layout.dp_ranks
    ]
    assert same(roundtrip(mode, layout, sent, lambda x: x.get() if future else x), batch)
    assert column(batch) == before


def test_padding_leaves_the_callers_batch_and_its_meta_info_as_they_are() -> None:
    batch, twin = (proto(5, auto_padding=True) for _ in range(2))
    assert roundtrip(ByRows(), FLAT3, batch).equal(twin)
    assert batch.equal(twin)


def test_dispatch_leaves_the_callers_dicts_as_they_are() -> None:
    batch = proto(4)
    kwargs = {"data": batch, "flag": Broadcast(1)}
    _, calls = ByRows().dispatch(FLAT2, (), kwargs)
    for call in calls:
        assert call is not None
        call.kwargs["data"].meta_info["new"] = 1
    assert kwargs == {"data": batch, "flag": Broadcast(1)}
    assert batch.meta_info == {"step": 1}


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("make", [proto, td, lambda n: DataProtoFuture([Fake(proto(n))])])
def test_ranks_of_one_dp_group_get_the_same_shard_object(make: Any, uneven: bool) -> None:
    _, calls = ByRows(mesh="m", uneven=uneven).dispatch(PP_DP_TP, (make(4),), {})
    shards = [call.args[0] for call in calls if call]
    assert len({id(shard) for shard in shards}) == 2
    assert shards[0] is shards[1] is shards[4] is shards[5]


def test_keyword_only_calls_are_split_padded_and_joined_as_positional_ones() -> None:
    mode, batch = ByRows(), proto(3, auto_padding=True)
    plan, calls = mode.dispatch(FLAT2, (), {"data": batch, "extra": PerRank("xy")})
    got = [(c.args, column(c.kwargs["data"]), c.kwargs["extra"]) for c in calls if c]
    assert got == [((), [0, 1], "x"), ((), [2, 2], "y")]
    assert mode.collect(plan, [c.kwargs["data"] for c in calls if c]).equal(batch)


def test_several_batches_are_split_alike() -> None:
    _, calls = ByRows(uneven=True).dispatch(FLAT2, (proto(3),), {"other": td(3)})
    got = [(column(c.args[0]), column(c.kwargs["other"])) for c in calls if c]
    assert got == [([0, 1], [0, 1]), ([2], [2])]


def test_the_function_that_comes_first_goes_whole_to_every_rank() -> None:
    _, calls = ByRows(function_first=True).dispatch(FLAT2, (len, proto(2)), {})
    assert [(c.args[0], column(c.args[1])) for c in calls if c] == [(len, [0]), (len, [1])]


def test_a_metric_call_on_a_padded_batch_keeps_every_ranks_result() -> None:
    mode = ByRows(merge="list")
    plan, calls = mode.dispatch(FLAT3, (proto(4, auto_padding=True),), {})
    assert [column(c.args[0]) for c in calls if c] == [[0, 1], [2, 3], [3, 3]]
    assert mode.collect(plan, [{"loss": r} for r in range(3)]) == [{"loss": r} for r in range(3)]
    shards = mode.collect(plan, [c.args[0] for c in calls if c])
    assert [column(shard) for shard in shards] == [[0, 1], [2, 3], []]
    assert [len(b) for b in mode.collect(plan, [proto(1)] * 3)] == [1, 1, 1]


@pytest.mark.parametrize("output", [None, 3, [proto(1)], {"a": 1}])
def test_an_output_that_is_no_batch_is_refused_with_its_rank_and_type(output: Any) -> None:
    plan = ByRows().plan(FLAT2)
    with pytest.raises(DispatchError, match=f"rank 1 .*{type(output).__name__}.*_METRIC"):
        ByRows().collect(plan, [proto(1), output])


@pytest.mark.parametrize(
    "outputs", [[proto(1), td(1)], [proto(1), DataProto.from_dict({"b": torch.ones(1)})]]
)
def test_outputs_that_do_not_go_together_are_a_dispatch_error(outputs: list[Any]) -> None:
    with pytest.raises(DispatchError, match="joined"):
        ByRows().collect(ByRows().plan(FLAT2), outputs)


def test_padding_is_not_guessed_at_where_a_worker_changed_the_number_of_rows() -> None:
    batch = proto(3, auto_padding=True)
    with pytest.raises(DispatchError, match=r"padding cannot be removed.*uneven=True"):
        roundtrip(ByRows(), FLAT2, batch, lambda shard: shard.repeat(2))


def promised(batch: Any, work: Work = lambda shard: shard) -> DataProtoFuture:
    """What a call on two ranks that does not block returns."""
    mode = ByRows()
    plan, calls = mode.dispatch(FLAT2, (batch,), {})
    future = mode.promise(plan, [Fake(work(call.args[0])) for call in calls if call])
    assert isinstance(future, DataProtoFuture)
    return future


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_promise_of_a_padded_call_has_no_padding_and_can_be_pickled(rows: int) -> None:
    batch = proto(rows, auto_padding=True)
    future = promised(batch)
    assert len(future) == rows
    assert future.get().equal(batch)
    assert pickle.loads(pickle.dumps(future)).get().equal(batch)


def test_a_promise_does_not_guess_either_where_a_worker_changed_the_number_of_rows() -> None:
    future = promised(proto(3, auto_padding=True), lambda shard: shard.repeat(2))
    with pytest.raises((DispatchError, BatchError)):
        future.get()


def test_a_promise_of_a_list_mode_is_the_list_of_handles() -> None:
    mode = ByRows(merge="list")
    assert mode.promise(mode.plan(FLAT2), ["h0", "h1"]) == ["h0", "h1"]
    assert (ByRows().batched, mode.batched, ONE.batched) == (True, False, False)


@pytest.mark.parametrize(
    "collects",
    [(True, False, False, False), (True, True, True, False), (False,) * 4],
    ids=["missing", "doubled", "none"],
)
def test_a_dp_rank_without_exactly_one_collecting_rank_is_refused_before_sending(
    collects: tuple[bool, ...],
) -> None:
    layout = Layout((0, 0, 1, 1), collects, 2)
    with pytest.raises(DispatchError, match=r"mesh 'm'.*exactly one rank that collects"):
        ByRows(mesh="m").dispatch(layout, (proto(2),), {})


@pytest.mark.parametrize(
    ("layout", "ranks", "dp_ranks", "collects", "dp_size"),
    [
        (FLAT3, (2, 0), (0, 1), (True, True), 2),
        (FLAT3, (1,), (0,), (True,), 1),
        (PP_DP_TP, (2, 6), (0, 0), (False, True), 1),
        (PP_DP_TP, (4, 6), (0, 1), (True, True), 2),
        (PP_DP_TP, (6, 2, 4), (0, 0, 1), (True, False, True), 2),
    ],
)
def test_a_subset_of_ranks_is_a_layout_with_shards_numbered_as_they_come(
    layout: Layout, ranks: Sequence[int], dp_ranks: Any, collects: Any, dp_size: int
) -> None:
    assert layout.subset(ranks) == Layout(dp_ranks, collects, dp_size)


def test_collecting_ranks_come_in_the_order_of_their_shards() -> None:
    layouts = PP_DP_TP, DP_PP_TP, REVERSED
    assert [one.collecting_ranks() for one in layouts] == [(4, 6), (2, 6), (2, 1, 0)]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 17),
    ranks=st.integers(1, 5),
    how=st.sampled_from(["uneven", "padded"]),
    future=st.booleans(),
    replicas=st.integers(1, 2),
)
def test_what_ranks_return_unchanged_is_the_batch_again(
    rows: int, ranks: int, how: str, future: bool, replicas: int
) -> None:
    batch = proto(rows, auto_padding=how == "padded" and not future)
    layout = Layout(
        tuple(dp for dp in range(ranks) for _ in range(replicas)),
        tuple(copy == 0 for _ in range(ranks) for copy in range(replicas)),
        ranks,
    )
    sent = DataProtoFuture([Fake(batch)]) if future else batch
    DataProtoConfig.auto_padding = how == "padded"
    try:
        mode = ByRows(mesh="m", uneven=how == "uneven")
        plan, calls = mode.dispatch(layout, (sent,), {})
        shards = [call.args[0] for call in calls if call]
        outputs = [shard.get() if future else shard for shard in shards]
        sizes = [batch_rows(outputs[rank]) for rank in plan.answers]
        result = mode.collect(plan, [outputs[rank] for rank in plan.answers])
    finally:
        DataProtoConfig.auto_padding = None
    assert result.equal(batch)
    assert max(sizes) - min(sizes) <= (how == "uneven")
    whole = concat_batches([outputs[rank] for rank in plan.answers])
    added = -rows % ranks if how == "padded" and rows else 0
    assert whole.equal(pad_batch(batch, added))
