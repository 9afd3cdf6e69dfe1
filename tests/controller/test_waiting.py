"""What the log is told while something takes long."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import pytest

from single_controller.ray import failure
from single_controller.ray.failure import Wait
from tests.waiting import eventually


def test_a_wait_without_end_is_logged_after_a_minute_and_then_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(failure, "time", type("", (), {"monotonic": lambda: now[0]}))
    monkeypatch.setattr(failure, "_started", True)  # only the test looks at what is due
    gone: dict[str, str] = {}
    wait, cannot_tell = Wait(lambda: "1 of 2 ranks ready"), Wait(lambda: gone["x"])
    with wait, cannot_tell, caplog.at_level(logging.WARNING):
        for now[0] in range(0, 1_000, 10):
            wait.look()
            cannot_tell.look()
    assert caplog.messages == [
        f"still waiting after {seconds} s: 1 of 2 ranks ready"
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


def test_what_was_asked_is_let_go_of_by_who_waited() -> None:
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
