"""`doctor`: whether a cluster can do what groups need of it, and what to do where it cannot."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
from ray._private.services import find_gcs_addresses
from ray._private.utils import estimate_available_memory
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from single_controller.base import Worker
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind
from single_controller.errors import ResourceError
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from single_controller.ray.process import versions

__all__ = ["Finding", "Node", "Probe", "connect", "doctor", "guarded", "look_at"]

_WAIT_S = 60.0
_KNOCK_S = 30.0
_GIB = 1 << 30
_CLIENT = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
_START = "start one with `ray start --head`, or name one with --address"
_NAME = "name one with --address or RAY_ADDRESS; --address local: doctor starts one of its own"
_TOKEN = (
    "RAY_AUTH_MODE=token, with the cluster's own token (`ray get-auth-token` there) in "
    "RAY_AUTH_TOKEN or in the file at RAY_AUTH_TOKEN_PATH"
)
_LOGS = "look into `ray status` and the newest logs under /tmp/ray/session_latest/logs"
_SILENT = "see whether Ray still runs there, and install this package there, for its Python"
_OPEN = "one token and RAY_AUTH_MODE=token on all nodes, or a network that nobody else reaches"
_PORTS = "open the nodes' ports to each other, or give groups a master_port_range of open ones"
_REDUCE = (
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME (worker_env=...) chooses the interface that the "
    "nodes reach each other by (`ip -br addr`); NCCL_DEBUG=INFO says more"
)


class Finding(NamedTuple):
    """What a check says: "ok", "warn", "fail" or "skip", and for a bad one what to do about it."""

    check: str
    state: str
    detail: str
    fix: str = ""


def _own_node() -> Any:
    return ray._private.worker._global_node  # pyright: ignore[reportAttributeAccessIssue]


class Node:
    """The node that this process is on, now. Memory is in bytes, `devices` counts device files."""

    def __init__(self, ip: str, resources: Mapping[str, float]) -> None:
        self.ip, self.resources = ip, defaultdict(float, resources)
        self.versions = versions()
        own = _own_node()
        self.session = own.get_session_dir_path() if own else "/tmp"  # where Ray writes to
        self.disk: Any = shutil.disk_usage(self.session)[::2]  # all, and what is free
        self.shm: Any = shutil.disk_usage("/dev/shm")[::2] if os.path.isdir("/dev/shm") else (0, 0)
        self.memory = estimate_available_memory()
        self.asks_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        self.devices = {k.resource: len(glob.glob(k.files)) for k in DEVICE_KINDS if k.files}
        self.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.clock_s = time.time()
        self.port = 0  # which takes connections


class Probe:
    """A process on a node that looks around, and tries connections to others."""

    def __init__(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._socket = socket.create_server(
            ("", 0), family=family, backlog=1_024, dualstack_ipv6=both
        )

    def look(self, ip: str, resources: Mapping[str, float]) -> Node:
        """This node, now."""
        node = Node(ip, resources)
        node.port = self._socket.getsockname()[1]
        return node

    def unreachable(self, addresses: Sequence[tuple[str, int]], batch: Any = None) -> list[str]:
        """Those that take no connection from here, each with why; the batch has to arrive, too."""

        def why(address: tuple[str, int]) -> str:
            try:
                socket.create_connection(address, timeout=3).close()
            except OSError as error:
                return f"{address[0]} ({error})"
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
    nodes: dict[Node, Any] = {}
    yield from guarded("nodes", _LOGS, _nodes, nodes)
    for node in nodes:
        yield from look_at(node, Node("", {}).versions)
    if nodes:
        yield from guarded("ports", _PORTS, _ports, nodes)
    for kind in reversed(DEVICE_KINDS) if nodes else ():
        has = any(n.resources[kind.resource] and n.devices.get(kind.resource) for n in nodes)
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
    here = sorted(find_gcs_addresses())
    found = [] if named and named != "auto" else here
    if len(found) > 1:
        raise ValueError(f"{len(found)} clusters run on this machine: {', '.join(found)}\n{_NAME}")
    where = found[0] if found else named or ""
    if where in here:  # Ray itself shows the user's token only to a cluster that it finds
        with contextlib.suppress(AttributeError, ImportError):  # a Ray without tokens
            from ray._private.authentication import authentication_token_setup as setup

            logging.getLogger(ray.__name__).setLevel(logging.ERROR)  # as by `ray.init` below
            setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    _knock(where)
    try:
        context: Any = ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        text = " ".join(str(error).split("\n")[:4]).strip() or type(error).__name__
        raise ValueError(f"{text}\n{_START}") from None
    started = ", started for these checks" if (own := _own_node()) and own.head else ""
    return f"reached {context.address_info['gcs_address']}{started}"


def _knock(address: str) -> None:
    """Raise ValueError if no cluster takes this process there. Ray itself would try for a minute,
    and fill the screen; a process of its own does so at its cost.
    """
    if (match := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address)) is None:
        return
    knock = [sys.executable, "-c", _CLIENT, address]
    try:
        socket.create_connection((match[1], int(match[2])), timeout=5).close()
        subprocess.run(knock, capture_output=True, text=True, timeout=_KNOCK_S, check=True)
    except OSError as error:
        raise ValueError(f"nothing takes connections at {address}: {error}\n{_START}") from None
    except subprocess.TimeoutExpired:
        hangs = f"what takes connections at {address} is no Ray cluster, or one that hangs"
        raise ValueError(f"{hangs}\n{_START}") from None
    except subprocess.CalledProcessError as error:  # what else there is to say, Ray says
        if re.search("(?i)authenticat", error.stderr):
            raise ValueError(f"the cluster at {address} wants its token\n{_TOKEN}") from None


def _nodes(nodes: dict[Node, Any]) -> Iterator[Sequence[str]]:
    """Put those that live where they are wanted, each with its probe."""
    actor: Any = ray.remote(num_cpus=0)(Probe)
    table = sorted(ray.nodes(), key=lambda node: node["NodeManagerAddress"])
    living = {n["NodeID"]: (n["NodeManagerAddress"], n["Resources"]) for n in table if n["Alive"]}
    places = {i: NodeAffinitySchedulingStrategy(i, soft=False) for i in living}
    probes = {i: actor.options(scheduling_strategy=place).remote() for i, place in places.items()}
    first = _answers({i: probe.look.remote(*living[i]) for i, probe in probes.items()})
    began, started = time.time(), [i for i, node in first.items() if isinstance(node, Node)]
    again = _answers({i: probes[i].look.remote(*living[i]) for i in started})
    ended = time.time()
    for i, node in {**first, **again}.items():
        if isinstance(node, Exception):
            why = f"no process answers on {living[i][0]}: {type(node).__name__}: {node}"
            yield "fail", why, _SILENT
        else:
            node.clock_s -= min(max(node.clock_s, began), ended)  # it has looked in between
            nodes[node] = probes[i]
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [k for k in dict.fromkeys(k.resource for k in reversed(DEVICE_KINDS)) if k in total]
    amounts = ", ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}" for kind in kinds)
    yield "ok", f"{len(living)} alive, {amounts} free"
    if takers := [node.ip for node in nodes if not node.asks_token]:
        yield "warn", f"no token: whoever reaches Ray on {', '.join(takers)} runs code there", _OPEN
    if dead := [node["NodeManagerAddress"] for node in table if not node["Alive"]]:
        fix = "`ray start --address=…` there, if they are still meant to take part"
        yield "warn", f"the cluster has lost {', '.join(dead)}", fix


def _answers(asked: Mapping[Any, Any]) -> dict[Any, Any]:
    """What each reference comes to, or the exception, within a time that all share."""
    ray.wait([*asked.values()], num_returns=len(asked), timeout=_WAIT_S)
    answers: dict[Any, Any] = {}
    for key, ref in asked.items():
        try:
            answers[key] = ray.get(ref, timeout=0)
        except Exception as error:
            answers[key] = error
    return answers


def look_at(node: Node, versions: Mapping[str, str]) -> Iterator[Finding]:
    """What a node has, and what is wrong with it. `versions` are this process's, `clock_s` is what
    the node's clock is ahead of this one's.
    """
    store, (shm, room), (disk, free) = node.resources["object_store_memory"], node.shm, node.disk
    offered = node.resources["memory"]
    sizes = f"object store {store / _GIB:.1f} GiB, /dev/shm {shm / _GIB:.1f} GiB"
    spills = f"{sizes}, of which {room / _GIB:.1f} GiB are free: batches spill to disk"
    devices = [f"{has} {name}s" for name, has in node.devices.items() if has] or ["no device"]
    theirs = {n: node.versions.get(n) for n in versions}
    differ = {n: f"{n} {v} here, {theirs[n]}" for n, v in versions.items() if v != theirs[n]}
    full = free < disk * 0.05  # Ray's own limit
    fatal = "fail" if differ.keys() & {"python", "ray"} else "warn"
    fits = f"`ray start --object-store-memory={int(shm * 0.9)}`, or more shared memory (docker "
    fits += f"run --shm-size={store / _GIB * 1.1:.0f}g)"
    checks = [
        (differ, "versions", fatal, f"differs from this process: {', '.join(differ.values())}",
         "install the same versions: batches travel by pickle"),
        (shm < store, "object store", "fail", f"{sizes}: it does not fit, so batches go through a "
         "disk", fits),
        (shm >= store and (room < store * 0.5 or store < _GIB), "object store", "warn", spills,
         "remove what ended programs have left in /dev/shm, or raise --object-store-memory"),
        (full or free < store, "disk", "fail" if full else "warn",  # what spilling may take
         f"{free / _GIB:.1f} GiB free ({1 - free / disk:.0%} used): {node.session}",
         "remove old sessions there, or `ray start --temp-dir=…` on a larger disk"),
        (node.memory < offered * 0.2, "memory", "warn", f"{node.memory / _GIB:.1f} GiB free, and "
         f"Ray offers {offered / _GIB:.1f}: from 95% used on it ends workers",
         "end what else runs there, or raise RAY_memory_usage_threshold before `ray start`"),
        (node.open_files < 4_096, "open files", "warn",
         f"a process there may open {node.open_files} files only",
         "`ulimit -n 65536` before `ray start`"),
        (abs(node.clock_s) > 0.5, "clocks", "warn",
         f"{node.clock_s:+.1f} s off: which rank failed first is told by clocks",
         "keep the nodes' clocks together (chrony, ntpd)"),
    ]  # fmt: skip
    for name, has in node.devices.items():
        text = f"has {has} device files of {name}s, and Ray offers {node.resources[name]:g}"
        fix = "logical devices are fine for tests; else start Ray without *_VISIBLE_DEVICES, "
        fix += f"with --num-gpus={has}, in a container with its devices (docker run --gpus all)"
        checks.append((node.resources[name] != has, "devices", "warn", text, fix))
    text = f"{', '.join(devices)}, {sizes}, disk {free / _GIB:.1f} GiB free"
    for applies, check, state, what, fix in [*checks, (True, "node", "ok", text, "")]:
        if applies:
            yield Finding(check, state, f"{node.ip}: {what}", fix)


def _ports(nodes: Mapping[Node, Any]) -> Iterator[Sequence[str]]:
    addresses, batch = [(node.ip, node.port) for node in nodes], ray.put(bytearray(64 << 20))
    tries = {n: probe.unreachable.remote(addresses, batch) for n, probe in nodes.items()}
    failed: list[str] = []
    for node, found in _answers(tries).items():
        missed = [f"a batch ({found})"] if isinstance(found, Exception) else found
        failed += [f"{node.ip} → {what}" for what in missed]
    if failed:
        yield "fail", f"no connection: {'; '.join(failed[:5])}", _PORTS
    else:
        yield "ok", f"any of {len(nodes)} nodes reaches a new port of any other"


def _reduce(kind: DeviceKind, nodes: int) -> Iterator[Sequence[str]]:
    ranks = 2 if kind is CPU else min(2, int(ray.cluster_resources()[kind.resource]))
    own: Any = {"cpus_per_process": 0.01, "placement_timeout_s": 10}
    with RayResourcePool([ranks], use_gpu=kind is not CPU, **own) as pool:
        strategy = "SPREAD" if nodes > 1 and ranks > 1 else "STRICT_PACK"
        pool.get_placement_groups(strategy, device_name=kind.name)
        limits: Any = {"startup_timeout_s": _WAIT_S, "call_timeout_s": 2 * _WAIT_S}
        spec = RayClassWithInitArgs(Worker)
        with RayWorkerGroup(pool, spec, device_name=kind.name, **limits) as group:
            took = group.execute_all_sync("execute_with_func_generator", _all_reduce, kind.backend)
    yield "ok", f"{kind.backend}, {ranks} ranks in a group: 4 MiB in {max(took) * 1e3:.1f} ms"


def _all_reduce(worker: Worker, backend: str) -> float:
    """Seconds for 4 MiB, on each rank of the group."""
    import torch
    import torch.distributed as dist

    if worker.device.type != CPU.name:
        getattr(torch, worker.device.type).set_device(worker.device)
    dist.init_process_group(backend)
    values, began = torch.ones(1 << 20, device=worker.device), 0.0
    for _ in range(2):  # the first one connects
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()
    seconds = time.perf_counter() - began
    dist.destroy_process_group()
    return seconds
