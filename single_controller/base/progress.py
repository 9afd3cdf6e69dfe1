"""Says what is still waited for: a line on a terminal, gone at the end, and after a minute the log.

A thread of its own says so, and whoever waits does so undisturbed. What there is to say is theirs.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable

__all__ = ["shown_seconds", "waiting"]

_logger = logging.getLogger(__name__)

_LINE_S = 1.5
_LOG_S = 60.0  # and then after twice as long, and so on
_EVERY_S = 0.5
_CLEAR = "\r\x1b[2K"


def shown_seconds(seconds: float | None) -> str:
    """For messages: to the millisecond, without zeros behind."""
    return f"{round(seconds or 0, 3):g}"


class waiting:  # noqa: N801 — used as a function is
    """Within this context something is waited for. `tell` says how things stand, in few words; it
    is called in another thread, and what it raises says that there is nothing to say.
    """

    def __init__(self, tell: Callable[[], str]) -> None:
        self._tell, self._began, self._log_s = tell, time.monotonic(), _LOG_S
        self._drawn = False

    def __enter__(self) -> None:
        global _started
        with _changed:
            _waits.add(self)
            if not _started:
                threading.Thread(target=_watch, daemon=True, name="waiting").start()
                _started = True
            _changed.notify()

    def __exit__(self, *_: object) -> None:
        with _changed:
            _waits.discard(self)
            self._tell = str  # what it asks is let go of here: in that thread, Ray may be ending
            self._clear()

    def look(self, drawing: bool) -> bool:
        """Say what is due; whether this wait has the line, which is free for it if `drawing`."""
        seconds = time.monotonic() - self._began
        drawing = drawing and seconds >= _LINE_S and sys.stderr.isatty()
        if not drawing and seconds < self._log_s:
            return False
        try:
            standing = self._tell()
        except Exception:  # what it asks is gone
            return False
        with _changed:
            if self not in _waits:  # it has ended meanwhile
                return False
            if seconds >= self._log_s:
                self._log_s = 2 * seconds
                self._clear()
                _logger.warning("still waiting after %.0f s: %s", seconds, standing)
            if drawing:
                width = shutil.get_terminal_size().columns - 1
                self._drawn = True
                sys.stderr.write(_CLEAR + f"{standing}, {seconds:.0f} s"[:width])
                sys.stderr.flush()
        return drawing

    def _clear(self) -> None:
        if self._drawn:
            self._drawn = False
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()


_changed = threading.Condition()
_started = False
_waits: weakref.WeakSet[waiting] = weakref.WeakSet()  # one that was interrupted is gone of itself


def _watch() -> None:
    pause = threading.Event()
    while True:
        with _changed:
            while not len(_waits):
                _changed.wait()
            oldest_first = sorted(_waits, key=lambda wait: wait._began)
        drawn = False  # one line for all
        for wait in oldest_first:
            drawn = wait.look(not drawn) or drawn
        del oldest_first
        pause.wait(_EVERY_S)
