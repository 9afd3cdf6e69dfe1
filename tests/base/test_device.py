"""The one table of device kinds; moving what a role holds, and who is on the device when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from single_controller import device
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind, Turns, device_kind, move


def pretend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if this process saw devices of this kind alone."""
    monkeypatch.setattr(DeviceKind, "is_available", lambda kind: kind.name in (name, "cpu"))


@pytest.mark.parametrize(
    ("kind", "backend", "resource", "visible"),
    [
        ("cuda", "nccl", "GPU", "CUDA_VISIBLE_DEVICES"),
        ("npu", "hccl", "NPU", "ASCEND_RT_VISIBLE_DEVICES"),
        ("xpu", "xccl", "GPU", "ONEAPI_DEVICE_SELECTOR"),
        ("cpu", "gloo", "CPU", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_every_function_answers_for_the_kind_that_the_process_has(
    monkeypatch: pytest.MonkeyPatch, kind: str, backend: str, resource: str, visible: str
) -> None:
    pretend(monkeypatch, kind)
    assert device.get_device_name() == kind
    assert device.get_nccl_backend() == backend
    assert device.get_resource_name() == resource
    assert device.get_visible_devices_keyword() == visible
    assert device.is_device_available() is (kind != "cpu")


def test_a_kind_can_be_asked_for_by_torchs_names_and_an_unknown_one_is_refused() -> None:
    assert [device_kind(kind.name) for kind in DEVICE_KINDS] == list(DEVICE_KINDS)
    assert device_kind("cuda:1").name == "cuda"
    for name in ("gpu", "", "CUDA", "tpu:0"):
        with pytest.raises(ValueError, match=rf"one of cuda, npu, xpu, cpu; got '{name}'"):
            device_kind(name)


def test_the_current_device_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu")
    assert device_kind() is CPU
    assert device.get_torch_device() is torch.cpu
    assert torch.zeros(1).to(device.get_device_id()).device == torch.device("cpu")
    pretend(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device.get_torch_device() is torch.cuda
    assert device.get_device_id() == 3


@pytest.mark.parametrize("kind", DEVICE_KINDS, ids=lambda kind: kind.name)
def test_availability_is_what_torch_says_also_of_a_kind_that_it_does_not_know(
    kind: DeviceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    expected = {"cuda": True, "cpu": True, "xpu": torch.xpu.is_available()}
    assert kind.is_available() is expected.get(kind.name, False)


class Owner:
    def __init__(self) -> None:
        self.model: Any = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()


def test_modules_and_what_optimizers_hold_of_them_move() -> None:
    owner = Owner()
    move(owner, "meta")
    state = [s for of in owner.optimizer.state.values() for s in of.values() if s.dim()]
    assert {t.device.type for t in [*owner.model.parameters(), *state]} == {"meta"}


def test_a_sharded_module_gives_up_gathered_parameters_before_it_moves() -> None:
    class Sharded(torch.nn.Linear):
        def reshard(self) -> None:
            assert self.weight.device.type == "cpu"
            self.resharded = True

    owner = Owner()
    owner.model = Sharded(2, 2)
    move(owner, "meta")
    assert (owner.model.resharded, owner.model.weight.device.type) == (True, "meta")


class Fake:
    takes_turns = True

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.fails = name, log, False

    def offload(self) -> None:
        self.log.append(f"-{self.name}")

    def onload(self) -> None:
        if self.fails:
            raise MemoryError(self.name)
        self.log.append(f"+{self.name}")


def test_a_role_comes_after_the_last_one_left_and_again_where_it_could_not_come() -> None:
    log: list[str] = []
    turns, critic = Turns(), Fake("critic", log)
    turns.add("actor", Fake("actor", log))
    turns.add("critic", critic)
    for role in ("actor", "actor", "critic", "actor"):
        turns.take(role)
    critic.fails = True
    with pytest.raises(MemoryError):
        turns.take("critic")
    critic.fails = False
    turns.take("critic")
    called = "+actor -actor +critic -critic +actor"
    assert " ".join(log) == f"-actor -critic {called} -actor +critic"
