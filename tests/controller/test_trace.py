"""Traces of calls through Ray: bytes, full buffers, and processes that end."""

from __future__ import annotations

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


class Stepper(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto) -> DataProto:
        with span("forward", rows=len(batch)):
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


def test_each_process_keeps_the_newest_spans_up_to_its_capacity(group: Any, tmp_path: Path) -> None:
    with trace(tmp_path / "t.json", capacity=2) as recorded:
        update(group)
    assert len(slices(recorded)) == 3 * 2
    assert len(recorded.content["otherData"]["full"]) == 3


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
