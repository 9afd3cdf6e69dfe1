"""Traces of calls through Ray: what is in them, on one clock, whatever becomes of a worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from protocol import DataProto
from single_controller import Worker, span, trace
from single_controller.base import spans
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, colocate


class Stepper(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto) -> DataProto:
        with span("forward", rows=len(batch)):
            return batch

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def recording(self) -> bool:
        return spans.recording() is not None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def other_clock(self) -> None:
        """As if this process were on another machine, whose clock is a day ahead."""
        own, spans.clock_id = spans.now_ns, lambda: "another machine"
        spans.now_ns = lambda: own() + 86_400 * 10**9


class AsyncStepper(Stepper):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    async def update_async(self, batch: DataProto) -> DataProto:
        with span("forward", rows=len(batch)):
            return batch


def batch() -> DataProto:
    return DataProto.from_dict({"x": torch.zeros(4, 100)})


def complete(recorded: trace, **of: Any) -> list[dict[str, Any]]:
    events = [e for e in recorded.content["traceEvents"] if e["ph"] == "X"]
    return [e for e in events if all(e[key] == value for key, value in of.items())]


def test_a_trace_holds_each_part_of_a_call_in_order_and_the_users_spans(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    with colocate(pool, sync=Stepper, other=AsyncStepper) as group:
        with trace(tmp_path / "t.json") as recorded:
            group.sync.update(batch())
            group.other.update_async(batch())
        assert group.sync.recording() == [False, False]
        untraced = len(complete(recorded))
    for title, number in (("sync.update", 0), ("other.update_async", 1)):
        call = complete(recorded, cat="dispatch")[number]["args"]["call"]
        parts = [e for e in complete(recorded) if e["args"].get("call") == call]
        at = {e["cat"]: e for e in parts if e["pid"] in (0, 1)}
        for earlier, later in (
            ("dispatch", "wait"), ("wait", "collect"), ("queue", "deserialise"),
            ("deserialise", "run"), ("run", "serialise"),
        ):  # fmt: skip
            assert at[earlier]["ts"] + at[earlier]["dur"] <= at[later]["ts"] + 0.01
        assert at["dispatch"]["ts"] <= at["queue"]["ts"]
        assert at["serialise"]["ts"] <= at["wait"]["ts"] + at["wait"]["dur"]
        assert at["run"]["name"] == title
        assert at["run"]["ts"] <= at["user"]["ts"]
        assert at["user"]["args"] == {"rows": 2, "call": call}
        assert at["dispatch"]["args"]["bytes_out"] > 1_600
        assert at["wait"]["args"]["bytes_in"] > 1_600
        assert len([e for e in parts if e["cat"] == "run"]) == 2
    assert len(complete(recorded)) == untraced


def test_a_group_that_ends_within_a_trace_leaves_its_spans(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    with (
        trace(tmp_path / "t.json") as recorded,
        RayWorkerGroup(pool, RayClassWithInitArgs(Stepper)) as group,
    ):
        group.update(batch())
    assert len(complete(recorded, name="forward")) == 2
    assert recorded.content["otherData"]["missing"] == []


def test_a_worker_that_died_loses_its_own_spans_alone_and_the_trace_says_so(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Stepper)) as group:
        with trace(tmp_path / "t.json") as recorded:
            group.update(batch())
            os.kill(group.describe().rows[1].pid, signal.SIGKILL)
        assert len(complete(recorded, name="forward")) == 1
        [missing] = recorded.content["otherData"]["missing"]
        assert "Stepper rank 1" in missing


def test_a_machine_with_another_clock_is_brought_to_the_drivers(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Stepper)) as group:
        group.other_clock.options(ranks=[1])()
        with trace(tmp_path / "t.json") as recorded:
            group.update(batch())
    runs = {e["pid"]: e for e in complete(recorded, cat="run")}
    [dispatch], [wait] = complete(recorded, cat="dispatch"), complete(recorded, cat="wait")
    [uncertainty] = recorded.content["otherData"]["clock_uncertainty_us"].values()
    for run in runs.values():
        assert run["ts"] >= dispatch["ts"] - uncertainty
        assert run["ts"] + run["dur"] <= wait["ts"] + wait["dur"] + uncertainty
    assert len(runs) == 2
    assert uncertainty > 0


@pytest.mark.parametrize("capacity", [2])
def test_each_process_keeps_the_newest_spans_up_to_its_capacity(
    pool: RayResourcePool, tmp_path: Path, capacity: int
) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Stepper)) as group:
        with trace(tmp_path / "t.json", capacity=capacity) as recorded:
            group.update(batch())
        assert len(complete(recorded)) == 3 * capacity
        assert len(recorded.content["otherData"]["dropped"]) == 3
        assert ray.is_initialized()
