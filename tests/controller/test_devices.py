"""Which devices of a node a rank can read, as the driver of the devices tells."""

from __future__ import annotations

from ctypes import c_uint

import pytest
from ray._private.thirdparty.pynvml import pynvml

from single_controller.ray import process
from single_controller.ray.process import DeviceIdentity

UUIDS = ["GPU-first", "GPU-second", "GPU-far"]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three devices; all but the last can read each other. Handles are their numbers."""

    def status(reader: int, other: int, what: int) -> int:
        assert c_uint(what).value == 0  # what ctypes hands on: NVML_P2P_CAPS_INDEX_READ
        return int(pynvml.NVML_P2P_STATUS_NOT_SUPPORTED if 2 in (reader, other) else 0)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(UUIDS))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: UUIDS[handle])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetP2PStatus", status)


@pytest.mark.parametrize(
    ("uuid", "peers"), [("first", {"second"}), ("far", set()), ("a slice of one", set())]
)
def test_peers_are_the_devices_that_the_driver_says_can_be_read(
    driver: None, uuid: str, peers: set[str]
) -> None:
    assert process._peers(uuid) == peers


def test_without_a_driver_nobody_is_read() -> None:
    assert process._peers("first") == set()


def test_a_rank_reads_its_own_device_and_peers_of_its_node() -> None:
    reader = DeviceIdentity("node", "first", frozenset({"second"}))
    others = [("node", "first"), ("node", "second"), ("node", "far"), ("another", "second")]
    found = [reader.reads(DeviceIdentity(*other)) for other in others]
    assert found == [True, True, False, False]
