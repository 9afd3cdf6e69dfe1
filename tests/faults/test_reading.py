"""What faulthandler writes, read: which threads and frames count, and what is a collective."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

import single_controller
from single_controller.ray.process import collective, readable

RAY = Path(ray.__file__).parent
OURS = Path(single_controller.__file__).parent
PYTHON = Path(os.__file__).parent
TORCH = "/x/site-packages/torch"

SERVES = [
    (OURS / "ray/host.py", "call"),
    (RAY / "_private/function_manager.py", "actor_method_executor"),
    (RAY / "_private/worker.py", "main_loop"),
    (RAY / "_private/workers/default_worker.py", "<module>"),
]
WAIT = (PYTHON / "threading.py", "wait")
BACKGROUND = [WAIT, (RAY / "_private/gc.py", "run")]


def dump(*threads: list[tuple[object, str]]) -> str:
    parts = [
        f"Thread 0x{i} (most recent call first):\n"
        + "".join(f'  File "{file}", line 7 in {name}\n' for file, name in frames)
        for i, frames in enumerate(threads)
    ]
    return "\n".join(parts)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (dump(BACKGROUND, [WAIT, ("/u.py", "f"), *SERVES]), ["wait", "f"]),
        (dump([("/u.py", "load"), WAIT], [("/u.py", "f"), *SERVES]), ["f", "load"]),
        (dump([("/u.py", "f"), *SERVES]) + "\n" + dump([("/u.py", "g"), *SERVES]), ["g"]),
        (dump([(RAY / "_private/worker.py", "get"), *SERVES]), ["get"]),
        (dump(BACKGROUND, SERVES[2:]), ["no call"]),
        (dump([(OURS.parent / "protocol/device_memory.py", "_await_end"), WAIT]), ["no call"]),
        ("no stack: it does not answer in time", ["time"]),
    ],
    ids=[
        "serving",
        "own thread",
        "asked twice",
        "in our own code",
        "between calls",
        "batches wait",
        "no stack",
    ],
)
def test_only_what_runs_for_the_user_is_shown_and_as_it_was_last(
    written: str, names: list[str]
) -> None:
    lines = [line for line in readable(written).splitlines() if " in " in line]
    assert [line.rpartition(" in ")[2] for line in lines] == names


@pytest.mark.parametrize(
    ("innermost", "found"),
    [
        (f"{TORCH}/distributed/distributed_c10d.py", True),
        (f"{TORCH}/nn/functional.py", False),
        ("/u.py", False),
    ],
)
def test_only_the_innermost_frame_tells_a_collective(innermost: str, found: bool) -> None:
    wrapped = [(innermost, "f"), (f"{TORCH}/distributed/fsdp/wrap.py", "forward"), *SERVES]
    assert (collective(dump(BACKGROUND, wrapped)) is not None) is found
