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
from pickle import PicklingError
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from single_controller.base.plan import named_arguments
from single_controller.base.rank import has_async_method
from single_controller.base.roles import RoleSpec
from single_controller.base.rows import padding_setting
from single_controller.base.sending import not_sent
from single_controller.base.worker import check_worker_env
from single_controller.device import CPU, DeviceKind
from single_controller.errors import CallTimeoutError, ResourceError, WorkerDiedError
from single_controller.ray import patience
from single_controller.ray.actor_spec import ActorSpec
from single_controller.ray.devices import DeviceIdentity, check_devices
from single_controller.ray.failure import CallSite, diagnose, dumps, explain_death
from single_controller.ray.host import AsyncHost, Host, HostInfo, HostPlace
from single_controller.ray.hosts import Hosts, end_processes
from single_controller.ray.parcel import pickles
from single_controller.ray.placement import Bundle, RayResourcePool, check_started
from single_controller.ray.process import ExitWatch, ProcessInfo
from single_controller.ray.reservations import crowded
from single_controller.ray.stacks import readable

__all__ = ["Recipe", "StartOptions", "running_names"]

_ASYNC_CALLS_IN_FLIGHT = 10_000
_END_S = 1.0


@dataclass(frozen=True)
class StartOptions:
    """How a group's hosts are started, apart from what they hold."""

    prefix: str
    detached: bool = False
    worker_env: Mapping[str, str] | None = None
    master_addr: str | None = None
    master_port: int | None = None
    master_port_range: Sequence[int] | None = None
    placement_timeout_s: float = 60
    startup_timeout_s: float = 600


@dataclass(frozen=True)
class Recipe:
    """All that a group's hosts are started from, as often as needed."""

    pool: RayResourcePool
    strategy: str
    device_name: str | None
    spec: ActorSpec
    options: StartOptions

    def start(self, restored: bool = False) -> Hosts:
        """Start one host per bundle of the pool; if this fails, none is left.

        Args:
            restored: call the workers' optional `restore()` when all roles are built.

        Raises:
            ResourceError: the bundles have no room for it.
            SendError: a role's class or arguments cannot be pickled; then no process was started.
            WorkerError: a role's constructor raised, or the runtime_env could not be set up.
            CallTimeoutError: a constructor did not return, or a process was not there, in time.
        """
        bundles = self.pool.bundles(self.strategy, self.device_name)
        kind = self.pool.device(self.device_name)
        names = _names(self.spec, bundles, self.options.prefix)
        roles = _stored(self.spec.roles)
        is_async = has_async_method(self.spec.roles)
        actor = _actor_class(is_async)
        common = _actor_options(self.pool, kind, self.spec, self.options, is_async)
        starting = _Starting(self.spec, self.options)
        try:
            for name, bundle in zip(names, bundles, strict=True):
                # Ray's classes with options are in cycles: what they held would be back only after
                # a garbage collection, once the pool is dropped.
                group = PlacementGroup(bundle.group.id, bundle.group.bundle_specs)
                place = PlacementGroupSchedulingStrategy(group, bundle.index)
                own = {"name": name, "scheduling_strategy": place}
                starting.handles.append(_launch(actor, {**common, **own}))
            address = starting.meet(bundles)
            # Before the roles are there, of which two need not fit onto one device.
            devices = starting.set_up(bundles, kind, address)
            check_devices(devices, self.pool.gpus_per_process)
            infos = starting.build(roles)
            if restored:
                starting.restore()
        except BaseException:
            starting.abandon()
            raise
        return Hosts(starting.handles, names, infos, address, ordered=not is_async)


@functools.cache
def _actor_class(is_async: bool) -> Any:
    return ray.remote(AsyncHost if is_async else Host)


def _launch(actor: Any, options: Mapping[str, Any]) -> Any:
    try:
        return actor.options(**options).remote()
    except ValueError as error:
        raise ResourceError(f"Ray cannot start a host with {dict(options)}: {error}") from error


def _stored(roles: Mapping[str, RoleSpec]) -> Any:
    try:
        return ray.put(dict(roles))
    except (TypeError, AttributeError, PicklingError) as error:
        for role, spec in roles.items():
            parts = [*named_arguments(spec.args, spec.kwargs), ("its class", spec.cls)]
            found = not_sent(f"{role}.__init__", parts, pickles)
            if found is not None:
                raise found from error
        raise


class _Starting:
    """Hosts on their way; `abandon` leaves nothing of them."""

    def __init__(self, spec: ActorSpec, options: StartOptions) -> None:
        self.spec, self.options = spec, options
        self.handles: list[Any] = []
        self._processes: dict[int, ProcessInfo] = {}
        self._watches: dict[int, ExitWatch] = {}

    def meet(self, bundles: Sequence[Bundle]) -> tuple[str, int]:
        """Wait for all processes, and bind the rendezvous in rank 0's; its address."""
        options = self.options
        arrived = [handle.arrive.remote() for handle in self.handles]
        bound = self.handles[0].bind.remote(
            options.master_port or 0, options.master_port_range, options.master_addr
        )
        what, wait_s = f"starting {'+'.join(self.spec.roles)}", options.placement_timeout_s
        ranks = patience.missing(arrived, wait_s, what)
        if ranks:
            self._check_room(ranks, bundles)
            ranks = patience.missing(arrived, max(0.0, options.startup_timeout_s - wait_s), what)
        if ranks:
            raise self._not_started(ranks, bundles)
        found = self._get(arrived, "arrive", wait_s)
        self._processes = dict(enumerate(found))
        self._watches = {rank: ExitWatch(process) for rank, process in enumerate(found)}
        address: tuple[str, int] = self._get([bound], "bind", wait_s)[0]
        return address

    def _check_room(self, ranks: Sequence[int], bundles: Sequence[Bundle]) -> None:
        full = crowded([(bundles[rank].group, bundles[rank].index) for rank in ranks])
        without = [rank for rank, is_full in zip(ranks, full, strict=True) if is_full]
        if without:
            raise ResourceError(
                f"ranks {without} got no process within placement_timeout_s="
                f"{self.options.placement_timeout_s:g}: their bundles have no room left. Close "
                "groups on this pool, or raise its max_colocate_count"
            )

    def _not_started(self, ranks: Sequence[int], bundles: Sequence[Bundle]) -> CallTimeoutError:
        env = self.spec.options.get("runtime_env")
        doing = f"their runtime_env {env} is not set up yet, or" if env else "perhaps"
        nodes = ", ".join(sorted({bundles[rank].node_ip for rank in ranks}))
        waited_s = max(self.options.placement_timeout_s, self.options.startup_timeout_s)
        return CallTimeoutError(
            f"ranks {ranks} have no process after startup_timeout_s={waited_s:g}, though their "
            f"bundles have room: {doing} no Python could start for them. Ray's logs "
            f"runtime_env_setup-*.log and raylet.out on {nodes} say more",
            ranks,
        )

    def set_up(
        self, bundles: Sequence[Bundle], kind: DeviceKind, address: tuple[str, int]
    ) -> list[DeviceIdentity | None]:
        """Tell all processes who they are; their devices."""
        on_node = Counter(bundle.node_id for bundle in bundles)
        seen: Counter[str] = Counter()
        refs = []
        for rank, (handle, bundle) in enumerate(zip(self.handles, bundles, strict=True)):
            place = HostPlace(
                rank,
                len(self.handles),
                seen[bundle.node_id],
                on_node[bundle.node_id],
                self.options.prefix,
            )
            seen[bundle.node_id] += 1
            refs.append(handle.setup.remote(place, kind, address))
        return self._get(refs, "setup", self.options.startup_timeout_s)

    def build(self, roles: Any) -> list[HostInfo]:
        """Build the roles everywhere."""
        refs = [handle.build.remote(roles, padding_setting()) for handle in self.handles]
        return self._get(refs, "build", self.options.startup_timeout_s)

    def restore(self) -> None:
        """Let the workers load what they had, where they know how."""
        refs = [handle.restore.remote() for handle in self.handles]
        self._get(refs, "restore", self.options.startup_timeout_s)

    def abandon(self) -> None:
        """End what was started."""
        with contextlib.suppress(Exception):
            end_processes(self.handles, list(self._processes.values()), _END_S)

    def _get(self, refs: Sequence[Any], step: str, timeout_s: float) -> list[Any]:
        try:
            what = f"{step} of {'+'.join(self.spec.roles)}"
            return patience.get(refs, timeout_s, what, range(len(refs)))
        except GetTimeoutError:
            _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=0)
            ranks = [rank for rank, ref in enumerate(refs) if ref in pending]
            processes = {rank: self._processes[rank] for rank in ranks if rank in self._processes}
            what = "restored" if step == "restore" else "built"
            raise CallTimeoutError(
                f"ranks {ranks} had not {what} their roles {list(self.spec.roles)} after "
                f"startup_timeout_s={timeout_s:g}",
                ranks,
                {rank: readable(dump) for rank, dump in dumps(processes).items()},
            ) from None
        except Exception as error:
            raise self._diagnosed(error, refs, step) from None

    def _diagnosed(self, error: Exception, refs: Sequence[Any], step: str) -> Exception:
        sites, step = [], "__init__" if step == "build" else step
        for rank in range(len(refs)):
            process = self._processes.get(rank)
            where = (process.node_ip, process.pid) if process else ("?", 0)
            sites.append(CallSite("+".join(self.spec.roles), step, rank, *where))
        first = diagnose(error, refs, sites, self._processes).error
        if isinstance(first, WorkerDiedError) and first.rank in self._processes:
            return explain_death(first, self._processes[first.rank], self._watches[first.rank])
        return first


def running_names(prefix: str, spec: ActorSpec | None) -> list[str]:
    """Names of running hosts that were started with `prefix` and, where given, with `spec`.

    Raises:
        ValueError: there are none. ResourceError: Ray has not been started.
    """
    check_started()
    roles = re.escape("_".join(spec.roles)) if spec else ".+"
    pattern = re.compile(rf"{re.escape(prefix)}{roles}_\d+:\d+")
    named = ray.util.list_named_actors()
    found = [name for name in named if pattern.fullmatch(name)]
    if not found:
        raise ValueError(f"no running host has name_prefix {prefix!r}; named actors: {named}")
    return found


def _names(spec: ActorSpec, bundles: Sequence[Bundle], prefix: str) -> list[str]:
    """`<prefix><roles>_<placement group>:<bundle>`, for `ray list actors` and for attaching."""
    label = "_".join(spec.roles)
    groups = list(dict.fromkeys(bundle.group.id for bundle in bundles))
    return [f"{prefix}{label}_{groups.index(b.group.id)}:{b.index}" for b in bundles]


def _actor_options(
    pool: RayResourcePool, kind: DeviceKind, spec: ActorSpec, options: StartOptions, is_async: bool
) -> dict[str, Any]:
    resources: dict[str, float] = {}
    made: dict[str, Any] = {
        "num_cpus": _share(pool.cpus_per_process, pool.max_colocate_count),
        "resources": resources,
    }
    gpus = _share(pool.gpus_per_process, pool.max_colocate_count)
    if kind is not CPU and kind.resource == "GPU":
        made["num_gpus"] = gpus
    elif kind is not CPU:
        resources[kind.resource] = gpus
    if options.detached:
        made["lifetime"] = "detached"
    if is_async:
        made["max_concurrency"] = _ASYNC_CALLS_IN_FLIGHT
    env = dict(options.worker_env or {})
    given = dict(spec.options)
    if given.get("max_restarts"):
        raise ValueError(
            "max_restarts among Ray's options would bring back a process without its roles; "
            "on_failure='restart' of the group restarts all ranks with theirs"
        )
    resources.update(given.pop("resources", None) or {})
    runtime_env = given.get("runtime_env") or {}
    check_worker_env(runtime_env.get("env_vars"), "env_vars of runtime_env")
    if env:
        given["runtime_env"] = {
            **runtime_env,
            "env_vars": {**runtime_env.get("env_vars", {}), **env},
        }
    return {**made, **given}


def _share(amount: float, parts: int) -> float:
    """1/parts of an amount, rounded down as Ray counts, so that all parts fit."""
    return math.floor(amount / parts * 10_000) / 10_000
