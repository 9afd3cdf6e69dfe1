"""A line on a terminal while something takes long; silent everywhere else, and gone at the end.

What is waited for, and what there is to say about it, is the caller's.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["patiently", "shown_seconds"]

T = TypeVar("T")

_FIRST_S = 1.5
_EVERY_S = 0.5
_CLEAR = "\r\x1b[2K"
_drawing = threading.Lock()  # one line for all threads


def shown_seconds(seconds: float | None) -> str:
    """For messages: to the millisecond, without zeros behind."""
    return f"{round(seconds or 0, 3):g}"


def patiently(
    attempt: Callable[[float | None], T],
    expired: type[Exception],
    timeout_s: float | None,
    tell: Callable[[], str],
) -> T:
    """`attempt(timeout_s)`; on a terminal in pieces, with a line that says how things stand.

    Args:
        attempt: waits at most so many seconds (None: for ever), and raises `expired` if that was
            not enough; it can be called again then.
        tell: what the line says, before the seconds since the beginning.
    """
    if not sys.stderr.isatty():
        return attempt(timeout_s)
    began, step = time.monotonic(), _FIRST_S
    deadline = None if timeout_s is None else began + timeout_s
    mine = False
    try:
        while deadline is None or time.monotonic() + step < deadline:
            try:
                return attempt(step)
            except expired:
                mine = mine or _drawing.acquire(blocking=False)
                if mine:
                    _draw(f"{tell()}, {time.monotonic() - began:.0f} s")
            step = _EVERY_S
        return attempt(max(0.0, deadline - time.monotonic()))
    finally:
        if mine:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()
            _drawing.release()


def _draw(text: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(_CLEAR + text[:width])
    sys.stderr.flush()
