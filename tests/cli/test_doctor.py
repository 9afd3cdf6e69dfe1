"""What `doctor` checks, on nodes as they should not be, and as a program."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from single_controller.device import CPU
from single_controller.errors import ResourceError
from single_controller.ray import RayResourcePool, doctor
from single_controller.ray.node_checks import NODE_CHECKS, Finding, Node
from single_controller.ray.node_probe import NodeProbe, NodeReport

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
SEEN = NodeReport(NodeProbe().look().versions, 16 * GIB, 16 * GIB, {}, 65_536, 0.0)


def node(resources: dict[str, float] | None = None, **seen: Any) -> Node:
    offered = {"CPU": 8.0, "object_store_memory": 8.0 * GIB, **(resources or {})}
    return Node("10.0.0.1", offered, None, replace(SEEN, **seen))


def first(check: str, *nodes: Node) -> Finding:
    return next(NODE_CHECKS[check](nodes))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "single_controller", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.parametrize(
    ("check", "bad", "state", "detail", "fix"),
    [
        ("object store", node(shm_total=64 << 20), "fail", "does not fit", "--shm-size=9g"),
        ("object store", node({"object_store_memory": 1e8}), "warn", "spill", "--object-store-mem"),
        ("object store", node(shm_free=GIB), "warn", "1.0 GiB are free", "/dev/shm"),
        ("devices", node(devices={"GPU": 4}), "warn", "has 4 GPUs, and Ray offers 0", "num-gpus=4"),
        ("devices", node({"GPU": 2.0}), "warn", "no such device files", "--gpus all"),
        ("open files", node(open_files=1024), "warn", "1024 files", "ulimit -n"),
        (
            "versions",
            node(versions={**SEEN.versions, "ray": "2.1.0"}),
            "fail",
            "ray .* here, 2.1.0",
            "same versions",
        ),
        (
            "versions",
            node(versions={k: v for k, v in SEEN.versions.items() if k != "torch"}),
            "warn",
            "torch .* here, None",
            "same versions",
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_named_with_what_to_do(
    check: str, bad: Node, state: str, detail: str, fix: str
) -> None:
    finding = first(check, bad)
    assert (finding.check, finding.state) == (check, state)
    assert re.search(detail, finding.detail)
    assert fix in finding.fix


@pytest.mark.parametrize("check", ["versions", "devices", "open files"])
def test_a_node_as_it_should_be_passes(check: str) -> None:
    assert first(check, node()).state == "ok"


def test_a_port_that_takes_no_connection_is_named() -> None:
    probe = NodeProbe()
    port = probe.listen()
    assert probe.unreachable([("127.0.0.1", port)]) == []
    probe._socket.close()
    [(ip, why)] = probe.unreachable([("127.0.0.1", port)])
    assert ip == "127.0.0.1"
    assert "refused" in why


def test_a_check_that_raises_fails_alone_and_what_is_well_counts_only_if_nothing_is_wrong() -> None:
    def broken(fix: str) -> Iterator[Finding]:
        yield Finding("ports", "warn", "one")
        yield Finding("ports", "ok", "all are well")
        raise OSError("no such thing")

    found = list(doctor._guarded("ports", "do this", broken, ""))
    assert [f.state for f in found] == ["warn", "fail"]
    assert found[1] == Finding("ports", "fail", "OSError: no such thing", "do this")


def test_an_all_reduce_whose_devices_others_hold_is_skipped(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(*_: object, **__: object) -> None:
        raise ResourceError("others hold them")

    monkeypatch.setattr(RayResourcePool, "get_placement_groups", held)
    [finding] = doctor._guarded("all-reduce cpu", "", doctor._reduce, CPU, 1)
    assert (finding.state, finding.detail) == ("skip", "2 × CPU are not free: others hold them")


def test_doctor_checks_a_running_cluster_and_exits_0(cluster: None) -> None:
    address = str(ray.get_runtime_context().gcs_address)
    done = run("doctor", "--address", address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"reached {address}" in done.stdout
    checks = ("nodes", *NODE_CHECKS, "all-reduce cpu")
    marked = {
        line[6:21].strip() for line in done.stdout.splitlines() if line[:4] in ("ok  ", "warn")
    }
    assert set(checks) <= marked
    assert "gloo, 2 ranks" in done.stdout
    assert done.stdout.endswith("all is well\n")


@pytest.mark.parametrize("command", [["doctor"], ["ps"], ["stacks", "group"], ["kill", "group"]])
def test_a_cluster_that_is_not_there_is_said_at_once_with_how_to_start_one(
    command: list[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        done = run(*command, "--address", f"127.0.0.1:{port}")
    assert done.returncode == (1 if command == ["doctor"] else 2)
    assert f"nothing takes connections at 127.0.0.1:{port}" in done.stdout + done.stderr
    assert "ray start --head" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
