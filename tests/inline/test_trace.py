"""Traces and sums of calls that run in the driver's own process: as on Ray, rank by rank."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from single_controller import ClassWithInitArgs, PerRank, ResourcePool, Worker, span, trace
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import InlineWorkerGroup
from single_controller.timeline import Timeline


class Busy(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def work(self, ms: float) -> None:
        with span("inside", rank=self.rank):
            until = time.perf_counter() + ms / 1_000
            while time.perf_counter() < until:
                pass

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fail(self) -> None:
        raise LookupError


class AsyncBusy(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def work(self, ms: float) -> None:
        with span("inside", rank=self.rank):
            await asyncio.sleep(ms / 1_000)


def events(file: Path, category: str) -> list[dict[str, Any]]:
    return [event for event in Timeline.read(file).events if event["cat"] == category]


def end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


@pytest.mark.parametrize("cls", [Busy, AsyncBusy])
def test_a_trace_has_each_ranks_run_as_a_process_of_its_own_and_outside_dispatch(
    cls: Any, tmp_path: Path
) -> None:
    file = tmp_path / "t.json"
    with (
        trace(file),
        InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(cls)) as group,
    ):
        group.work(PerRank([5, 20]))
    row = group.stats()["work"]
    runs, [dispatch] = events(file, "run"), events(file, "dispatch")
    timeline = Timeline.read(file)
    ranks = [timeline.processes[run["pid"]].partition(" on ")[0] for run in runs]
    assert ranks == [f"{cls.__name__} rank {rank}" for rank in (0, 1)]
    assert all(end(dispatch) <= 0.01 + run["ts"] for run in runs)
    assert max(map(end, runs)) <= max(map(end, events(file, "wait"))) + 0.01
    assert runs[1]["dur"] >= 19_000
    assert row.wait_s >= runs[1]["dur"] / 1e6
    assert row.dispatch_s == pytest.approx(dispatch["dur"] / 1e6)
    inside = events(file, "user")
    assert [(e["pid"], e["args"]["rank"]) for e in inside] == [
        (r["pid"], i) for i, r in enumerate(runs)
    ]
    assert {e["args"]["call"] for e in inside} == {dispatch["args"]["call"]}
    [times] = timeline.methods()
    assert times.slowest in ranks
    assert times.ms["wait"] >= 19


def test_a_run_that_raises_is_in_the_trace_and_none_is_after_it(tmp_path: Path) -> None:
    with InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(Busy)) as group:
        for file in (tmp_path / "first.json", tmp_path / "second.json"):
            group.work(0)
            with trace(file), pytest.raises(LookupError):
                group.fail()
            assert len(events(file, "run")) == 2
            assert events(file, "user") == []
