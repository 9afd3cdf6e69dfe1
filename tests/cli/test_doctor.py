"""What `doctor` checks, on nodes as they should not be, and as a program."""

from __future__ import annotations

import contextlib
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

from single_controller.cli import doctor
from single_controller.cli.doctor import Node
from single_controller.device import CPU
from single_controller.errors import ResourceError
from single_controller.ray import RayResourcePool
from single_controller.ray.process import versions
from tests.cli.program import ROOT, here, run

GIB = 1 << 30
OWN = versions()
CLUSTER = """
import sys, ray
context = ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
# A node with another tensordict, and one that does not answer.
NODES = """
import json, os, signal, sys, ray.cluster_utils
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
odd = cluster.add_node(
    num_cpus=1, node_ip_address="127.0.0.3", env_vars={"PYTHONPATH": os.pathsep.join(sys.argv[1:])}
)
[raylet] = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4").all_processes["raylet"]
os.kill(raylet.process.pid, signal.SIGSTOP)
print(cluster.address, flush=True)
sys.stdin.read()
os.kill(raylet.process.pid, signal.SIGCONT)
cluster.shutdown()
"""
IMPATIENT = """
import sys
from single_controller.cli import doctor
doctor._WAIT_S = 20
sys.exit(doctor.doctor(sys.argv[1]))
"""


def bare(**variables: str) -> dict[str, str]:
    """The environment of a shell that knows no cluster; this process has its own one's token."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return {**env, **variables}


@contextlib.contextmanager
def started(program: str, *arguments: str) -> Iterator[tuple[str, str]]:
    """A cluster of somebody with a home of his own: its address, and that home."""
    with (
        tempfile.TemporaryDirectory(prefix="sc", dir="/tmp") as home,  # sockets need short paths
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
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


def found(offered: dict[str, float], **seen: Any) -> list[doctor.Finding]:
    resources = {"object_store_memory": 8.0 * GIB, **offered}
    node = Node("10.0.0.1", resources, OWN, (100 * GIB, 50 * GIB), (16 * GIB, 16 * GIB), {"GPU": 0})
    return list(doctor.look_at(replace(node, **seen), OWN))


@pytest.mark.parametrize(
    ("check", "offered", "seen", "state", "detail", "fix"),
    [
        ("object store", {}, {"shm": (64 << 20, 0)}, "fail", "does not fit", "--shm-size=9g"),
        ("object store", {}, {"shm": (16 * GIB, GIB)}, "warn", "1.0 GiB are free", "/dev/shm"),
        ("disk", {}, {"disk": (GIB, 0)}, "fail", r"0.0 GiB free \(100% used", "--temp-dir"),
        ("disk", {}, {"disk": (100 * GIB, 7 * GIB)}, "warn", "7.0 GiB free", "--temp-dir"),
        ("devices", {}, {"devices": {"GPU": 4}}, "warn", "has 4 .*, and Ray offers 0", "gpus=4"),
        ("devices", {"GPU": 2.0}, {}, "warn", "has 0 .* and Ray offers 2", "--gpus all"),
        ("versions", {}, {"versions": {**OWN, "ray": "2.1.0"}}, "fail", "here, 2.1.0", "same"),
        ("versions", {}, {"versions": {**OWN, "torch": "1"}}, "warn", "torch .* here, 1", "same"),
    ],
)
def test_what_is_wrong_with_a_node_is_named_with_what_to_do(
    check: str, offered: dict[str, float], seen: Any, state: str, detail: str, fix: str
) -> None:
    finding, node = found(offered, **seen)
    assert (finding.check, finding.state, node.state) == (check, state, "ok")
    assert re.search(detail, finding.detail)
    assert fix in finding.fix


def test_a_node_as_it_should_be_is_said_to_be_well_in_a_line() -> None:
    [finding] = found({})
    assert (finding.check, finding.state, finding.fix) == ("node", "ok", "")


def test_a_port_that_takes_no_connection_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        assert doctor.unreachable([address]) == []
    [why] = doctor.unreachable([address])
    assert re.match(rf"127.0.0.1:{address[1]} \(.*refused", why)


def test_a_check_that_raises_fails_alone_and_one_whose_devices_others_hold_is_skipped(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield "warn", "one"
        raise OSError("no such thing")

    def held(*_: object, **__: object) -> None:
        raise ResourceError("others hold them")

    monkeypatch.setattr(RayResourcePool, "get_placement_groups", held)
    assert [
        *doctor.guarded("ports", "do this", broken),
        *doctor.guarded("all-reduce cpu", "", doctor._reduce, CPU, 1),
    ] == [
        ("ports", "warn", "one", ""),
        ("ports", "fail", "OSError: no such thing", "do this"),
        ("all-reduce cpu", "skip", "others hold them", ""),
    ]


@pytest.mark.slow
def test_doctor_checks_a_running_cluster_and_exits_0(cluster: None) -> None:
    done = run("doctor", "--address", here())
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(r"^(?:ok|warn)  +(\S+(?: \S+)*)  +\S", done.stdout, re.MULTILINE)
    assert {"cluster", "nodes", "node", "ports", "all-reduce cpu"} <= set(said), done.stdout
    assert f"reached {here()}" in done.stdout
    assert "gloo, 2 ranks" in done.stdout
    assert done.stdout.endswith("all is well\n")


def test_a_cluster_that_is_not_there_is_said_at_once_with_how_to_start_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for command, code in (["doctor"], 1), (["stacks", "group"], 2):
        done = run(*command, "--address", f"127.0.0.1:{port}")
        said = done.stdout + done.stderr
        assert done.returncode == code
        assert f"no Ray cluster answers at 127.0.0.1:{port} (Conn" in said
        assert "ray start --head" in said
        assert "Traceback" not in said


def test_what_takes_connections_and_is_no_cluster_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_KNOCK_S", 0.5)
    no_answer = pytest.raises(ValueError, match="no Ray cluster answers")
    with socket.create_server(("127.0.0.1", 0)) as mute, no_answer:
        doctor.connect(f"127.0.0.1:{mute.getsockname()[1]}")


@pytest.mark.slow
def test_nodes_that_differ_and_those_that_do_not_answer_are_named(tmp_path: Path) -> None:
    pytest.importorskip(
        "ray._private.authentication", reason="its driver joins the node that stops"
    )
    other = tmp_path / "tensordict-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: tensordict\nVersion: 9.9\n")
    with started(NODES, str(tmp_path), str(ROOT)) as (address, home):
        env = bare(HOME=home, RAY_TMPDIR=home)
        command = [sys.executable, "-c", IMPATIENT, address]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert re.search(r"FAIL +nodes +no process answers on 127\.0\.0\.4: ", said), said
    here = OWN["tensordict"]
    assert re.findall(r"warn +versions +(.+)", said) == [
        f"127.0.0.3: differs from this process: tensordict {here} here, 9.9"
    ]
    assert "Ray's ports of 2 nodes are reached from each of them" in said


@pytest.mark.slow
def test_of_a_cluster_by_ray_start_with_a_token_doctor_sees_each_node(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray._private.authentication", reason="this Ray knows no tokens")
    (tmp_path / "token").write_text("cd" * 32)
    with (
        tempfile.TemporaryDirectory(prefix="sc", dir="/tmp") as home,
        contextlib.ExitStack() as nodes,
    ):
        stranger = bare(HOME=str(tmp_path), RAY_TMPDIR=home)
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        usual = ["--num-cpus=1", "--disable-usage-stats", "--block"]
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", *usual]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = f"{ray.util.get_node_ip_address()}:{port}"
        head = ["--head", f"--port={port}", "--include-dashboard=false"]
        for where in (head, [f"--address={address}"]):
            node = nodes.enter_context(
                subprocess.Popen(
                    [*start, *where],
                    env={**stranger, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            nodes.callback(node.terminate)
            assert node.stdout is not None
            assert any("Ray runtime started" in line for line in node.stdout)
        done = run("doctor", "--address", address, env={**stranger, **own})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ok +node +", done.stdout, re.M)) == 2
    assert "2 alive" in done.stdout


@pytest.fixture(scope="module")
def other_cluster() -> Iterator[tuple[str, str]]:
    with started(CLUSTER) as other:
        yield other


@pytest.mark.slow
def test_a_cluster_that_wants_a_token_is_told_from_one_that_is_not_there(
    other_cluster: tuple[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray._private.authentication", reason="this Ray knows no tokens")
    address, _ = other_cluster
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}
    for command, variables in (("doctor", {"HOME": str(tmp_path)}), ("ps", wrong)):
        done = run(command, "--address", address, env=bare(**variables))
        said = done.stdout + done.stderr
        assert done.returncode == (1 if command == "doctor" else 2), said
        assert f"the cluster at {address} wants its token" in said
        assert "RAY_AUTH_MODE=token, with the cluster's own token" in said
        assert "ray start" not in said
        assert len(said.splitlines()) <= 3, said


@pytest.mark.slow
def test_one_of_several_clusters_must_be_named(
    cluster: None, other_cluster: tuple[str, str]
) -> None:
    address, home = other_cluster
    for command in (["doctor"], ["kill", "group"]):
        done = run(*command, env=bare())
        said = done.stdout + done.stderr
        assert done.returncode == (1 if command == ["doctor"] else 2), said
        assert re.search(r"\d clusters run on this machine: .*name one with --address", said, re.S)
        assert address in said
        assert here() in said
    for named in (["--address", address], []):
        env = bare(HOME=home, RAY_AUTH_MODE="token", RAY_ADDRESS="" if named else address)
        done = run("ps", *named, env=env)
        assert done.stdout == f"reached {address}\nno groups are running\n", done.stderr
        assert done.stderr == ""
