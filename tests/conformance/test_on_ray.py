"""What only Ray's groups do: what travels how, and ranks that do not come back in time."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import numpy as np
import pytest
import ray
import torch

from single_controller import CallTimeoutError
from single_controller.ray import RayWorkerGroup
from single_controller.ray import outbox as outbox_module
from tests.conformance.probe import batch, values

pytestmark = pytest.mark.parametrize("backend", ["ray"], indirect=True)


def test_ranks_that_collect_ignores_return_nothing(group: RayWorkerGroup) -> None:
    pending = group.replicated.submit(batch(3))._pending
    silent, answering = ray.get(pending._refs)
    assert silent is None
    assert values(answering) == [1, 2, 3]


def test_a_process_bears_the_name_of_the_method_that_it_runs(group: RayWorkerGroup) -> None:
    for given in ((), (1,)):
        titles = [title.split("\0")[0] for title in group.process_title(*given)]
        assert titles == [f"ray::{group.role}.process_title"] * 2


def test_a_large_argument_that_several_ranks_get_is_stored_once(
    group: RayWorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[Any] = []
    put = ray.put
    monkeypatch.setattr(
        outbox_module.ray, "put", lambda value: (stored.append(value), put(value))[1]
    )
    big = torch.zeros(10_000)
    group.echo(big, y=big)
    (parcel,) = stored
    assert len(pickle.loads(pickle.dumps(parcel, 5))._values) == 1
    group.echo({"nested": [big]})
    group.echo([0] * 1_000)  # as a pickle, 2 kB
    group.echo(circular := [1], y=circular.append(circular))
    group.replicated(batch(5_000))
    for small in (torch.eye(3).to_sparse(), np.add, np.mean):
        group.echo([small])
    assert len(stored) == 3
    group.add_rank(batch(10_000))
    assert len(stored) == 3


def test_small_arguments_go_to_each_rank_with_its_call(
    group: RayWorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module.ray, "put", None)
    assert values(group.replicated(batch(3))) == [1, 2, 3]
    settings = {"lr": 1e-5, "names": ("a", b"b"), "rows": np.array(["one", None], object)}
    for _, x, y in group.echo(settings, y=torch.arange(3)):
        assert (x["lr"], x["names"], x["rows"].tolist()) == (1e-5, ("a", b"b"), ["one", None])
        assert y.tolist() == [0, 1, 2]


def test_explain_says_what_a_call_would_do_and_does_nothing(group: RayWorkerGroup) -> None:
    before, big, ref = group.count(), torch.zeros(10_000), ray.put(1)
    told = group.explain("echo", big, y=ref)
    assert [(a.rank, a.name, a.travels, a.shared_with) for a in told.arguments] == [
        (0, "x", "by reference, stored once", (1,)),
        (0, "y", "fetched by the rank", (1,)),
        (1, "x", "by reference, stored once", (0,)),
        (1, "y", "fetched by the rank", (0,)),
    ]
    assert told.arguments[0].bytes > 40_000
    told = group.explain("add_rank", batch(6))
    assert [(a.rank, a.rows, a.keys, a.travels) for a in told.arguments] == [
        (rank, 3, ("a", "s"), "by value") for rank in (0, 1)
    ]
    assert "returns one batch, the rows of ranks 0, 1" in str(told)
    assert group.explain("scatter", lambda: 1).arguments[0].bytes
    assert group.explain("echo", "short").arguments[0].travels == "within the call"
    assert group.explain("echo", torch.zeros(3)).arguments[0].travels == "by value"
    assert group.count() == before


def test_references_inside_an_argument_that_is_stored_once_stay_valid(
    group: RayWorkerGroup,
) -> None:
    group.keep([ray.put(np.ones(300_000))])
    gc.collect()
    group.block(0.5)
    assert group.kept_sum() == [300_000.0] * 2


def test_waiting_a_moment_for_a_future_gives_nothing_up(group: RayWorkerGroup) -> None:
    future = group.block.submit(1.5)
    with pytest.raises(CallTimeoutError):
        future.result(timeout=0.1)
    assert len(group.count()) == 2
    assert future.result() == [None, None]


def test_a_deadline_names_the_ranks_that_missed_it(group: RayWorkerGroup) -> None:
    with pytest.raises(CallTimeoutError, match=r"block: ranks \[0, 1\] of 2") as caught:
        group.block.options(timeout_s=0.2)(1.5)
    assert caught.value.pending_ranks == (0, 1)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] are still in a call"):
        group.count()
    group._hosts.settle(60)
    assert len(group.count()) == 2
