"""`doctor`: whether a cluster can do what groups need of it, and what to do where it cannot."""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray._private.services import find_gcs_addresses
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from single_controller.base import Worker
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind
from single_controller.errors import ResourceError
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from single_controller.ray.process import versions

__all__ = ["Finding", "Node", "connect", "doctor", "guarded", "look_at", "unreachable"]

_WAIT_S = 60.0
_KNOCK_S = 30.0
_GIB = 1 << 30
_CLIENT = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
_START = "start one with `ray start --head`, or name one with --address or RAY_ADDRESS"
_MANAGERS = ("Node", "Object")  # each with a port of its own
_TOKEN = (
    "RAY_AUTH_MODE=token, with the cluster's own token (`ray get-auth-token` there) in "
    "RAY_AUTH_TOKEN or in the file at RAY_AUTH_TOKEN_PATH"
)
_LOGS = "look into `ray status` and the newest logs under /tmp/ray/session_latest/logs"
_PORTS = "open the nodes' ports to each other"
_REDUCE = (
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME (worker_env=...) chooses the interface that the "
    "nodes reach each other by (`ip -br addr`), and master_port_range=... an open port; "
    "NCCL_DEBUG=INFO says more"
)


class Finding(NamedTuple):
    """What a check says: "ok", "warn", "fail" or "skip", and for a bad one what to do about it."""

    check: str
    state: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Node:
    """A node as a process on it sees it. `disk`, where Ray writes to, and `shm`, the shared memory,
    are all bytes and the free ones; `devices` counts device files.
    """

    ip: str
    resources: Mapping[str, float]
    versions: Mapping[str, str]
    disk: tuple[int, int]
    shm: tuple[int, int]
    devices: Mapping[str, int]


def _seen(ip: str, resources: Mapping[str, float]) -> Node:
    """The node of this process, now."""
    own: Any = ray._private.worker._global_node  # pyright: ignore[reportAttributeAccessIssue]
    disk, shm = shutil.disk_usage(own.get_session_dir_path()), shutil.disk_usage("/dev/shm")
    devices = {k.resource: len(glob.glob(k.files)) for k in DEVICE_KINDS if k.files}
    space = (disk.total, disk.free), (shm.total, shm.free)
    return Node(ip, resources, versions(), *space, devices)


def unreachable(addresses: Sequence[tuple[str, int]]) -> list[str]:
    """Those that take no connection from here, each with why."""

    def why(address: tuple[str, int]) -> str:
        try:
            socket.create_connection(address, timeout=3).close()
        except OSError as error:
            return f"{address[0]}:{address[1]} ({error})"
        return ""

    with ThreadPoolExecutor(64) as threads:
        return [*filter(None, threads.map(why, addresses))]


def doctor(address: str | None) -> int:
    """Print what each check finds; 1 if one fails."""
    states = []
    for check, state, detail, fix in _examined(address):
        mark = "FAIL" if state == "fail" else f"{state:<4}"
        sys.stdout.write(f"{mark}  {check:<16}{detail}\n")
        sys.stdout.write(f"      {'to do:':<16}{fix}\n" if fix else "")
        sys.stdout.flush()
        states.append(state)
    failed = states.count("fail")
    sys.stdout.write(f"{failed} of {len(states)} checks failed\n" if failed else "all is well\n")
    return min(failed, 1)


def _examined(address: str | None) -> Iterator[Finding]:
    try:
        yield Finding("cluster", "ok", connect(address))
    except ValueError as error:
        yield Finding("cluster", "fail", *str(error).split("\n"))
        return
    nodes: dict[str, Node] = {}
    yield from guarded("nodes", _LOGS, _nodes, nodes)
    for node in nodes.values():
        yield from look_at(node, versions())
    if nodes:
        yield from guarded("ports", _PORTS, _ports, nodes)
    for kind in reversed(DEVICE_KINDS) if nodes else ():
        name = kind.resource
        has = any(n.resources.get(name) and n.devices.get(name) for n in nodes.values())
        if kind is CPU or (kind.files and has):
            yield from guarded(f"all-reduce {kind.name}", _REDUCE, _reduce, kind, len(nodes))


def guarded(name: str, fix: str, check: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """What a check finds; that it fails, if it raises, or is skipped, where others hold devices."""
    try:
        yield from (Finding(name, *found) for found in check(*args))
    except ResourceError as error:
        yield Finding(name, "skip", str(error)[:300])
    except Exception as error:
        yield Finding(name, "fail", f"{type(error).__name__}: {error}"[:1_500].strip(), fix)


def connect(address: str | None) -> str:
    """Connect this process to a cluster, and say to which; without an `address`, to the one that
    Ray finds, or to one of its own on this machine. Where several run, one must be named.

    Raises:
        ValueError: that could not be done; what to do is in the second line.
    """
    named = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    found = [named] if named and named != "auto" else sorted(find_gcs_addresses())
    if len(found) > 1:
        raise ValueError(f"{len(found)} clusters run on this machine: {', '.join(found)}\n{_START}")
    for one in found:
        _knock(one)
    try:
        context: Any = ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        text = " ".join(str(error).split("\n")[:4]).strip() or type(error).__name__
        raise ValueError(f"{text}\n{_START}") from None
    return f"reached {context.address_info['gcs_address']}"


def _knock(address: str) -> None:
    """Raise ValueError if no cluster takes this process there. Ray itself would try for a minute,
    and fill the screen; a process of its own does so at its cost.
    """
    if (match := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address)) is None:
        return
    knock = [sys.executable, "-c", _CLIENT, address]
    try:
        socket.create_connection((match[1], int(match[2])), timeout=5).close()
        said = subprocess.run(knock, capture_output=True, text=True, timeout=_KNOCK_S).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        why = type(error).__name__
        raise ValueError(f"no Ray cluster answers at {address} ({why})\n{_START}") from None
    if re.search("(?i)authenticat", said):  # what else there is to say, Ray says
        raise ValueError(f"the cluster at {address} wants its token\n{_TOKEN}")


def _on_each(keys: Iterable[str], function: Any, args: Callable[[str], Any]) -> dict[str, Any]:
    """What a process on each of the nodes returns for its arguments, or the exception, within a
    time that all share.
    """
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    asked, answers = {}, {}
    for key in keys:
        place = NodeAffinitySchedulingStrategy(key, soft=False)
        asked[key] = task.options(scheduling_strategy=place).remote(*args(key))
    ray.wait([*asked.values()], num_returns=len(asked), timeout=_WAIT_S)
    for key, ref in asked.items():
        try:
            answers[key] = ray.get(ref, timeout=0)
        except Exception as error:
            answers[key] = error
    return answers


def _nodes(nodes: dict[str, Node]) -> Iterator[Sequence[str]]:
    """Put those that live where they are wanted, by id."""
    table = [node for node in ray.nodes() if node["Alive"]]
    living = {node["NodeID"]: (node["NodeManagerAddress"], node["Resources"]) for node in table}
    for key, seen in _on_each(living, _seen, living.__getitem__).items():
        if isinstance(seen, Exception):
            why = f"no process answers on {living[key][0]}: {type(seen).__name__}: {seen}"
            yield "fail", why, "see whether Ray and this package are there, for the node's Python"
        else:
            nodes[key] = seen
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = sorted({kind.resource for kind in DEVICE_KINDS} & total.keys())
    amounts = ", ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}" for kind in kinds)
    yield "ok", f"{len(living)} alive, {amounts} free"


def look_at(node: Node, versions: Mapping[str, str]) -> Iterator[Finding]:
    """What a node has, and what is wrong with it. `versions` are this process's."""
    store, (shm, room), (disk, free) = node.resources["object_store_memory"], node.shm, node.disk
    sizes = f"object store {store / _GIB:.1f} GiB, /dev/shm {shm / _GIB:.1f} GiB"
    theirs = {name: node.versions.get(name) for name in versions}
    differ = {n: f"{n} {v} here, {theirs[n]}" for n, v in versions.items() if v != theirs[n]}
    if differ:
        state = "fail" if differ.keys() & {"python", "ray"} else "warn"
        text = f"{node.ip}: differs from this process: {', '.join(differ.values())}"
        fix = "install the same versions: batches travel by pickle"
        yield Finding("versions", state, text, fix)
    if shm < store:
        text = f"{node.ip}: {sizes}: it does not fit, so batches go through a disk"
        fix = f"`ray start --object-store-memory={int(shm * 0.9)}`, or more shared memory (docker "
        fix += f"run --shm-size={store / _GIB * 1.1:.0f}g)"
        yield Finding("object store", "fail", text, fix)
    elif room < store * 0.5:
        text = f"{node.ip}: {sizes}, of which {room / _GIB:.1f} GiB are free: batches spill to disk"
        yield Finding("object store", "warn", text, "remove what ended programs left in /dev/shm")
    if free < max(store, disk * 0.05):  # what spilling may take; Ray's own limit
        text = f"{node.ip}: {free / _GIB:.1f} GiB free ({1 - free / disk:.0%} used) for Ray's files"
        fix = "remove old sessions there, or `ray start --temp-dir=…` on a larger disk"
        yield Finding("disk", "fail" if free < disk * 0.05 else "warn", text, fix)
    for name, has in node.devices.items():
        if has != (offered := node.resources.get(name, 0)):
            text = f"{node.ip}: has {has} device files of {name}s, and Ray offers {offered:g}"
            fix = "logical devices are fine for tests; else start Ray without *_VISIBLE_DEVICES, "
            fix += f"with --num-gpus={has}, in a container with its devices (docker run --gpus all)"
            yield Finding("devices", "warn", text, fix)
    devices = ", ".join(f"{has} {name}s" for name, has in node.devices.items() if has)
    text = f"{devices or 'no device'}, {sizes}, disk {free / _GIB:.1f} GiB free"
    yield Finding("node", "ok", f"{node.ip}: {text}")


def _ports(nodes: Mapping[str, Node]) -> Iterator[Sequence[str]]:
    table = [node for node in ray.nodes() if node["NodeID"] in nodes]
    addresses = [(n["NodeManagerAddress"], n[f"{p}ManagerPort"]) for n in table for p in _MANAGERS]
    failed: list[str] = []
    for key, found in _on_each(nodes, unreachable, lambda _: (addresses,)).items():
        missed = [f"? ({found})"] if isinstance(found, Exception) else found
        failed += [f"{nodes[key].ip} → {what}" for what in missed]
    if failed:
        yield "fail", f"no connection: {'; '.join(failed[:5])}", _PORTS
    else:
        yield "ok", f"Ray's ports of {len(nodes)} nodes are reached from each of them"


def _reduce(kind: DeviceKind, nodes: int) -> Iterator[Sequence[str]]:
    ranks = 2 if kind is CPU else min(2, int(ray.cluster_resources()[kind.resource]))
    own: Any = {"cpus_per_process": 0.01, "placement_timeout_s": 10}
    with RayResourcePool([ranks], use_gpu=kind is not CPU, **own) as pool:
        strategy = "SPREAD" if nodes > 1 and ranks > 1 else "STRICT_PACK"
        pool.get_placement_groups(strategy, device_name=kind.name)
        limits: Any = {"startup_timeout_s": _WAIT_S, "call_timeout_s": 2 * _WAIT_S}
        spec = RayClassWithInitArgs(Worker)
        with RayWorkerGroup(pool, spec, device_name=kind.name, **limits) as group:
            group.execute_all_sync("execute_with_func_generator", _all_reduce, kind.backend)
    yield "ok", f"{kind.backend}, {ranks} ranks in a group"


def _all_reduce(worker: Worker, backend: str) -> None:
    """Sum 4 MiB over the ranks of the group."""
    import torch
    import torch.distributed as dist

    if worker.device.type != CPU.name:
        getattr(torch, worker.device.type).set_device(worker.device)
    dist.init_process_group(backend)
    values = torch.ones(1 << 20, device=worker.device)
    dist.all_reduce(values)
    assert values[0].item() == worker.world_size
    dist.destroy_process_group()
