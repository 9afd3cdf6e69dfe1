"""The processes of a group: started in two phases, shared by all views on them, ended once.

What is called on them is left to `calls`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import threading
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import actors
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from single_controller.base.table import RankState
from single_controller.base.worker import Worker
from single_controller.device import CPU, DeviceKind
from single_controller.errors import CallTimeoutError, GroupBrokenError, ResourceError
from single_controller.ray.actor_spec import ActorSpec
from single_controller.ray.failure import CallSite, diagnose
from single_controller.ray.host import AsyncHost, Host, HostInfo, HostPlace, needs_event_loop
from single_controller.ray.placement import Bundle, RayResourcePool

__all__ = ["Hosts", "StartOptions", "running_names"]

_logger = logging.getLogger(__name__)

_ASYNC_CALLS_IN_FLIGHT = 10_000


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


class Hosts:
    """Handles of a group's processes, one per rank, and whether they can be trusted."""

    def __init__(
        self,
        handles: Sequence[Any],
        names: Sequence[str],
        infos: Sequence[HostInfo],
        address: tuple[str, int],
        ordered: bool,
    ) -> None:
        self.handles, self.names, self.infos = list(handles), list(names), list(infos)
        self.address = address
        self._caller = uuid.uuid4().hex
        self._turns = None if ordered else [0] * len(self.handles)
        self.broken: str | None = None
        self._running: tuple[tuple[int, Any, str], ...] = ()  # rank, reference, why
        self.sending = threading.Lock()  # one call at a time, or ranks would see different orders

    @classmethod
    def start(
        cls,
        pool: RayResourcePool,
        bundles: Sequence[Bundle],
        kind: DeviceKind,
        spec: ActorSpec,
        options: StartOptions,
    ) -> Hosts:
        """Start one host per bundle.

        Raises:
            ResourceError: the bundles have no room for it.
            WorkerError: a role's constructor raised. CallTimeoutError: one did not return.
        """
        handles: list[Any] = []
        names = _names(spec, bundles, options.prefix)
        is_async = needs_event_loop(spec.roles)
        actor = _actor_class(is_async)
        common = _actor_options(pool, kind, spec, options, is_async)
        try:
            for name, bundle in zip(names, bundles, strict=True):
                place = PlacementGroupSchedulingStrategy(
                    placement_group=bundle.group, placement_group_bundle_index=bundle.index
                )
                own = {"name": name, "scheduling_strategy": place}
                handles.append(_launch(actor, {**common, **own}))
            address, infos = _set_up(handles, bundles, kind, spec, options)
        except BaseException:
            _kill(handles)
            raise
        return cls(handles, names, infos, address, ordered=not is_async)

    @classmethod
    def attach(cls, handles: Sequence[Any], names: Sequence[str], timeout_s: float) -> Hosts:
        """The hosts behind handles of running actors."""
        found = ray.get([handle.whoami.remote() for handle in handles], timeout=timeout_s)
        infos = [info for info, _, _ in found]
        if sorted(info.rank for info in infos) != list(range(len(infos))):
            raise ValueError(
                f"workers must be all ranks of one group; got ranks {[i.rank for i in infos]}"
            )
        order = sorted(range(len(infos)), key=lambda i: infos[i].rank)
        _, address, ordered = found[0]
        return cls(
            [handles[i] for i in order],
            [names[i] for i in order] if names else [],
            [infos[i] for i in order],
            address,
            ordered,
        )

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that each host holds."""
        return self.infos[0].roles

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the hosts have another caller, with an order of its own."""
        ordered = self._turns is None
        return Hosts, (self.handles, self.names, self.infos, self.address, ordered)

    def turn(self, rank: int) -> tuple[str, int] | None:
        """The next call's place in a rank's order, where Ray keeps none."""
        return None if self._turns is None else (self._caller, self._turns[rank])

    def sent(self, rank: int) -> None:
        """Note that a call has left for a rank."""
        if self._turns is not None:
            self._turns[rank] += 1

    def cancel(self, turns: Mapping[int, tuple[str, int]]) -> bool:
        """Ask for calls to be dropped whose turn, by rank, has not come.

        Only hosts with a loop can be asked: another one reads nothing until its call returns, and
        Ray runs what is queued there even after `ray.cancel`.
        """
        for rank, turn in turns.items():
            self.handles[rank].drop.remote(turn)
        return bool(turns)

    def is_alive(self, handle: Any) -> bool:
        """Whether a host lives; if not, the group is broken from now on."""
        alive: bool = actors(handle._actor_id.hex())["State"] != "DEAD"
        if not alive and self.broken is None:
            self.broken = f"the group lost a rank: {handle} died"
            _logger.error(self.broken)
        return alive

    def states(self) -> list[RankState]:
        """How each rank is; a rank whose group takes no calls is broken, or dead."""
        dead = [not self.handles or not self.is_alive(self.handles[i.rank]) for i in self.infos]
        return ["dead" if gone else "broken" if self.broken else "alive" for gone in dead]

    def site(self, role: str, method: str, rank: int) -> CallSite:
        info = self.infos[rank]
        return CallSite(role, method, rank, info.node_ip, info.pid)

    def check_usable(self) -> None:
        """Raise GroupBrokenError where a call could not be trusted, or would wait for ever."""
        if self.broken is not None:
            raise GroupBrokenError(self.broken)
        if not self.settle(0):
            ranks = sorted({rank for rank, _, _ in self._running})
            raise GroupBrokenError(f"ranks {ranks} are still in a call that {self._running[0][2]}")

    def settle(self, timeout_s: float) -> bool:
        """Wait for the ranks that were still busy when a call failed; whether they finished."""
        if self._running:
            refs = [ref for _, ref, _ in self._running]
            _, pending = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
            self._running = tuple(item for item in self._running if item[1] in pending)
        return not self._running

    def failed(self, error: Exception, refs: Sequence[Any], sites: Sequence[CallSite]) -> Exception:
        """Note what a failed call means for the group; the error to raise."""
        diagnosis = diagnose(error, refs, sites)
        why = diagnosis.error.args[0]
        self._note_running(diagnosis.running, f"failed elsewhere: {why}")
        if diagnosis.died:
            self.broken = f"the group lost a rank: {why}"
            _logger.error(self.broken)
        return diagnosis.error

    def timed_out(
        self, refs: Sequence[Any], sites: Sequence[CallSite], timeout_s: float, give_up: bool
    ) -> CallTimeoutError:
        """The error to raise for ranks still running; with `give_up`, note them for later calls."""
        _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        running = [(s.rank, ref) for ref, s in zip(refs, sites, strict=True) if ref in pending]
        if give_up:
            self._note_running(running, f"was given up after {timeout_s:g} s")
        ranks = [rank for rank, _ in running]
        return CallTimeoutError(
            f"{sites[0].role}.{sites[0].method}: ranks {ranks} of {len(self.handles)} had not "
            f"finished after {timeout_s:g} s",
            ranks,
        )

    def _note_running(self, running: Sequence[tuple[int, Any]], why: str) -> None:
        known = {ref for _, ref, _ in self._running}
        added = tuple((rank, ref, why) for rank, ref in running if ref not in known)
        self._running = (*self._running, *added)

    def close(self) -> None:
        """End all processes; calls then raise GroupBrokenError."""
        handles, self.handles = self.handles, []
        self.broken = self.broken or "the group is closed"
        if ray.is_initialized():
            _kill(handles)


@functools.cache
def _actor_class(is_async: bool) -> Any:
    return ray.remote(AsyncHost if is_async else Host)


def _launch(actor: Any, options: Mapping[str, Any]) -> Any:
    try:
        return actor.options(**options).remote()
    except ValueError as error:
        raise ResourceError(f"Ray cannot start a host with {dict(options)}: {error}") from error


def _kill(handles: Sequence[Any]) -> None:
    for handle in handles:
        with contextlib.suppress(Exception):
            ray.kill(handle)


def running_names(prefix: str, spec: ActorSpec | None) -> list[str]:
    """Names of running hosts that were started with `prefix` and, where given, with `spec`.

    Raises:
        ValueError: there are none.
    """
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
    env = _worker_env(options.worker_env)
    given = dict(spec.options)
    resources.update(given.pop("resources", None) or {})
    if env:
        runtime_env = given.get("runtime_env") or {}
        given["runtime_env"] = {
            **runtime_env,
            "env_vars": {**runtime_env.get("env_vars", {}), **env},
        }
    return {**made, **given}


def _share(amount: float, parts: int) -> float:
    """1/parts of an amount, rounded down as Ray counts, so that all parts fit."""
    return math.floor(amount / parts * 10_000) / 10_000


def _worker_env(worker_env: Mapping[str, str] | None) -> dict[str, str]:
    taken = sorted(set(Worker.env_keys()) & set(worker_env or ()))
    if taken:
        raise ValueError(f"worker_env must not set {', '.join(taken)}: each rank gets its own")
    return {key: str(value) for key, value in (worker_env or {}).items()}


def _set_up(
    handles: Sequence[Any],
    bundles: Sequence[Bundle],
    kind: DeviceKind,
    spec: ActorSpec,
    options: StartOptions,
) -> tuple[tuple[str, int], list[HostInfo]]:
    """Bind on rank 0, then build the roles everywhere."""
    started = [handle.__ray_ready__.remote() for handle in handles]
    bound = handles[0].bind.remote(
        options.master_port or 0, options.master_port_range, options.master_addr
    )
    _, missing = ray.wait(started, num_returns=len(started), timeout=options.placement_timeout_s)
    if missing:
        ranks = [rank for rank, ref in enumerate(started) if ref in missing]
        raise ResourceError(
            f"ranks {ranks} got no process within placement_timeout_s="
            f"{options.placement_timeout_s:g}: their bundles have no room left. Close groups on "
            "this pool, or raise its max_colocate_count"
        )
    address = ray.get(bound)
    on_node = Counter(bundle.node_id for bundle in bundles)
    seen: Counter[str] = Counter()
    roles = ray.put(dict(spec.roles))
    refs = []
    for rank, (handle, bundle) in enumerate(zip(handles, bundles, strict=True)):
        place = HostPlace(
            rank, len(handles), seen[bundle.node_id], on_node[bundle.node_id], options.prefix
        )
        seen[bundle.node_id] += 1
        refs.append(handle.setup.remote(place, kind, address, roles))
    sites = [CallSite("host", "setup", r, b.node_ip, 0) for r, b in enumerate(bundles)]
    try:
        return address, ray.get(refs, timeout=options.startup_timeout_s)
    except GetTimeoutError:
        _, pending = ray.wait(refs, num_returns=len(refs), timeout=0)
        ranks = [rank for rank, ref in enumerate(refs) if ref in pending]
        raise CallTimeoutError(
            f"ranks {ranks} had not built their roles {list(spec.roles)} after "
            f"startup_timeout_s={options.startup_timeout_s:g}",
            ranks,
        ) from None
    except Exception as error:
        raise diagnose(error, refs, sites).error from None
