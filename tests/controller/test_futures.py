"""Calls that do not block: references, futures of batches, deadlines, cancelling."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest
import ray
import torch

from protocol import DataProto, DataProtoFuture
from single_controller import CallTimeoutError, WorkerError
from single_controller.ray import RayWorkerGroup
from tests.controller.probe import batch, values


def test_without_blocking_references_come_in_the_shape_of_the_result(
    group: RayWorkerGroup,
) -> None:
    assert ray.get(group.later("x")) == [(0, "x"), (1, "x")]


def test_a_future_goes_to_a_group_of_another_size_by_rows(
    group: RayWorkerGroup, three: RayWorkerGroup
) -> None:
    future = group.grow(batch(5))
    assert isinstance(future, DataProtoFuture)
    assert len(future) == 7
    assert values(three.uneven_rows(future)) == [0, 1, 2, 3, 3, 4, 4]
    chained = group.add_rank_later(three.grow(batch(3)))
    assert values(chained.get()) == [0, 1, 1, 3, 3, 3]


def test_a_future_that_does_not_divide_is_refused_where_its_rows_are_known(
    group: RayWorkerGroup,
) -> None:
    with pytest.raises(AssertionError, match="only support equal chunk"):
        group.add_rank(group.grow(batch(5)))


def test_what_failed_in_a_producer_reaches_the_consumer_as_first_cause(
    group: RayWorkerGroup, three: RayWorkerGroup
) -> None:
    broken = DataProto.from_dict({"b": torch.zeros(4)})
    with pytest.raises(KeyError) as caught:
        three.uneven_rows(group.add_rank_later(broken))
    assert isinstance(caught.value, WorkerError)
    assert caught.value.method == "add_rank_later"


def test_submit_returns_at_once_and_await_works(group: RayWorkerGroup) -> None:
    future = group.add_rank.submit(batch())
    assert values(future.result(timeout=60)) == [0, 1, 2, 4, 5, 6]
    assert future.done()

    async def main() -> list[Any]:
        return await asyncio.gather(*(group.echo.submit(i) for i in range(3)))

    assert asyncio.run(main()) == [[(r, i, None) for r in (0, 1)] for i in range(3)]


def test_a_host_without_a_loop_says_that_it_cannot_drop_a_call(group: RayWorkerGroup) -> None:
    before = group.count()
    blocking = group.block.submit(0.5)
    sent = group.echo.submit("once")
    assert not sent.cancel()
    assert sent.result(timeout=30) == [(0, "once", None), (1, "once", None)]
    blocking.result()
    assert group.count() == [count + 1 for count in before]


def test_references_inside_an_argument_that_is_stored_once_stay_valid(
    group: RayWorkerGroup,
) -> None:
    group.keep([ray.put(np.ones(300_000))])
    gc.collect()
    group.block(0.5)
    assert group.kept_sum() == [300_000.0] * 2


def test_rows_that_were_padded_stay_paddable_along_a_chain(group: RayWorkerGroup) -> None:
    padded = group.add_rank_later(batch(1, auto_padding=True))
    assert values(group.add_rank_later(group.grow(padded)).get()) == [0]


def test_waiting_a_moment_for_a_future_gives_nothing_up(group: RayWorkerGroup) -> None:
    future = group.block.submit(1.5)
    with pytest.raises(CallTimeoutError):
        future.result(timeout=0.1)
    assert len(group.count()) == 2
    assert future.result() == [None, None]


def test_options_choose_ranks_and_a_deadline(group: RayWorkerGroup) -> None:
    assert group.echo.options(ranks=[1])("x") == [(1, "x", None)]
    assert values(group.add_rank.options(ranks=[1, 0])(batch(2))) == [1, 1]
    with pytest.raises(CallTimeoutError, match=r"block: ranks \[0, 1\] of 2") as caught:
        group.block.options(timeout_s=0.2)(1.5)
    assert caught.value.pending_ranks == (0, 1)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] are still in a call"):
        group.count()
    group._hosts.settle(60)
    assert len(group.count()) == 2
