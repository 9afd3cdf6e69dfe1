"""The line that a terminal shows while something takes long."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from single_controller.base import progress
from single_controller.base.progress import patiently


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self, ready_at: float) -> None:
        self.now, self.ready_at, self.asked = 0.0, ready_at, []

    def attempt(self, seconds: float | None) -> str:
        self.asked.append(seconds)
        wait = self.ready_at - self.now if seconds is None else seconds
        if self.now + wait < self.ready_at:
            self.now += wait
            raise TimeoutError(f"{wait:g}")
        self.now = max(self.now, self.ready_at)
        return "value"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def start(ready_at: float, stream: Any) -> Clock:
        clock = Clock(ready_at)
        monkeypatch.setattr(time, "monotonic", lambda: clock.now)
        monkeypatch.setattr(sys, "stderr", stream)
        return clock

    return start


def test_a_long_wait_shows_how_things_stand_and_leaves_nothing(on: Callable[..., Clock]) -> None:
    terminal = Terminal()
    clock = on(3.2, terminal)
    told = iter(["0 of 2", "1 of 2", "1 of 2", "1 of 2"])
    assert patiently(clock.attempt, TimeoutError, None, lambda: next(told)) == "value"
    lines = terminal.getvalue().split("\r\x1b[2K")
    assert lines[1:] == ["0 of 2, 2 s", "1 of 2, 2 s", "1 of 2, 2 s", "1 of 2, 3 s", ""]
    assert not progress._drawing.locked()


def test_a_short_wait_and_one_without_a_terminal_write_nothing(on: Callable[..., Clock]) -> None:
    for ready_at, stream in ((1.0, Terminal()), (100.0, io.StringIO())):
        clock = on(ready_at, stream)
        assert patiently(clock.attempt, TimeoutError, None, lambda: "never") == "value"
        assert stream.getvalue() == ""
    assert clock.asked == [None]


def test_a_deadline_ends_the_wait_when_it_should(on: Callable[..., Clock]) -> None:
    terminal = Terminal()
    clock = on(100.0, terminal)
    with pytest.raises(TimeoutError):
        patiently(clock.attempt, TimeoutError, 4.0, lambda: "0 of 2")
    assert clock.now == 4.0
    assert terminal.getvalue().endswith("\r\x1b[2K")


def test_one_thread_draws_at_a_time(on: Callable[..., Clock]) -> None:
    terminal = Terminal()
    clock = on(5.0, terminal)
    with progress._drawing:
        assert patiently(clock.attempt, TimeoutError, None, lambda: "mine") == "value"
    assert terminal.getvalue() == ""


def test_an_error_of_what_is_waited_for_comes_through(on: Callable[..., Clock]) -> None:
    terminal = Terminal()
    clock = on(2.0, terminal)

    def fails(seconds: float | None) -> str:
        clock.attempt(seconds)
        raise KeyError("lost")

    with pytest.raises(KeyError):
        patiently(fails, TimeoutError, None, lambda: "0 of 2")
    assert terminal.getvalue().endswith("\r\x1b[2K")
