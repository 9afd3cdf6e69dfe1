"""Whether a cluster can do what groups need of it: reaching it, its nodes, a group's all-reduce.

Showing the findings is left to the command line.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.services import find_gcs_addresses
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from single_controller.base.decorator import Dispatch, register
from single_controller.base.worker import Worker
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind
from single_controller.errors import ResourceError
from single_controller.ray.actor_spec import RayClassWithInitArgs
from single_controller.ray.node_checks import (
    NODE_CHECKS,
    PATIENCE_S,
    Finding,
    Node,
    accelerators,
)
from single_controller.ray.node_probe import NodeProbe
from single_controller.ray.placement import RayResourcePool
from single_controller.ray.worker_group import RayWorkerGroup

__all__ = ["Reducer", "connect", "examine"]


class Reducer(Worker):
    """A rank of the group that `doctor` starts."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def all_reduce(self, backend: str) -> tuple[float, float]:
        """The sum over ranks of rank + 1, and seconds for 4 MiB."""
        import torch
        import torch.distributed as dist

        if self.device.type != CPU.name:
            getattr(torch, self.device.type).set_device(self.device)
        dist.init_process_group(backend)
        values = torch.full((1 << 20,), float(self.rank + 1), device=self.device)
        dist.all_reduce(values)
        total, began = values[0].item(), time.perf_counter()
        dist.all_reduce(values)
        values[0].item()
        seconds = time.perf_counter() - began
        dist.destroy_process_group()
        return total, seconds


def connect(address: str | None) -> Finding:
    """Connect this process to a cluster; without an `address`, to the one that Ray finds, or to
    one of its own on this machine. Where several run, one must be named.
    """
    start = "start one with `ray start --head`, or name one with --address"
    named = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    here = sorted(find_gcs_addresses())
    found = [] if named and named != "auto" else here
    if len(found) > 1:
        several = f"{len(found)} clusters run on this machine: {', '.join(found)}"
        own = "; --address local starts one for these checks" if address is None else ""
        return Finding("cluster", "fail", several, f"name one with --address or RAY_ADDRESS{own}")
    for where in found or [named or ""]:
        if where in here:
            _take_token()
        refusal, fix = _refusal(where)
        if refusal:
            return Finding("cluster", "fail", refusal, fix or start)
    try:
        context: Any = ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        return Finding("cluster", "fail", _first_lines(error), start)
    except Exception as error:
        versions = "ersion mismatch" in str(error)
        same = "use the Python and the Ray that the cluster was started with"
        return Finding("cluster", "fail", _first_lines(error), same if versions else _LOGS)
    node = ray._private.worker._global_node  # pyright: ignore[reportAttributeAccessIssue]
    if node is not None and node.head:
        return Finding(
            "cluster",
            "ok",
            "none was named or found: these checks started one of their own on this machine, as "
            "ray.init() in a program does. `ray start --head` starts one that stays",
        )
    return Finding("cluster", "ok", f"reached {context.address_info['gcs_address']}")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:4]).strip() or type(error).__name__


def _take_token() -> None:
    """Show the user's token to a cluster of this machine, also to a named one: Ray itself does so
    only for one that it finds, and where several run, each must be named.
    """
    try:
        from ray._private.authentication import authentication_token_setup as setup

        logging.getLogger(ray.__name__).setLevel(logging.ERROR)  # as by `ray.init` in `connect`
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    except (AttributeError, ImportError):  # a Ray without tokens
        pass


def _refusal(address: str) -> tuple[str, str]:
    """Why no cluster takes this process there, and what to do where that is known. Ray itself
    would try for a minute, and fill the screen; a process of its own does so at its cost.
    """
    match = re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address)
    if match is None:
        return "", ""
    try:
        socket.create_connection((match[1], int(match[2])), timeout=5).close()
    except OSError as error:
        return f"nothing takes connections at {address}: {error}", ""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _KNOCK, address],
            capture_output=True,
            text=True,
            timeout=_KNOCK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"what takes connections at {address} is no Ray cluster, or one that hangs", ""
    if tried.returncode and re.search("(?i)authenticat", tried.stderr):
        return f"the cluster at {address} wants its token: {_token_seen()}", _TOKEN
    return "", ""  # what else there is to say, Ray says


_KNOCK_S = 30.0
_KNOCK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
_TOKEN = (
    "RAY_AUTH_MODE=token, with the cluster's own token (`ray get-auth-token`, where it was "
    "started) in RAY_AUTH_TOKEN or in the file at RAY_AUTH_TOKEN_PATH"
)


def _token_seen() -> str:
    """What this process has to show for itself, without showing it."""
    mode = os.environ.get("RAY_AUTH_MODE") or "not set"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN"):
        token = "a token in RAY_AUTH_TOKEN"
    else:
        token = f"{'a' if path.is_file() else 'no'} token at {path}"
    return f"here RAY_AUTH_MODE is {mode}, and there is {token}"


def examine() -> Iterator[Finding]:
    """Every check on the cluster that this process is connected to, one after another."""
    nodes: list[Node] = []
    yield from _guarded("nodes", _LOGS, _look, nodes)
    for name, check in NODE_CHECKS.items() if nodes else ():
        yield from _guarded(name, _LOGS, check, nodes)
    for kind in (CPU, *_offered(nodes)):
        fix = _GLOO if kind is CPU else _NCCL
        yield from _guarded(f"all-reduce {kind.name}", fix, _reduce, kind, len(nodes))


_LOGS = "look into `ray status` and the newest logs under /tmp/ray/session_latest/logs"
_GLOO = (
    "if the checks above pass, set GLOO_SOCKET_IFNAME (worker_env=...) to the interface that the "
    "nodes reach each other by (`ip -br addr`)"
)
_NCCL = (
    "NCCL_DEBUG=INFO (worker_env=...) says why; NCCL_SOCKET_IFNAME chooses the interface, and "
    "`python -c 'import torch; print(torch.cuda.is_available())'` tells a torch without CUDA"
)


def _offered(nodes: Sequence[Node]) -> list[DeviceKind]:
    """Kinds of accelerator that Ray offers on nodes that have their device files."""
    return [
        kind
        for kind in DEVICE_KINDS
        if kind.files
        and any(
            n.resources.get(kind.resource) and n.report.devices.get(kind.resource) for n in nodes
        )
    ]


def _guarded(
    name: str, fix: str, check: Callable[..., Iterator[Finding]], *args: Any
) -> Iterator[Finding]:
    """What a check finds. What it says at its end to be well counts if nothing was wrong before."""
    wrong = False
    try:
        for finding in check(*args):
            if not (wrong and finding.state == "ok"):
                yield finding
            wrong = wrong or finding.state != "ok"
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        short = text if len(text) < 1_500 else f"{text[:700]} … {text[-700:]}"
        yield Finding(name, "fail", short, fix)


def _look(nodes: list[Node]) -> Iterator[Finding]:
    table = ray.nodes()
    dead = [node["NodeManagerAddress"] for node in table if not node["Alive"]]
    living = [node for node in table if node["Alive"]]
    actor: Any = ray.remote(NodeProbe)
    probes = [
        actor.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for node in living
    ]
    for node, probe in zip(living, probes, strict=True):
        ip = node["NodeManagerAddress"]
        try:
            report = ray.get(probe.look.remote(), timeout=PATIENCE_S)
        except Exception as error:
            yield Finding(
                "nodes",
                "fail",
                f"no process could be started on {ip}: {type(error).__name__}: {error}",
                f"install this package and what it needs on {ip}, in the environment that Ray runs "
                "in there; or take the node out with `ray stop`",
            )
            continue
        nodes.append(Node(ip, node["Resources"], probe, report))  # pyright: ignore[reportArgumentType]
    total = ray.cluster_resources()
    free = ray.available_resources()
    shown = [name for name in ("CPU", *accelerators()) if name in total]
    amounts = ", ".join(f"{free.get(name, 0):g} of {total[name]:g} {name}" for name in shown)
    yield Finding("nodes", "ok", f"{len(nodes)} alive, {amounts} free")
    if dead:
        yield Finding(
            "nodes",
            "warn",
            f"the cluster has lost {', '.join(dead)}",
            "`ray start --address=…` there, if they are still meant to take part",
        )


def _reduce(kind: DeviceKind, nodes: int) -> Iterator[Finding]:
    check = f"all-reduce {kind.name}"
    offered = ray.cluster_resources().get(kind.resource, 0)
    ranks = 2 if kind is CPU else min(2, int(offered))
    pool = RayResourcePool(
        [ranks],
        use_gpu=kind is not CPU,
        cpus_per_process=0.01,
        max_colocate_count=1,
        placement_timeout_s=10,
    )
    spread = nodes > 1 and ranks > 1
    strategy = "SPREAD" if spread else "STRICT_PACK"
    with pool:
        try:
            pool.get_placement_groups(strategy, device_name=kind.name)
        except ResourceError as error:
            yield Finding(
                check, "skip", f"{ranks} × {kind.resource} are not free: {str(error)[:200]}", ""
            )
            return
        spec = RayClassWithInitArgs(Reducer)
        with RayWorkerGroup(
            pool, spec, device_name=kind.name, startup_timeout_s=PATIENCE_S, call_timeout_s=120
        ) as group:
            results = group.all_reduce(kind.backend)
    expected = ranks * (ranks + 1) / 2
    wrong = [total for total, _ in results if total != expected]
    if wrong:
        yield Finding(
            check,
            "fail",
            f"{kind.backend} on {ranks} ranks gave {wrong[0]} and not {expected}",
            "run the collective's own tests on these devices (all_reduce_perf of nccl-tests)",
        )
    else:
        rate = max(seconds for _, seconds in results)
        yield Finding(
            check, "ok", f"{kind.backend}, {ranks} ranks in a group: 4 MiB in {rate * 1e3:.1f} ms"
        )
