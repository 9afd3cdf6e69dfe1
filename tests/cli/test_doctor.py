"""What `doctor` checks, on nodes as they should not be, and as a program."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
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
from single_controller.ray.node_probe import NodeProbe

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
SEEN = replace(
    NodeProbe().look(),
    shm_total=16 * GIB,
    shm_free=16 * GIB,
    devices={},
    open_files=65_536,
    disk_total=100 * GIB,
    disk_free=50 * GIB,
)


def node(resources: dict[str, float] | None = None, **seen: Any) -> Node:
    offered = {"CPU": 8.0, "object_store_memory": 8.0 * GIB, **(resources or {})}
    return Node("10.0.0.1", offered, None, replace(SEEN, **seen))


def first(check: str, *nodes: Node) -> Finding:
    return next(NODE_CHECKS[check](nodes))


def bare(**variables: str) -> dict[str, str]:
    """The environment of a shell that knows no cluster; this process has its own one's token."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return {**env, **variables}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "single_controller", *arguments],
        cwd=ROOT,
        env=env,
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
        ("disk", node(disk_free=4 * GIB), "fail", "4.0 GiB free at .*, 96% used", "--temp-dir"),
        ("disk", node(disk_free=7 * GIB), "warn", "less than the object store", "--temp-dir"),
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


@pytest.mark.parametrize("check", ["versions", "devices", "disk", "open files"])
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


CLUSTER = """
import sys, ray
context = ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def other_cluster() -> Iterator[tuple[str, str]]:
    """A cluster of somebody with a home of his own: its address, and that home."""
    with (
        tempfile.TemporaryDirectory(prefix="sc", dir="/tmp") as home,  # sockets need short paths
        subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env=bare(HOME=home, RAY_TMPDIR=home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        yield other.stdout.readline().strip(), home
        other.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["doctor", "ps"])
def test_a_cluster_that_wants_a_token_is_told_from_one_that_is_not_there(
    command: str, other_cluster: tuple[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray._private.authentication", reason="this Ray knows no tokens")
    address, _ = other_cluster
    for variables, seen in (
        ({"HOME": str(tmp_path)}, "RAY_AUTH_MODE is not set, and there is no token at"),
        ({"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}, "is token, and there is no token at"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}, "a token in RAY_AUTH_TOKEN"),
    ):
        done = run(command, "--address", address, env=bare(**variables))
        said = done.stdout + done.stderr
        assert done.returncode == (1 if command == "doctor" else 2), said
        assert f"the cluster at {address} wants its token: here RAY_AUTH_MODE" in said
        assert seen in said
        assert "RAY_AUTH_MODE=token, with the cluster's own token" in said
        assert "ray start" not in said
        assert len(said.splitlines()) <= 3, said


@pytest.mark.slow
def test_one_of_several_clusters_of_a_user_needs_no_more_than_its_name(
    cluster: None, other_cluster: tuple[str, str]
) -> None:
    address, home = other_cluster
    for named in (["--address", address], []):
        env = bare(HOME=home, **({} if named else {"RAY_ADDRESS": address}))
        done = run("ps", *named, env=env)
        assert done.stdout == f"reached {address}\nno groups are running\n", done.stderr
        assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", [["doctor"], ["ps"], ["stacks", "group"], ["kill", "group"]])
def test_one_of_several_clusters_must_be_named(
    command: list[str], cluster: None, other_cluster: tuple[str, str]
) -> None:
    done = run(*command, env=bare())
    said = done.stdout + done.stderr
    assert done.returncode == (1 if command == ["doctor"] else 2), said
    assert re.search(r"\d clusters run on this machine: .*name one with --address", said, re.DOTALL)
    for address in (other_cluster[0], str(ray.get_runtime_context().gcs_address)):
        assert address in said


def test_what_takes_connections_and_is_no_cluster_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_KNOCK_S", 2.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        finding = doctor.connect(f"127.0.0.1:{mute.getsockname()[1]}")
    assert finding.state == "fail"
    assert "is no Ray cluster, or one that hangs" in finding.detail
