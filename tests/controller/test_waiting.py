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

from single_controller.ray import failure
from single_controller.ray.failure import Wait
from tests.waiting import eventually

CLEAR = "\r\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def look(self, seconds: float, wait: Wait, free: bool = True) -> bool:
        self.now = seconds
        return wait.look(free)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes as the test says; only the test looks at what is due."""
    clock = Clock()
    monkeypatch.setattr(failure, "time", type("", (), {"monotonic": clock}))
    monkeypatch.setattr(failure, "_started", True)
    return clock


def test_a_long_wait_shows_on_a_terminal_how_things_stand_and_leaves_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    told = iter(["0 of 2", "1 of 2"])
    wait = Wait(lambda: next(told))
    with wait:
        assert [clock.look(seconds, wait) for seconds in (1.0, 1.5, 2.6)] == [False, True, True]
    assert terminal.getvalue().split(CLEAR)[1:] == ["0 of 2, 2 s", "1 of 2, 3 s", ""]
    assert not clock.look(5.0, wait)


def test_one_wait_has_the_line_and_one_that_is_short_or_cannot_tell_says_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    gone: dict[str, str] = {}
    for seconds, free, tell in ((50, False, str), (1, True, str), (100, True, lambda: gone["x"])):
        wait = Wait(tell)
        with wait:
            assert not clock.look(clock.now + seconds, wait, free)
    assert (terminal.getvalue(), caplog.messages) == ("", [])


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_wait_without_end_is_logged_after_a_minute_and_then_ever_more_rarely(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_terminal: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if on_terminal else io.StringIO())
    wait = Wait(lambda: "actor.update: 1 of 2 ranks ready, waiting for 1")
    with wait, caplog.at_level(logging.WARNING):
        for seconds in range(0, 1_000, 10):
            assert clock.look(seconds, wait) == (on_terminal and seconds > 0)
    assert caplog.messages == [
        f"still waiting after {seconds} s: actor.update: 1 of 2 ranks ready, waiting for 1"
        for seconds in (60, 120, 240, 480, 960)
    ]


def test_a_thread_says_so_while_others_wait_and_forgets_who_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(failure, "_LOG_S", 0.0)
    threads: list[str] = []

    def tell() -> str:
        threads.append(threading.current_thread().name)
        return "sleeps"

    Wait(lambda: "interrupted before it could end").__enter__()
    gc.collect()
    with Wait(tell):
        assert eventually(lambda: bool(threads))
    assert set(threads) == {"waiting"}
    assert not any("interrupted" in message for message in caplog.messages)


def test_what_was_asked_is_let_go_of_by_who_waited(clock: Clock) -> None:
    """The thread that tells of waits may hold one for long; references to results are in it."""

    class Asked:
        def __call__(self) -> Any: ...

    asked = Asked()
    gone = weakref.ref(asked)
    wait = Wait(asked)
    with wait:
        del asked
        assert gone() is not None
    assert gone() is None
