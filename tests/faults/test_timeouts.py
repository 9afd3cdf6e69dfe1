"""How long a call may take: said by the call, else by its method, else by its group."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from single_controller import CallTimeoutError, RegistrationError
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.faults.victim import Victim


class Timed(Victim):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL, timeout_s=0.2)
    def hurry(self) -> None:
        self._moment()


@pytest.fixture(scope="module")
def timed(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Timed), call_timeout_s=0.4) as two:
        yield two


def test_a_call_has_its_own_deadline_else_its_methods_else_its_groups(
    timed: RayWorkerGroup,
) -> None:
    for call, seconds in (
        (timed.hurry.options(timeout_s=0.1), 0.1),
        (timed.hurry, 0.2),
    ):
        with pytest.raises(CallTimeoutError, match=rf"hurry.* not finished after {seconds} s"):
            call()
        assert timed._hosts.settle(60)
    with pytest.raises(CallTimeoutError, match=r"act.* not finished after 0.4 s") as caught:
        timed.act("moment")
    assert "in _moment" in caught.value.stacks[0]
    assert timed._hosts.settle(60)
    assert timed.hurry.options(timeout_s=math.inf)() == [None, None]


def test_a_deadline_that_is_none_is_refused() -> None:
    with pytest.raises(RegistrationError, match="timeout_s must be seconds"):
        register(timeout_s=-1)
