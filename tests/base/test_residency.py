"""Moving what a role holds, and who is on the device when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from single_controller.base.residency import Turns, move


class Owner:
    def __init__(self) -> None:
        self.model = torch.nn.Linear(2, 2)
        self.others = {"list": [torch.nn.Linear(2, 2)], "number": 3}
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()

    def devices(self) -> set[str]:
        tensors = [*self.model.parameters(), *self.others["list"][0].parameters()]
        state = [s for of in self.optimizer.state.values() for s in of.values() if s.dim()]
        return {tensor.device.type for tensor in [*tensors, *state]}


def test_modules_wherever_they_are_held_and_the_optimizer_state_move() -> None:
    owner = Owner()
    move(owner, "meta")
    assert owner.devices() == {"meta"}


def test_what_an_engine_holds_moves_with_its_role_and_what_another_role_holds_does_not() -> None:
    class Engine:
        def __init__(self) -> None:
            self.held = Owner()
            self.module, self.optimizer = self.held.model, self.held.optimizer

    class Role(Engine):
        takes_turns = True

    worker = SimpleNamespace(engine=Engine(), peer=Role())
    move(worker, "meta")
    moved = worker.engine.held
    assert {p.device.type for p in moved.model.parameters()} == {"meta"}
    state = [s for of in moved.optimizer.state.values() for s in of.values() if s.dim()]
    assert {s.device.type for s in state} == {"meta"}
    assert worker.peer.held.devices() == {"cpu"}


def test_a_sharded_module_gives_up_gathered_parameters_before_it_moves() -> None:
    events: list[str] = []

    class Sharded(torch.nn.Linear):
        def reshard(self) -> None:
            events.append("reshard")

        def to(self, *args: Any, **kwargs: Any) -> Any:
            events.append("to")
            return super().to(*args, **kwargs)

    owner = Owner()
    owner.model = Sharded(2, 2)
    move(owner, "cpu")
    assert events == ["reshard", "to"]


class Fake:
    takes_turns = True

    def __init__(self, name: str, log: list[str], fails: bool = False) -> None:
        self.name, self.log, self.fails = name, log, fails

    def offload(self) -> None:
        self.log.append(f"-{self.name}")

    def onload(self) -> None:
        if self.fails:
            raise MemoryError(self.name)
        self.log.append(f"+{self.name}")


def test_a_role_comes_to_the_device_after_the_last_one_left_it() -> None:
    log: list[str] = []
    turns = Turns()
    for name in ("actor", "critic"):
        turns.add(name, Fake(name, log))
    for role in ("actor", "actor", "critic", "actor"):
        turns.take(role)
    built, called = log[:2], log[2:]
    assert built == ["-actor", "-critic"]
    assert called == ["+actor", "-actor", "+critic", "-critic", "+actor"]


def test_a_role_that_could_not_be_brought_to_the_device_is_tried_again() -> None:
    log: list[str] = []
    critic = Fake("critic", log, fails=True)
    turns = Turns()
    turns.add("actor", Fake("actor", log))
    turns.add("critic", critic)
    log.clear()
    turns.take("actor")
    with pytest.raises(MemoryError):
        turns.take("critic")
    critic.fails = False
    turns.take("critic")
    assert log == ["+actor", "-actor", "+critic"]
