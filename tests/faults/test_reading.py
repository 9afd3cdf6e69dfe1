"""What faulthandler writes, read: which threads and frames count, and what is a collective."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

import single_controller
from single_controller.ray.stacks import collective, readable

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
BACKGROUND = [(PYTHON / "threading.py", "wait"), (RAY / "_private/gc.py", "run")]


def dump(*threads: list[tuple[object, str]]) -> str:
    parts = [
        f"Thread 0x{i} (most recent call first):\n"
        + "".join(f'  File "{file}", line 7 in {name}\n' for file, name in frames)
        for i, frames in enumerate(threads)
    ]
    return "\n".join(parts)


def names(text: str) -> list[str]:
    return [line.rpartition(" in ")[2] for line in text.splitlines() if " in " in line]


def test_frames_below_the_users_and_threads_that_only_serve_are_left_out() -> None:
    text = readable(dump(BACKGROUND, [(PYTHON / "threading.py", "wait"), ("/u.py", "f"), *SERVES]))
    assert names(text) == ["wait", "f"]


def test_a_thread_of_the_users_is_shown_after_the_main_one() -> None:
    other = [("/u.py", "load"), (PYTHON / "threading.py", "run")]
    text = readable(dump(other, [("/u.py", "f"), *SERVES]))
    assert names(text) == ["f", "load"]


def test_a_process_that_was_asked_twice_is_shown_as_it_was_last() -> None:
    twice = dump([("/u.py", "f"), *SERVES]) + "\n" + dump([("/u.py", "g"), *SERVES])
    assert names(readable(twice)) == ["g"]


def test_a_call_that_waits_in_our_own_code_is_still_shown() -> None:
    assert names(readable(dump([(RAY / "_private/worker.py", "get"), *SERVES]))) == ["get"]


def test_a_process_between_calls_and_one_without_a_stack_say_so() -> None:
    assert readable(dump(BACKGROUND, SERVES[2:])) == "  in no call"
    assert readable("no stack: process 7 has ended") == "no stack: process 7 has ended"


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
