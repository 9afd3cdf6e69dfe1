"""Waiting for what a cluster learns a moment later."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from single_controller import GroupBrokenError


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Poll `condition` until it holds or the time is up; whether it held."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        pause.wait(0.05)
    return condition()


def once_taken(call: Callable[[], Any]) -> Any:
    """What `call` returns as soon as its group takes calls again, after one that was given up."""
    found: list[Any] = []

    def taken() -> bool:
        with contextlib.suppress(GroupBrokenError):
            found[:] = found or [call()]
        return bool(found)

    assert eventually(taken)
    return found[0]
