"""The checks of a cluster's nodes: each passes, or says what to do. Which are made, and what a
group can do on the nodes, is `doctor`'s.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, TypeAlias

import ray

from single_controller.device import CPU, DEVICE_KINDS
from single_controller.ray.node_probe import PACKAGES, NodeProbe, NodeReport

__all__ = ["NODE_CHECKS", "PATIENCE_S", "Finding", "Node", "State", "accelerators"]

PATIENCE_S = 60.0

State: TypeAlias = Literal["ok", "warn", "fail", "skip"]

_GIB = 1 << 30
_LEAST_STORE = _GIB
_LEAST_FILES = 4_096
_FULLEST_DISK = 0.95  # Ray's own limit, unless RAY_local_fs_capacity_threshold says otherwise
_LARGEST_CLOCK_GAP_S = 0.5
_PROBE_MIB = 64


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, and for one that did not pass what to do about it."""

    check: str
    state: State
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Node:
    """A living node, the actor on it, and what that saw."""

    ip: str
    resources: Mapping[str, float]
    probe: Any
    report: NodeReport


def accelerators() -> list[str]:
    """Ray's names of the devices that are not CPUs."""
    return sorted({kind.resource for kind in DEVICE_KINDS if kind is not CPU})


def _versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    own = NodeProbe().look().versions
    missing = [name for name in PACKAGES if name not in own]
    too_old = [why for why in (_too_old(r, own) for r in _requirements()) if why]
    problems = [f"{name} is not installed" for name in missing] + too_old
    if problems:
        yield Finding(
            "versions",
            "fail",
            f"here: {'; '.join(problems)}",
            "install what pyproject.toml asks for",
        )
    for node in nodes:
        differ = {
            name: (own.get(name), node.report.versions.get(name))
            for name in own
            if own.get(name) != node.report.versions.get(name)
        }
        if differ:
            text = ", ".join(
                f"{name} {here} here, {there}" for name, (here, there) in differ.items()
            )
            yield Finding(
                "versions",
                "warn" if not {"python", "ray"} & set(differ) else "fail",
                f"{node.ip} differs from this process: {text}",
                "install the same versions: batches travel by pickle",
            )
    yield Finding("versions", "ok", ", ".join(f"{name} {v}" for name, v in own.items()))


def _requirements() -> list[str]:
    try:
        return metadata.requires("single-controller") or []
    except metadata.PackageNotFoundError:
        return []


def _too_old(requirement: str, versions: Mapping[str, str]) -> str:
    match = re.match(r"([\w-]+)>=([\d.]+)$", requirement.replace(" ", ""))
    if match is None or match[1] not in versions:
        return ""
    have = tuple(int(part) for part in re.findall(r"\d+", versions[match[1]])[:3])
    need = tuple(int(part) for part in match[2].split("."))
    return f"{match[1]} {versions[match[1]]} is older than {match[2]}" if have < need else ""


def _devices(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        for name in accelerators():
            present = node.report.devices.get(name, 0)
            offered = int(node.resources.get(name, 0))
            if present and offered != present:
                yield Finding(
                    "devices",
                    "warn",
                    f"{node.ip} has {present} {name}s, and Ray offers {offered}",
                    "if that is not meant: start Ray there without *_VISIBLE_DEVICES, or with "
                    f"--num-gpus={present}",
                )
            elif offered and not present:
                yield Finding(
                    "devices",
                    "warn",
                    f"Ray offers {offered} {name}s on {node.ip}, which has no such device files",
                    "logical devices are fine for tests; else start Ray without --num-gpus, and a "
                    "container with its devices (docker run --gpus all)",
                )
    counts = [f"{node.ip}: {dict(node.report.devices) or 'CPUs only'}" for node in nodes]
    yield Finding("devices", "ok", "; ".join(counts))


def _store(nodes: Sequence[Node]) -> Iterator[Finding]:
    import numpy as np

    for node in nodes:
        size, shm = int(node.resources.get("object_store_memory", 0)), node.report.shm_total
        where = f"{node.ip}: object store {size / _GIB:.1f} GiB, /dev/shm {shm / _GIB:.1f} GiB"
        if shm < size:
            yield Finding(
                "object store",
                "fail",
                f"{where}: it does not fit, so batches go through a disk",
                f"docker run --shm-size={size / _GIB * 1.1:.0f}g, or "
                f"`ray start --object-store-memory={int(shm * 0.9)}`",
            )
        elif size < _LEAST_STORE:
            yield Finding(
                "object store",
                "warn",
                f"{where}: batches of more spill to disk",
                f"`ray start --object-store-memory={4 * _GIB}`, with as much /dev/shm",
            )
        elif node.report.shm_free < size * 0.5:
            yield Finding(
                "object store",
                "warn",
                f"{where}, of which {node.report.shm_free / _GIB:.1f} GiB are free",
                "remove what ended programs have left in /dev/shm",
            )
    ref = ray.put(np.zeros(_PROBE_MIB << 20, dtype=np.uint8))
    seconds = []
    for node in nodes:
        began = time.perf_counter()
        ray.get(node.probe.size.remote(ref), timeout=PATIENCE_S)
        seconds.append(time.perf_counter() - began)
    sizes = [int(n.resources.get("object_store_memory", 0)) / _GIB for n in nodes]
    yield Finding(
        "object store",
        "ok",
        f"{min(sizes):.1f} GiB or more per node, in /dev/shm; {_PROBE_MIB} MiB reach a node in "
        f"{statistics.median(seconds) * 1e3:.0f} ms",
    )


def _disk(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        seen, store = node.report, int(node.resources.get("object_store_memory", 0))
        used = 1 - seen.disk_free / max(1, seen.disk_total)
        where = f"{node.ip}: {seen.disk_free / _GIB:.1f} GiB free at {seen.session}"
        room = "remove old sessions there, or `ray start --temp-dir=…` on a larger disk"
        if used > _FULLEST_DISK:
            what = f"{where}, {used:.0%} used: Ray writes no logs and objects to so full a disk"
            yield Finding("disk", "fail", what, room)
        elif seen.disk_free < store:
            what = f"{where}: less than the object store, which spills what it cannot hold there"
            yield Finding("disk", "warn", what, room)
    least = min(node.report.disk_free for node in nodes)
    yield Finding(
        "disk", "ok", f"{least / _GIB:.1f} GiB or more free per node for logs and spilling"
    )


def _ports(nodes: Sequence[Node]) -> Iterator[Finding]:
    if len(nodes) > 1 and any(node.ip.startswith("127.") for node in nodes):
        yield Finding(
            "ports",
            "fail",
            "a node of several is known by a loopback address",
            "`ray start --node-ip-address=…` with an address that the others reach",
        )
    ports = ray.get([node.probe.listen.remote() for node in nodes], timeout=PATIENCE_S)
    addresses = [(node.ip, port) for node, port in zip(nodes, ports, strict=True)]
    tries = [node.probe.unreachable.remote(addresses) for node in nodes]
    failed = [
        f"{node.ip} → {ip} ({why})"
        for node, missed in zip(nodes, ray.get(tries, timeout=PATIENCE_S), strict=True)
        for ip, why in missed
    ]
    if failed:
        yield Finding(
            "ports",
            "fail",
            f"no connection: {'; '.join(failed[:5])}",
            "open the nodes' ephemeral ports to each other, or name open ones with "
            "RayWorkerGroup(..., master_port_range=[first, last])",
        )
    else:
        yield Finding("ports", "ok", f"any of {len(nodes)} nodes reaches a new port of any other")


def _limits(nodes: Sequence[Node]) -> Iterator[Finding]:
    least = min(node.report.open_files for node in nodes)
    if least < _LEAST_FILES:
        yield Finding(
            "open files",
            "warn",
            f"a process on some node may open {least} files only",
            "`ulimit -n 65536` before `ray start`",
        )
    else:
        yield Finding("open files", "ok", f"a process may open {least}")


def _clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    gaps = {}
    for node in nodes:
        before = time.time()
        there = ray.get(node.probe.clock.remote(), timeout=PATIENCE_S)
        gaps[node.ip] = there - (before + time.time()) / 2  # pyright: ignore[reportOperatorIssue]
    ip, gap = max(gaps.items(), key=lambda item: abs(item[1]))
    if abs(gap) > _LARGEST_CLOCK_GAP_S:
        yield Finding(
            "clocks",
            "warn",
            f"{ip} is {gap:+.1f} s off: which rank failed first is told by clocks",
            "keep the nodes' clocks together (chrony, ntpd)",
        )
    else:
        yield Finding("clocks", "ok", f"within {max(abs(gap), 0.001) * 1e3:.0f} ms of this one")


NODE_CHECKS: dict[str, Callable[[Sequence[Node]], Iterator[Finding]]] = {
    "versions": _versions,
    "devices": _devices,
    "object store": _store,
    "disk": _disk,
    "ports": _ports,
    "open files": _limits,
    "clocks": _clocks,
}
