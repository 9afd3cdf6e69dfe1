"""Starting the processes of a group in two phases: all processes at once, then their roles.

What becomes of them is left to `hosts`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from single_controller.base.dispatch import padding_setting
from single_controller.base.roles import has_async_method
from single_controller.base.worker import WorkerContext, check_worker_env
from single_controller.device import CPU, DeviceKind
from single_controller.errors import CallTimeoutError, ResourceError
from single_controller.ray.failure import (
    CallSite,
    Wait,
    diagnose,
    get_all,
    not_ready,
    stacks_of,
    standing,
)
from single_controller.ray.host import AsyncHost, Host, HostInfo
from single_controller.ray.hosts import RayHosts, end_processes
from single_controller.ray.placement import Bundle, RayResourcePool, at_once, check_started, crowded
from single_controller.ray.process import ProcessInfo, check_versions
from single_controller.ray.spec import ActorSpec

__all__ = ["Recipe", "running_names"]

_ASYNC_CALLS_IN_FLIGHT = 10_000


@dataclass(frozen=True)
class Recipe:
    """All that a group's hosts are started from, as often as needed."""

    pool: RayResourcePool
    spec: ActorSpec
    strategy: str
    device_name: str | None
    prefix: str
    detached: bool
    worker_env: Mapping[str, str] | None
    master_addr: str | None
    master_port: int | None
    master_port_range: Sequence[int] | None
    startup_timeout_s: float

    def start(self, restored: bool = False) -> RayHosts:
        """Start one host per bundle of the pool; if this fails, none is left. `restored`: their
        workers' optional `restore()` is called when all roles are built.
        """
        bundles = self.pool.bundles(self.strategy, self.device_name)
        kind = self.pool.device(self.device_name)
        # `<prefix><roles>_<placement group>:<bundle>`, for `ray list actors` and attaching.
        label = self.prefix + "_".join(self.spec.roles)
        groups = {key: i for i, key in enumerate(dict.fromkeys(b.group.id for b in bundles))}
        names = [f"{label}_{groups[one.group.id]}:{one.index}" for one in bundles]
        roles = ray.put(dict(self.spec.roles))
        is_async = has_async_method(self.spec.roles)
        options = self._actor_options(kind, is_async)
        starting = _Starting(self, bundles)
        try:
            starting.launch(_actor_class(is_async), names, options)
            infos = starting.build(kind, starting.meet(), roles)
            if restored:
                starting.restore()
        except BaseException:
            starting.abandon()
            raise
        return RayHosts(starting.handles, names, infos)

    def _actor_options(self, kind: DeviceKind, is_async: bool) -> dict[str, Any]:
        """Ray's options for each host: its share of a bundle, and what the spec says."""
        parts, given = self.pool.max_colocate_count, dict(self.spec.options)
        if given.get("max_restarts"):
            raise ValueError(
                "max_restarts among Ray's options would bring back processes without their roles; "
                "the group's on_failure='restart' restarts all ranks with theirs"
            )
        resources = dict(given.pop("resources", None) or {})
        share = _share(self.pool.gpus_per_process, parts)
        made: dict[str, Any] = {"num_cpus": _share(self.pool.cpus_per_process, parts)}
        made["resources"] = resources
        if kind.resource == "GPU":
            made["num_gpus"] = share
        elif kind is not CPU:
            resources.setdefault(kind.resource, share)
        if self.detached:
            made["lifetime"] = "detached"
        if is_async:
            made["max_concurrency"] = _ASYNC_CALLS_IN_FLIGHT
        runtime_env = given.get("runtime_env") or {}
        env_vars = runtime_env.get("env_vars") or {}
        check_worker_env(env_vars, "env_vars of runtime_env")
        if self.worker_env:
            given["runtime_env"] = {**runtime_env, "env_vars": {**env_vars, **self.worker_env}}
        return {**made, **given}


@functools.cache
def _actor_class(is_async: bool) -> Any:
    return ray.remote(AsyncHost if is_async else Host)


def _share(amount: float, parts: int) -> float:
    """1/parts of an amount, rounded down as Ray counts, so that all parts fit."""
    return math.floor(amount / parts * 10_000) / 10_000


class _Starting:
    """Hosts on their way; `abandon` leaves nothing of them."""

    def __init__(self, recipe: Recipe, bundles: Sequence[Bundle]) -> None:
        self.recipe, self.bundles = recipe, bundles
        self.title = "+".join(recipe.spec.roles)
        self.handles: list[Any] = [None] * len(bundles)
        self.processes: dict[int, ProcessInfo] = {}

    def launch(self, actor: Any, names: Sequence[str], options: Mapping[str, Any]) -> None:
        def one(rank: int) -> None:
            bundle = self.bundles[rank]
            # Ray's classes with options are in cycles: what they held would be back only after a
            # garbage collection, once the pool is dropped.
            group = PlacementGroup(bundle.group.id, bundle.group.bundle_specs)
            place = PlacementGroupSchedulingStrategy(group, bundle.index)
            own = {**options, "name": names[rank], "scheduling_strategy": place}
            self.handles[rank] = actor.options(**own).remote()

        one(0)  # which sends the class to the cluster, once
        at_once(one, range(1, len(names)))

    def meet(self) -> tuple[str, int]:
        """Wait for all processes, and bind the rendezvous in rank 0's; its address."""
        recipe = self.recipe
        arrived = [handle.arrive.remote() for handle in self.handles]
        bound = self.handles[0].bind.remote(
            recipe.master_port or 0, recipe.master_port_range, recipe.master_addr
        )
        room_s = min(recipe.pool.placement_timeout_s, recipe.startup_timeout_s)
        with Wait(lambda: standing(arrived, f"starting {self.title}", range(len(arrived)))):
            late = not_ready(arrived, room_s)
        if late:
            self._check_room(late, room_s)
        processes, found = zip(*self._get(arrived, "arrive"), strict=True)
        self.processes = dict(enumerate(processes))
        check_versions(found, processes)
        address: tuple[str, int] = self._get([bound], "bind")[0]
        return address

    def _check_room(self, ranks: Sequence[int], room_s: float) -> None:
        recipe = self.recipe  # a node may have left: then Ray has moved their bundles, or cannot
        self.bundles = recipe.pool.bundles(recipe.strategy, recipe.device_name)
        full = crowded([self.bundles[rank] for rank in ranks])
        if any(full):
            raise ResourceError(
                f"ranks {[*compress(ranks, full)]} got no process within {room_s:g} s (the "
                "lesser of placement_timeout_s and startup_timeout_s): their bundles have no room "
                "left. Close groups on this pool, or raise its max_colocate_count"
            )

    def build(self, kind: DeviceKind, address: tuple[str, int], roles: Any) -> list[HostInfo]:
        """Tell all processes who they are, and have them build their roles."""
        nodes = [self.processes[rank].node_id for rank in range(len(self.handles))]
        on_node, seen, refs = Counter(nodes), Counter[str](), []
        for rank, (handle, node) in enumerate(zip(self.handles, nodes, strict=True)):
            context = WorkerContext(
                rank=rank,
                world_size=len(nodes),
                local_world_size=on_node[node],
                node_rank=seen[node],
                master_addr=address[0],
                master_port=address[1],
                device_name=kind.name,
                prefix=self.recipe.prefix,
                backend="ray",
            )
            seen[node] += 1
            refs.append(handle.build.remote(context, kind, roles, padding_setting()))
        return self._get(refs, "build")

    def restore(self) -> None:
        """Have the workers do what they do in place of others that have ended."""
        self._get([handle.restore.remote() for handle in self.handles], "restore")

    def abandon(self) -> None:
        """End what was started."""
        with contextlib.suppress(Exception):
            end_processes(self.handles, list(self.processes.values()))

    def _get(self, refs: Sequence[Any], step: str) -> list[Any]:
        timeout_s = self.recipe.startup_timeout_s
        try:
            return get_all(refs, timeout_s, f"{step} of {self.title}", range(len(refs)))
        except GetTimeoutError:
            ranks = not_ready(refs, 0)
            text = f"ranks {ranks} had not finished {step!r} of {self.title} after "
            text += f"startup_timeout_s={timeout_s:g}"
            if not self.processes:
                env = self.recipe.spec.options.get("runtime_env")
                text += f": no Python could start, or not yet with runtime_env {env}; Ray's logs "
                text += "runtime_env_setup-*.log and raylet.out say more"
            late = {rank: self.processes[rank] for rank in ranks if self.processes}
            raise CallTimeoutError(text, ranks, stacks_of(late)) from None
        except Exception as error:
            method = "__init__" if step == "build" else step
            pids = {rank: process.pid for rank, process in self.processes.items()}
            sites = [
                CallSite(self.title, method, rank, bundle.node_ip, pids.get(rank, 0))
                for rank, bundle in enumerate(self.bundles[: len(refs)])
            ]
            raise diagnose(error, refs, sites, self.processes) from None


def running_names(prefix: str, spec: ActorSpec | None) -> list[str]:
    """Names of running hosts that were started with `prefix` and, where given, with `spec`."""
    check_started()
    roles = re.escape("_".join(spec.roles)) if spec else ".+"
    pattern = re.compile(rf"{re.escape(prefix)}{roles}_\d+:\d+")
    named = ray.util.list_named_actors()
    found = [name for name in named if pattern.fullmatch(name)]
    if not found:
        raise ValueError(f"no running host has name_prefix {prefix!r}; named actors: {named}")
    return found
