"""Traces of calls through Ray: bytes, full buffers, and processes that end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol import DataProto
from single_controller import Worker, span, trace
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.slices import slices

CLOCK = """
import os, time
ahead = int(os.environ["CLOCK_AHEAD_S"])
for name, units in (("time", 1), ("time_ns", 1_000_000_000)):
    setattr(time, name, lambda real=getattr(time, name), far=ahead * units: real() + far)
"""


class Stepper(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto) -> DataProto:
        with span("forward", rows=len(batch)):
            return batch

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def send_on(self, batch: DataProto) -> DataProto:
        with span("backward"):
            return batch

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def notes_nothing(self) -> bool:
        return span("x") is span("y")


@pytest.fixture(scope="module")
def group(pool: RayResourcePool) -> Iterator[Any]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Stepper)) as steppers:
        yield steppers


def update(group: Any) -> None:
    group.update(DataProto.from_dict({"x": torch.zeros(4, 100)}))


def test_a_trace_tells_bytes_and_workers_note_nothing_after_it(group: Any, tmp_path: Path) -> None:
    with trace(tmp_path / "t.json") as recorded:
        update(group)
    assert group.notes_nothing() == [True, True]
    args = {event["part"]: event["args"] for event in slices(recorded)}
    assert args["dispatch"]["bytes_out"] > 1_600
    assert args["wait"]["bytes_in"] > 1_600
    assert args["serialise"]["bytes"] > 800


@pytest.mark.slow
def test_spans_stand_in_their_order_whatever_clocks_their_processes_have(
    pool: RayResourcePool, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)  # Python runs it before all else
    groups, spec = [], RayClassWithInitArgs(Stepper)
    with contextlib.ExitStack() as stack:
        for hours in (2, -2):
            path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
            env = {"PYTHONPATH": path, "CLOCK_AHEAD_S": str(3_600 * hours)}
            own = stack.enter_context(RayResourcePool([1], cpus_per_process=0.5))
            groups.append(stack.enter_context(RayWorkerGroup(own, spec, worker_env=env)))
        with trace(tmp_path / "t.json") as recorded:
            late, early = (g.send_on(DataProto.from_dict({"x": torch.zeros(4)})) for g in groups)
            groups[0].update(early)
            groups[1].update(late)
    ahead, behind = recorded.content["otherData"]["clocks_ahead_ms"].values()
    assert 7_100_000 < ahead < 7_300_000
    assert -7_300_000 < behind < -7_100_000
    found: dict[int, dict[tuple[str, int], tuple[float, float]]] = {}
    for e in slices(recorded):
        if e["name"] != "publish":  # of a call that has ended
            times = e["ts"], e["ts"] + e["dur"]
            found.setdefault(e["args"]["call"], {})[e["part"], e["pid"]] = times
    for call in found.values():
        pid = max(pid for _, pid in call)
        assert call["dispatch", 0][0] <= call["queue", pid][0]
        assert call["queue", pid][1] <= call["run", pid][0] <= call["user", pid][0]
        if ("collect", 0) in call:
            assert call["serialise", pid][1] <= call["collect", 0][0]
    assert sum(("collect", 0) in call for call in found.values()) == 2


@pytest.mark.slow
def test_processes_that_end_within_a_trace_leave_their_spans_and_one_that_died_loses_its_own(
    group: Any, tmp_path: Path
) -> None:
    """The last test of the group: it is broken afterwards."""
    with trace(tmp_path / "t.json") as recorded:
        update(group)
        group.restart()
        update(group)
        os.kill(group.describe().rows[1].pid, signal.SIGKILL)
    assert len(slices(recorded, "user")) == 2 + 1
    [missing] = recorded.content["otherData"]["missing"]
    assert "Stepper rank 1" in missing
