"""The one table of device kinds."""

from __future__ import annotations

import pytest
import torch

from single_controller import device
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind, device_kind


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


def test_a_kind_can_be_asked_for_by_torchs_names() -> None:
    assert [device_kind(kind.name) for kind in DEVICE_KINDS] == list(DEVICE_KINDS)
    assert device_kind("cuda:1").name == "cuda"


@pytest.mark.parametrize("name", ["gpu", "", "CUDA", "tpu:0"])
def test_an_unknown_kind_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"one of cuda, npu, xpu, cpu; got '{name}'"):
        device_kind(name)


def test_a_process_without_accelerator_has_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu")
    assert device_kind() is CPU
    assert device.get_torch_device() is torch.cpu
    assert torch.zeros(1).to(device.get_device_id()).device == torch.device("cpu")


def test_the_current_device_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device.get_torch_device() is torch.cuda
    assert device.get_device_id() == 3


@pytest.mark.parametrize("kind", DEVICE_KINDS, ids=lambda kind: kind.name)
def test_availability_is_what_torch_says_and_a_missing_plugin_is_no_error(
    kind: DeviceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    expected = {"cuda": True, "cpu": True, "xpu": torch.xpu.is_available()}
    assert kind.is_available() is expected.get(kind.name, False)
