"""Restarting a group: the same on every backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from protocol import DataProto
from single_controller import GroupBrokenError, WorkerDiedError, WorkerError
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from tests.conformance.conftest import Backend
from tests.conformance.probe import Engine

pytestmark = pytest.mark.slow


def restart_first(group: Any, *args: Any, **kwargs: Any) -> Any:
    """As if another thread restarted the group while this one dispatches a call."""
    group.restart()
    return args, kwargs


def as_it_is(group: Any, outputs: list[Any]) -> list[Any]:
    return outputs


class Mortal(Worker):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.state, self.broken = "new", broken

    def restore(self) -> None:
        if self.broken:
            raise FileNotFoundError("no checkpoint")
        self.state = f"restored on {self.rank}"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def look(self) -> str:
        return self.state

    @register(dispatch_mode={"dispatch_fn": restart_first, "collect_fn": as_it_is})
    def look_late(self) -> str:
        return self.state

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fail(self, how: str) -> None:
        if how == "die":
            sys.exit(3)
        if how == "raise":
            raise KeyError(how)


@pytest.fixture(scope="module")
def both(backend: Backend) -> Iterator[Any]:
    with backend.module.colocate(
        backend.pool([2]), on_failure="restart", max_restarts=1, mortal=Mortal, engine=Engine
    ) as roles:
        yield roles


def test_a_restarted_group_has_all_its_roles_anew_and_former_calls_no_longer_count(
    both: Any,
) -> None:
    batch = DataProto.from_dict({"x": torch.zeros(4)})
    both.engine.update(batch)
    both.engine._dispatch_info["train"] = [1, 0]
    former = both.engine.places.submit()
    assert len(former.result()) == 2
    with pytest.raises(GroupBrokenError, match="the group was restarted"):
        both.mortal.look_late()  # planned for the former ranks, it goes to no others
    assert both.mortal.look() == ["restored on 0", "restored on 1"]
    both.engine.update(batch)
    assert both.engine._dispatch_info == {"train": [0, 1]}
    assert both.hosts.restarts == both.engine.restarts == 1
    assert [row.state for row in both.hosts.describe().rows] == ["alive"] * 4
    assert both.engine.stacks() == {0: "  in no call", 1: "  in no call"}
    with pytest.raises(GroupBrokenError, match="the group was restarted"):
        former.result()


def test_a_group_restarts_itself_after_a_death_as_often_as_it_was_told(both: Any) -> None:
    before = both.hosts.restarts
    with pytest.raises(KeyError):
        both.mortal.fail(PerRank(["not", "raise"]))
    assert both.mortal.look() == ["restored on 0", "restored on 1"]
    assert both.hosts.restarts == before, "all ranks finished, so nothing is restarted"
    for _ in range(2 - before):
        with pytest.raises(WorkerDiedError):
            both.mortal.fail(PerRank(["not", "die"]))
    with pytest.raises(GroupBrokenError, match=r"lost a rank.*restart\(\)"):
        both.mortal.look()
    both.restart()
    assert both.mortal.look() == ["restored on 0", "restored on 1"]


def test_a_restart_that_fails_says_why_and_can_be_tried_again(backend: Backend) -> None:
    with backend.group(backend.spec(Mortal, broken=True)) as group:
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=r"Mortal.restore failed") as caught:
                group.restart()
            assert isinstance(caught.value, WorkerError)
            with pytest.raises(GroupBrokenError, match=r"restart failed.*no checkpoint"):
                group.look()
        group.close()
        with pytest.raises(GroupBrokenError, match="a closed group cannot be restarted"):
            group.restart()


def test_a_policy_that_cannot_be_is_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match="on_failure must be 'raise' or 'restart'; got 'retry'"):
        backend.group(backend.spec(Mortal), on_failure="retry")
    with pytest.raises(ValueError, match="max_restarts must be a count; got -1"):
        backend.group(backend.spec(Mortal), max_restarts=-1)
