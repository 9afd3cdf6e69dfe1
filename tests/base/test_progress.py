"""What a terminal and the log are told while something takes long."""

from __future__ import annotations

import gc
import io
import logging
import sys
import threading
import weakref
from typing import Any

import pytest

from single_controller.base import progress
from single_controller.base.progress import waiting
from tests.waiting import eventually

CLEAR = "\r\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes as the test says; only the test looks at what is due."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", type("", (), {"monotonic": clock}))
    monkeypatch.setattr(progress, "_started", True)
    return clock


def terminal_for(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def after(clock: Clock, seconds: float, wait: waiting, drawing: bool = True) -> bool:
    clock.now = seconds
    return wait.look(drawing)


def test_a_long_wait_shows_on_a_terminal_how_things_stand_and_leaves_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_for(monkeypatch)
    told = iter(["0 of 2", "1 of 2"])
    wait = waiting(lambda: next(told))
    with wait:
        assert not after(clock, 1.0, wait)
        assert after(clock, 1.5, wait)
        assert after(clock, 2.6, wait)
    assert terminal.getvalue().split(CLEAR)[1:] == ["0 of 2, 2 s", "1 of 2, 3 s", ""]
    assert not after(clock, 5.0, wait)


def test_one_wait_has_the_line_and_a_short_one_writes_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_for(monkeypatch)
    for seconds, drawing in ((50, False), (1, True)):
        wait = waiting(lambda: "never")
        with wait:
            assert not after(clock, clock.now + seconds, wait, drawing)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_wait_without_end_is_logged_after_a_minute_and_then_ever_more_rarely(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_terminal: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if on_terminal else io.StringIO())
    wait = waiting(lambda: "actor.update: 1 of 2 ranks ready, waiting for 1")
    with wait, caplog.at_level(logging.WARNING):
        for seconds in range(0, 1_000, 10):
            assert after(clock, float(seconds), wait) == (on_terminal and seconds > 0)
    assert caplog.messages == [
        f"still waiting after {seconds} s: actor.update: 1 of 2 ranks ready, waiting for 1"
        for seconds in (60, 120, 240, 480, 960)
    ]


def test_one_that_cannot_say_how_things_stand_says_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = terminal_for(monkeypatch)

    def tell() -> str:
        raise RuntimeError("the cluster is gone")

    wait = waiting(tell)
    with wait:
        assert not after(clock, 100.0, wait)
    assert (terminal.getvalue(), caplog.messages) == ("", [])


def test_a_thread_says_so_while_others_wait_and_forgets_who_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_LOG_S", 0.0)
    threads: list[Any] = []

    def tell() -> str:
        threads.append(threading.current_thread().name)
        return "sleeps"

    waiting(lambda: "interrupted before it could end").__enter__()
    gc.collect()
    with waiting(tell):
        assert eventually(lambda: bool(threads))
    assert set(threads) == {"waiting"}
    assert not any("interrupted" in message for message in caplog.messages)


def test_what_was_asked_is_let_go_of_by_who_waited(clock: Clock) -> None:
    """The thread that tells of waits may hold one for long; references to results are in it."""

    class Asked:
        def __call__(self) -> str:
            return "0 of 2"

    asked = Asked()
    gone = weakref.ref(asked)
    wait = waiting(asked)
    with wait:
        del asked
        assert gone() is not None
    assert gone() is None
    assert not after(clock, 100, wait)
