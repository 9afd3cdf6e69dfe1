"""docs/one_call.md names every file that a blocking call passes, and functions in their order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

import single_controller
from protocol import DataProto
from single_controller import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

PACKAGE = Path(single_controller.__file__).parent
PAGE = PACKAGE.parent / "docs" / "one_call.md"
MOST_FILES = 12


class Follower:
    """Notes each function of the package that is called in this thread."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            self.calls.append(f"{path.relative_to(PACKAGE)}: {frame.f_code.co_name}")


class Followed(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def follow(self) -> None:
        self.follower = Follower()
        sys.setprofile(self.follower)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto) -> DataProto:
        self.follower.calls.append("the method")
        return batch

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def followed(self) -> list[str]:
        sys.setprofile(None)
        return self.follower.calls


def first_after(calls: list[str], start: int, name: str) -> int:
    return calls.index(name, start) if name in calls[start:] else -1


def test_the_page_is_the_path_of_a_call(pool: RayResourcePool) -> None:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Followed)) as group:
        batch = DataProto.from_dict({"x": torch.arange(4)})
        group.follow()
        group.update(batch)  # what is made on first use is there
        group.follow()
        here = Follower()
        sys.setprofile(here)
        group.update(batch)
        sys.setprofile(None)
        there = group.followed()[0]
    wait = first_after(here.calls, 0, "ray/remote_batch.py: wait")
    call = first_after(there, 0, "ray/host.py: call")
    path = [*here.calls[: wait + 1], *there[call:], *here.calls[wait + 1 :]]

    named = re.findall(r"`((?:base|ray)/\w+\.py(?:: \w+)?)`", PAGE.read_text())
    files = {name.partition(":")[0] for name in path if ":" in name}
    assert sorted({name.partition(":")[0] for name in named}) == sorted(files)
    assert len(files) <= MOST_FILES
    at = 0
    for name in named:
        if ":" in name and not name.startswith(("base/trace.py", "ray/failure.py")):
            found = first_after(path, at, name)
            assert found >= 0, f"{name} does not come after what the page names before it"
            at = found
