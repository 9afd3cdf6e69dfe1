"""Calls that do not block: handles, futures of batches, deadlines, cancelling."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

from protocol import BatchTypeError, ChunkError, DataProto, DataProtoFuture
from single_controller import (
    Broadcast,
    CallTimeoutError,
    DispatchError,
    PerRank,
    SendError,
    WorkerError,
)
from tests.conformance.conftest import Backend
from tests.conformance.probe import batch, stamp, values
from tests.conformance.team import zeros
from tests.waiting import once_taken


def test_a_future_goes_to_a_group_of_another_size_by_rows(group: Any, wider: Any) -> None:
    future = group.grow(batch(5))
    assert isinstance(future, DataProtoFuture)
    assert len(future) == 7
    assert values(wider.uneven_rows(future)) == [0, 1, 2, 3, 3, 4, 4]
    chained = group.add_rank_later(wider.grow(batch(3)))
    assert values(chained.get()) == [0, 1, 1, 3, 3, 3]


def test_a_future_that_does_not_divide_is_refused_where_its_rows_are_known(group: Any) -> None:
    with pytest.raises(AssertionError, match=r"only support equal chunk.*uneven=True.*padding"):
        group.add_rank(group.grow(batch(5)))
    with pytest.raises(ChunkError, match="only support equal chunk") as plain:
        group.grow(batch(5)).chunk(2)[0].get()
    assert "register" not in str(plain.value)


def test_a_future_that_differs_in_rows_from_a_padded_batch_is_refused(
    group: Any, wider: Any
) -> None:
    padded = batch(4, auto_padding=True)
    four, eight = group.add_rank_later(padded), wider.add_rank_later(batch(8))
    assert values(group.second(four, four.select("a"))) == [0, 1, 3, 4]
    assert values(group.second(padded, four)) == [0, 1, 3, 4]
    for first, second in ((four, eight), (eight, four), (padded, eight), (eight, padded)):
        with pytest.raises(DispatchError, match=r"equally many rows; argument \d has [48], arg"):
            group.second(first, second)
        with pytest.raises(DispatchError, match="equally many rows"):
            group.second_later(first, second).get()


def test_what_failed_in_a_producer_reaches_the_consumer_as_first_cause(
    group: Any, wider: Any
) -> None:
    broken = DataProto.from_dict({"b": torch.zeros(4)})
    with pytest.raises(KeyError) as caught:
        wider.uneven_rows(group.add_rank_later(broken))
    assert isinstance(caught.value, WorkerError)
    assert caught.value.method == "add_rank_later"


def test_outputs_that_cannot_be_joined_are_said_to_be_their_makers(group: Any, wider: Any) -> None:
    made = group.other_keys(batch(6))
    for read in (made.get, lambda: wider.uneven_rows(made)):
        with pytest.raises(KeyError, match="other_keys: the ranks' outputs cannot be joined"):
            read()


def test_a_timeout_may_be_as_long_as_one_likes(group: Any) -> None:
    for timeout in (math.inf, 1e20):
        future = group.add_rank_later(batch(2))
        assert future.rows(timeout) == 2
        assert values(future.get(timeout=timeout)) == [0, 2]
        assert group.lead.submit(1).result(timeout=timeout) == (0, 1, None)
        assert group.lead.options(timeout_s=timeout)(1) == (0, 1, None)


def test_submit_returns_at_once_and_await_works(group: Any) -> None:
    future = group.add_rank.submit(batch())
    assert values(future.result(timeout=60)) == [0, 1, 2, 4, 5, 6]
    assert future.done()

    async def main() -> list[Any]:
        return await asyncio.gather(*(group.echo.submit(i) for i in range(3)))

    assert asyncio.run(main()) == [[(r, i, None) for r in (0, 1)] for i in range(3)]


def test_an_await_ends_when_it_is_cancelled_and_the_call_does_not(roles: dict[str, Any]) -> None:
    critic = roles["critic"]
    held = [critic.hold.submit(zeros(until="let go")) for _ in range(40)]
    later = critic.hold(zeros(until="let go"))

    async def main() -> str:
        for waited in (held[0], later):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waited, 0.05)
        waiting = [asyncio.ensure_future(future) for future in (*held, later)]
        name = await critic.name.submit()  # more are awaited than asyncio's pool has threads
        assert not any(task.done() for task in waiting)
        return name[0]

    assert asyncio.run(main()) == "critic"  # which cancels them
    assert not held[0].done()
    critic.note("let go")

    async def again() -> list[DataProto]:
        return [await held[0], await later, await later.select("a")]

    assert [values(batch) for batch in asyncio.run(again())] == [[0.0] * 10] * 3


def test_an_awaited_call_that_fails_or_takes_too_long_says_so(
    backend: Backend, group: Any, roles: dict[str, Any]
) -> None:
    broken = DataProto.from_dict({"b": torch.zeros(4)})
    critic = roles["critic"]
    late = critic.hold.options(timeout_s=0.05)

    async def main() -> None:
        for failing in (group.add_rank.submit(broken), group.add_rank_later(broken)):
            with pytest.raises(KeyError):
                await failing
        for send in (late.submit, late)[: 2 if backend.name == "ray" else 1]:
            once_taken(critic.name)
            with pytest.raises(CallTimeoutError, match=r"hold: ranks \[0, 1\] .* after 0.05 s"):
                await send(zeros(rounds=20))

    asyncio.run(main())
    once_taken(critic.name)


def test_a_host_without_a_loop_says_that_it_cannot_drop_a_call(group: Any) -> None:
    before = group.count()
    blocking = group.block.submit(0.5)
    sent = group.echo.submit("once")
    assert not sent.cancel()
    assert sent.result(timeout=30) == [(0, "once", None), (1, "once", None)]
    blocking.result()
    assert group.count() == [count + 1 for count in before]


def test_what_is_made_of_a_padded_future_stays_paddable(group: Any) -> None:
    padded, plain = group.add_rank_later(batch(3, auto_padding=True)), group.grow(batch(1))
    for made in (
        padded.select("a"),
        padded.union(padded.select("a")),
        padded.select("a").union(padded),
        DataProtoFuture.concat([plain.select("a"), padded.select("a"), plain.select("a")]),
    ):
        whole = values(made.get())
        assert len(whole) % 2 == 1
        assert values(group.second(made, made)) == whole
    assert [values(group.second(part, part)) for part in padded.chunk(2)] == [[0, 1], [3]]
    padded = group.add_rank_later(batch(1, auto_padding=True))
    assert values(group.add_rank_later(group.grow(padded)).get()) == [0]


def test_options_choose_ranks_and_a_future_goes_where_it_is_told(group: Any) -> None:
    assert group.echo.options(ranks=[1])("x") == [(1, "x", None)]
    assert values(group.add_rank.options(ranks=[1, 0])(batch(2))) == [1, 1]
    future = group.add_rank_later(batch(4))
    assert future.get(map_location="meta").batch["a"].device.type == "meta"
    assert values(future.get()) == [0, 1, 3, 4]
    assert values(group.add_rank(future)) == [0, 1, 4, 5]
    assert [float(x.batch["a"].sum()) for _, x, _ in group.echo(future)] == [8, 8]


def test_a_pinned_batch_is_sent_as_it_was_and_joins_what_is_elsewhere(
    backend: Backend, group: Any, wider: Any
) -> None:
    data = batch(6)
    pinned = backend.module.pin(data)
    data.batch["a"] += 100
    assert values(group.add_rank(pinned)) == [0, 1, 2, 4, 5, 6]
    assert values(wider.uneven_rows(pinned)) == values(pinned.get()) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(BatchTypeError, match="data must be a DataProto or TensorDict; got int"):
        backend.module.pin(3)
    future, here = group.add_rank_later(batch(4)).select("a"), batch(4).select([], ["s"])
    with pytest.raises(BatchTypeError, match=r"must be a DataProtoFuture; got DataProto: .*pin"):
        future.union(here)
    joined = future.union(backend.module.pin(here)).get()
    assert joined.non_tensor_batch["s"].tolist() == ["s0", "s1", "s2", "s3"]


def test_what_stands_for_a_value_is_itself_for_type_checkers_too(group: Any) -> None:
    future = group.add_rank_later(batch(4))
    assert values(group.add_rank(future.as_input())) == [0, 1, 4, 5]
    seen = group.echo(PerRank("ab").as_input(), y=Broadcast([1]).as_input())
    assert seen == [(0, "a", [1]), (1, "b", [1])]


def test_the_future_of_a_submitted_call_is_refused_with_what_to_pass(group: Any) -> None:
    future = group.add_rank.submit(batch(4))
    with pytest.raises(
        SendError, match=r"argument 0 cannot be sent: a CallFuture .*\.result\(\), or"
    ):
        group.echo(future)
    with pytest.raises(DispatchError, match=r"argument 0 must be .* got CallFuture"):
        group.add_rank(future)
    assert values(group.add_rank(future.result())) == [0, 1, 4, 5]


def test_modes_that_join_nothing_return_handles_in_the_shape_of_the_result(
    backend: Backend, group: Any
) -> None:
    assert backend.get(group.rank_zero_later(1)) == (0, 1, None)
    assert backend.get(group.on_rank_zero([1, 2])) == (0, [1, 2], None)
    assert backend.get(group.one_to_all(3)) == [(0, 3, None), (1, 3, None)]
    assert backend.get(group.all_to_all([4, 5])) == [(0, 4, None), (1, 5, None)]
    assert backend.get(group.dp_compute([6, 7])) == [(0, 6, None), (1, 7, None)]
    assert backend.get(group.custom(8)) == (1, 9, None)


def test_metrics_are_handles_of_every_rank_whatever_the_rows(backend: Backend, group: Any) -> None:
    assert backend.get(group.rows(batch(2))) == [[0], [1]]
    assert backend.get(group.rows(batch(3, auto_padding=True))) == [[0, 1], [2, 2]]
    assert backend.get(group.rows(batch(1, auto_padding=True))) == [[0], [0]]
    assert backend.get(group.rows_uneven(batch(3))) == [[0, 1], [2]]
    assert backend.get(group.rows_uneven(batch(1))) == [[0], []]


@pytest.mark.parametrize("mode", ["proto", "func", "in_mesh"])
def test_modes_that_join_batches_return_a_future_of_the_callers_rows(group: Any, mode: str) -> None:
    arguments = [stamp] if mode == "func" else []

    def call(name: str, rows: int, **options: Any) -> DataProtoFuture:
        future = getattr(group, name)(*arguments, batch(rows, **options))
        assert isinstance(future, DataProtoFuture)
        return future

    assert values(call(mode, 4).get(timeout=60)) == [0, 1, 12, 13]
    for rows, expected in ((0, []), (1, [0]), (3, [0, 1, 12]), (5, [0, 1, 2, 13, 14])):
        for future in (call(f"{mode}_uneven", rows), call(mode, rows, auto_padding=bool(rows))):
            assert len(future) == rows
            assert values(future.get(timeout=60)) == expected
    with pytest.raises(DispatchError, match=r"only support equal chunk.* 3 and chunk 2"):
        call(mode, 3)
