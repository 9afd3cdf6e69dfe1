"""Pools reserved as placement groups: whether a cluster can hold one, where each rank goes, who
else holds resources, and giving back what is closed, dropped, or left by an actor that has ended.

Splitting and merging pools is left to `pools`, what runs in them to `start`.
"""

from __future__ import annotations

import contextlib
import inspect
import ipaddress
import logging
import math
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray._private.state import available_resources_per_node, state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from single_controller.base.plan import ResourcePool
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind, device_kind
from single_controller.errors import ResourceError, check_seconds
from single_controller.ray.failure import Wait

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Bundle",
    "NodeResources",
    "PoolRequest",
    "RayResourcePool",
    "Reservation",
    "SubRayResourcePool",
    "actor_info",
    "at_once",
    "await_death",
    "check_started",
    "cluster_nodes",
    "crowded",
    "dead",
    "give_back",
    "in_use",
    "living_actors",
    "remove",
    "reservations",
    "sort_placement_group_by_node_ip",
]

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 16  # round trips to the cluster
_REMOVAL_S = 10.0
_DEATH_S = 10.0
_LOOK_S = 0.5  # between looks whether a dropped reservation is empty
_POLL_S, _MOST_POLL_S = 0.005, 0.5  # between looks at what is waited for: first, at most
_SHOWN = 10
_MARK = "single_controller_"  # in the names of pools' placement groups
_pb: Any = gcs_pb2


@dataclass(frozen=True)
class NodeResources:
    """What a node has, and what of it nobody holds."""

    ip: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class PoolRequest:
    """`counts[i]` bundles, each of `bundle`, form placement group i under `strategy`."""

    counts: tuple[int, ...]
    bundle: Mapping[str, float]
    strategy: str = "STRICT_PACK"

    def check(self, what: str) -> None:
        """Raise ResourceError where the cluster, empty, could not hold it."""
        if not self.fits(nodes := cluster_nodes()):
            raise ResourceError(f"the cluster cannot hold {what}: {self.explain(nodes)}")

    def fits(self, nodes: Sequence[NodeResources]) -> bool:
        """Whether empty nodes could hold it. No is certain; yes leaves the packing to Ray."""
        room = [self._capacity(node.total) for node in nodes]
        if self.strategy == "STRICT_PACK":
            for size in set(self.counts):  # of those at least as large, a node holds so many
                if sum(count >= size for count in self.counts) > sum(r // size for r in room):
                    return False
        return sum(self.counts) <= sum(room)

    def __str__(self) -> str:
        asked = f"{sum(self.counts)} × {_shown(self.bundle)}"
        return f"process_on_nodes={[*self.counts]} under {self.strategy} asks for {asked}"

    def explain(self, nodes: Sequence[NodeResources]) -> str:
        """What is asked, and what of it each node has and has free."""
        lines = [str(self)]
        for node in nodes:
            there = ", ".join(
                f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}"
                for name in self.bundle
            )
            processes = f"{self._capacity(node.total)} processes, {self._capacity(node.free)} now"
            lines.append(f"  node {node.ip} holds {processes}: {there} free")
        return "\n".join(lines)

    def _capacity(self, resources: Mapping[str, float]) -> int:
        """How many bundles these resources hold."""
        return min(
            math.floor(resources.get(name, 0) / need + 1e-9) for name, need in self.bundle.items()
        )


def _shown(bundle: Mapping[str, float]) -> str:
    return f"{{{', '.join(f'{name}: {amount:g}' for name, amount in bundle.items())}}}"


@dataclass(frozen=True)
class Bundle:
    """What one rank was given: bundle `index` of a placement group, on a node."""

    group: PlacementGroup
    index: int
    node_id: str
    node_ip: str


class RayResourcePool(ResourcePool):
    """Processes per node, each with CPUs and, where the cluster has them, accelerators.

    Reserved on first use; given back by `close`, or when neither the pool nor a group on it is held
    any more and what runs in it has ended. Ranks, and from then on `store`, go by the addresses of
    their nodes. Several groups may share the pool: each worker takes 1/max_colocate_count of its
    bundle.

    Args:
        process_on_nodes: processes per node; `[2, 4]` makes placement groups of 2 and 4 bundles.
        use_gpu: ask for accelerators. On a cluster that has none at all, CPUs alone are taken.
        name_prefix: of the placement groups' names, for `ray list placement-groups`.
        max_colocate_count: how many groups may share the pool.
        detached: the reservation outlives the driver. Whoever ends the last group in it from
            another driver gives it back.
        accelerator_type: such as "H100": only nodes with that type.
        cpus_per_process, gpus_per_process: what each bundle asks for.
        resources_per_process: custom resources of each bundle, such as `{"fast_disk": 1}`. What
            `RayClassWithInitArgs.set_additional_resource` asks for must be among them.
        placement_timeout_s: how long to wait for resources that others hold now.
        waits_for_nodes: wait as long for nodes that have yet to join, where those there could not
            hold the pool, instead of refusing it at once.
    """

    def __init__(
        self,
        process_on_nodes: Sequence[int] | None = None,
        use_gpu: bool = True,
        name_prefix: str | None = None,
        max_colocate_count: int = 10,
        detached: bool = False,
        accelerator_type: str | None = None,
        *,
        cpus_per_process: float = 1,
        gpus_per_process: float = 1,
        resources_per_process: Mapping[str, float] | None = None,
        placement_timeout_s: float = 60,
        waits_for_nodes: bool = False,
    ) -> None:
        super().__init__(process_on_nodes, max_colocate_count)
        check_seconds("placement_timeout_s", placement_timeout_s, optional=False)
        custom: dict[str, Any] = dict(resources_per_process or {})
        amounts = [cpus_per_process, gpus_per_process, *custom.values()]
        numbers = all(isinstance(amount, int | float) and amount > 0 for amount in amounts)
        if not numbers or custom.keys() & {kind.resource for kind in DEVICE_KINDS}:
            raise ValueError(
                "cpus_per_process, gpus_per_process and what resources_per_process has of custom "
                f"resources must be numbers, more than 0; got {cpus_per_process!r}, "
                f"{gpus_per_process!r} and {custom}"
            )
        self.use_gpu = use_gpu
        self.name_prefix = name_prefix or uuid.uuid4().hex[:8]
        self.detached = detached
        self.accelerator_type = accelerator_type
        self.cpus_per_process = cpus_per_process
        self.gpus_per_process = gpus_per_process
        self.resources_per_process = custom
        self.placement_timeout_s = placement_timeout_s
        self.waits_for_nodes = waits_for_nodes
        self.pgs: list[PlacementGroup] | None = None
        self.ranks: list[tuple[PlacementGroup, int]] = []  # the bundle of each, once reserved

    def settings(self) -> dict[str, Any]:
        """What a process gets, as keyword arguments for another pool."""
        names = inspect.signature(RayResourcePool).parameters.keys()
        return {n: getattr(self, n) for n in names - {"process_on_nodes", "name_prefix"}}

    def device(self, device_name: str | None = None) -> DeviceKind:
        """The kind of device each process gets: `device_name`, else what the cluster has."""
        if not self.use_gpu:
            return CPU
        if device_name is not None:
            return device_kind(device_name)
        check_started()
        total = ray.cluster_resources()
        return next(kind for kind in DEVICE_KINDS if total.get(kind.resource, 0) or kind is CPU)

    def request(self, kind: DeviceKind, strategy: str = "STRICT_PACK") -> PoolRequest:
        """What reserving the pool asks of the cluster."""
        bundle: dict[str, float] = {"CPU": self.cpus_per_process}
        if kind is not CPU:
            bundle[kind.resource] = self.gpus_per_process
        if self.accelerator_type is not None:
            bundle[f"accelerator_type:{self.accelerator_type}"] = 1e-4
        bundle.update(self.resources_per_process)
        return PoolRequest(tuple(self.store), bundle, strategy)

    def get_placement_groups(
        self, strategy: str = "STRICT_PACK", name: str | None = None, device_name: str = "cuda"
    ) -> list[PlacementGroup]:
        """One placement group per node of `process_on_nodes`, reserved on the first call; always
        in the numeric order of their nodes' addresses.

        `device_name` says which accelerator, on a cluster that has any.

        Raises:
            ResourceError: the cluster cannot hold the pool, or did not free it in time; or there is
                none, as before `ray.init()`.
        """
        found = self.device()
        return self._reserve(strategy, name, found if found is CPU else device_kind(device_name))

    def bundles(
        self, strategy: str = "STRICT_PACK", device_name: str | None = None
    ) -> tuple[Bundle, ...]:
        """Each rank's bundle, reserved now if it is not yet.

        Raises:
            ResourceError: the cluster cannot hold the pool, or did not free it in time.
        """
        kind = self.device(device_name)
        groups = self._reserve(strategy, None, kind)
        there = reservations()
        if any(g in there and there[g].state == "RESCHEDULING" for g in groups):
            # Ray replaces what they have lost with a node; ranks keep their bundles.
            late = "the pool's reservation lost a node, and no other could take its place"
            self._await(groups, self.request(kind, strategy), late)
            there = reservations()
        if not all(g in there and there[g].state == "CREATED" for g in groups):
            raise ResourceError(
                "the pool's reservation is gone: Ray was started anew, a node was lost, or it "
                "was removed. close() the pool to reserve it again"
            )
        return tuple(Bundle(group, i, *there[group].nodes[i]) for group, i in self.ranks)

    def _reserve(self, strategy: str, name: str | None, kind: DeviceKind) -> list[PlacementGroup]:
        check_started()
        if self.pgs is not None:
            return self.pgs
        if not self.store:
            raise ValueError("process_on_nodes must name the processes of at least one node")
        request = self.request(kind, strategy)
        if not self.waits_for_nodes:
            request.check("this pool")
        named = f"{name or self.name_prefix}{_MARK}{uuid.uuid4().hex[:6]}"
        lifetime: Any = "detached" if self.detached else None
        made: dict[int, PlacementGroup] = {}
        # Ray places one after another: small ones would leave no room for large ones.
        largest_first = sorted(enumerate(request.counts), key=lambda item: -item[1])
        try:
            for node, count in largest_first:
                asked = [dict(request.bundle)] * count
                made[node] = placement_group(asked, strategy, f"{named}_{node}", lifetime)
            self._await([*made.values()], request, "the pool was not free")
        except BaseException:
            remove([*made.values()])
            raise
        if _started.acquire(blocking=False):
            threading.Thread(target=_give_back_dropped, daemon=True, name="give-back").start()
        for group in () if self.detached else made.values():
            weakref.finalize(group, _dropped.put, group.id).atexit = False
        groups = sort_placement_group_by_node_ip([made[node] for node in sorted(made)])
        there = reservations()
        self._store, self.ranks = [group.bundle_count for group in groups], []
        for group in groups:
            order = [_node_order(*node) for node in there[group].nodes]
            self.ranks += [(group, i) for i in sorted(range(len(order)), key=order.__getitem__)]
        self.pgs = groups
        return groups

    def _await(self, groups: Sequence[PlacementGroup], request: PoolRequest, late: str) -> None:
        def missing() -> list[PlacementGroup]:
            there = reservations()
            for group, one in there.items():
                if one.creator == "ended" and _MARK in one.name:
                    remove_placement_group(group)  # Ray would keep it until the job ends
            return [g for g in groups if g not in there or there[g].state != "CREATED"]

        def standing() -> str:
            there = f"{len(groups) - len(missing())} of {len(groups)} placement groups"
            return f"waiting for resources: {there}; {request}"

        with Wait(standing):
            left = _left(missing, self.placement_timeout_s)
        if left:
            held = [one for group, one in reservations().items() if group not in groups][:_SHOWN]
            raise ResourceError(
                f"{late} within placement_timeout_s={self.placement_timeout_s:g}: "
                f"{request.explain(cluster_nodes())}\n"
                "Close what holds the resources, or raise placement_timeout_s. `ray list actors` "
                "shows who runs outside of placement groups; of these there are"
                + "".join(f"\n  {one.name}: {one.bundles} ({one.state})" for one in held)
            )

    def close(self) -> None:
        """Give the reservation back and return when it is, or after 10 s with a warning in the log;
        workers in it end. The pool can be used again afterwards.
        """
        groups, self.pgs, self.ranks = self.pgs or [], None, []
        if ray.is_initialized():
            remove(groups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SubRayResourcePool(RayResourcePool):
    """Some bundles of another pool, in order; closing it leaves the other pool as it is."""

    def __init__(
        self,
        placement_groups: Sequence[PlacementGroup],
        start_bundle_index: int,
        subgroup_world_size: int,
        **kwargs: Any,
    ) -> None:
        """`start_bundle_index` counts the bundles of all `placement_groups` as one sequence.

        Raises:
            ValueError: there are not so many.
        """
        super().__init__(**kwargs)
        self.pgs = list(placement_groups)
        self.start_bundle_index = start_bundle_index
        self.subgroup_world_size = subgroup_world_size
        every = [(group, i) for group in self.pgs for i in range(group.bundle_count)]
        some = every[start_bundle_index:][:subgroup_world_size]
        if start_bundle_index < 0 or len(some) < subgroup_world_size:
            raise ValueError(
                f"there are {len(every)} bundles; asked for are {subgroup_world_size} from number "
                f"{start_bundle_index} on"
            )
        self.keep(some)

    def keep(self, ranks: Sequence[tuple[PlacementGroup, int]]) -> Self:
        """Have these bundles, in this order."""
        self.ranks = [*ranks]
        self._store = [*Counter(group.id for group, _ in ranks).values()]
        return self

    def close(self) -> None:
        """Nothing: the reservation is the other pool's."""


def check_started() -> None:
    """Raise ResourceError in a process without a cluster, where Ray may start one unasked."""
    if not ray.is_initialized():
        raise ResourceError(
            "ray.init() must come before a pool is reserved or a group made; Ray has not been "
            "started in this process, or was shut down"
        )


def cluster_nodes() -> list[NodeResources]:
    """What each living node has, and what of it is free, in the order of their addresses."""
    free = available_resources_per_node()
    found = [
        NodeResources(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: _node_order("", node.ip))


def sort_placement_group_by_node_ip(pgs: list[PlacementGroup]) -> list[PlacementGroup]:
    """Placement groups by the lowest address of their nodes, as a number (10.0.0.9 comes before
    10.0.0.10), and nodes of one address by their ids; those on one node stay in their order.
    """
    there = reservations()
    return sorted(pgs, key=lambda group: min(_node_order(*node) for node in there[group].nodes))


def _node_order(node_id: str, address: str) -> tuple[int, int, str]:
    try:
        number = ipaddress.ip_address(address)
    except ValueError:  # Ray takes a name, too
        return 9, 0, address + node_id
    return number.version, int(number), node_id


@dataclass(frozen=True)
class Reservation:
    """A placement group as the cluster knows it: the node of each bundle, as id and address;
    `bundles`, such as "2 × {CPU: 1}"; `creator`: "detached" if it outlives it, "ended" if that was
    an actor which has.
    """

    name: str
    state: str
    nodes: tuple[tuple[str, str], ...]
    bundles: str
    creator: str


def reservations() -> dict[PlacementGroup, Reservation]:
    """All placement groups that are not removed, by name, whoever made them."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    found = {}
    for raw in _tables().get_placement_group_table():
        group = _pb.PlacementGroupTableData.FromString(raw)
        state = _pb.PlacementGroupTableData.PlacementGroupState.Name(group.state)
        if state != "REMOVED":
            by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
            creator = "ended" if by_actor and group.creator_actor_dead else "alive"
            bundles = sorted(group.bundles, key=lambda bundle: bundle.bundle_id.bundle_index)
            nodes = [bundle.node_id.hex() for bundle in bundles]
            found[PlacementGroup(ray.PlacementGroupID(group.placement_group_id))] = Reservation(
                group.name,
                state,
                tuple((node, addresses.get(node, "")) for node in nodes),
                f"{len(bundles)} × {_shown(bundles[0].unit_resources)}",
                "detached" if group.is_detached else creator,
            )
    return dict(sorted(found.items(), key=lambda item: item[1].name))


def in_use() -> set[PlacementGroup]:
    """The placement groups that actors run in."""
    keys = {actor.placement_group_id for actor in living_actors()} - {b""}
    return {PlacementGroup(ray.PlacementGroupID(key)) for key in keys}


def crowded(bundles: Sequence[Bundle]) -> list[bool]:
    """For each bundle, whether actors ask for more than it has, those among them that it has no
    room for yet.
    """
    asked: Counter[str] = Counter()
    for actor in living_actors():
        asked.update(actor.required_resources)
    return [
        any(
            asked[f"{name}_group_{bundle.index}_{bundle.group.id.hex()}"] > amount + 1e-6
            for name, amount in bundle.group.bundle_specs[bundle.index].items()
        )
        for bundle in bundles
    ]


_dropped: SimpleQueue[ray.PlacementGroupID] = SimpleQueue()
_started = threading.Lock()


def _give_back_dropped() -> None:
    """Remove placement groups that were dropped, each once no actor runs in it. A thread does so:
    garbage may be collected at any moment, with any lock held.
    """
    while True:
        group = PlacementGroup(_dropped.get())
        time.sleep(_LOOK_S)
        with contextlib.suppress(Exception):  # Ray may be ending
            if not ray.is_initialized():
                continue
            if group not in in_use():
                remove_placement_group(group)
                continue
        _dropped.put(group.id)


def remove(groups: Sequence[PlacementGroup]) -> None:
    """Remove placement groups and return when they are gone; workers in them end. What the cluster
    still has after 10 s is logged.
    """
    at_once(remove_placement_group, groups)

    def there() -> list[str]:
        return [one.name for group, one in reservations().items() if group in groups]

    if left := _left(there, _REMOVAL_S):
        _logger.warning("placement groups are still there %g s after: %s", _REMOVAL_S, left)


def _left(look: Callable[[], list[T]], timeout_s: float) -> list[T]:
    """What `look` still finds when the time is up."""
    deadline, pause = time.monotonic() + timeout_s, _POLL_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 1.5, _MOST_POLL_S)
    return found


def give_back(ended: Collection[str]) -> None:
    """Remove the detached placement groups in which these actors ran and no other one does. Others
    are left to the driver that made them: they go with it.

    Args:
        ended: ids of actors that were told to end. Waits for that: of several who end the last
            actors of a placement group, each then sees the others' end or is seen.
    """
    ended = frozenset(ended)
    held = {actor.placement_group_id for key, actor in _actors().items() if key in ended}
    groups = [
        group
        for group, one in reservations().items()
        if group.id.binary() in held and one.creator == "detached"
    ]
    if groups:
        await_death(ended, _DEATH_S)
        used = in_use()
        remove([group for group in groups if group not in used])


def await_death(ended: Collection[str], timeout_s: float) -> list[str]:
    """Wait for the end of actors; the ids of those that are not dead in time."""

    def living() -> list[str]:
        found = {actor.actor_id.hex() for actor in living_actors()}
        return [key for key in ended if key in found]

    return _left(living, timeout_s)


def _actors(state: str | None = None) -> dict[str, Any]:
    """All actors, or those in a state, by their ids, in one call."""
    found = map(_pb.ActorTableData.FromString, _tables().get_actor_table(None, state))
    return {actor.actor_id.hex(): actor for actor in found}


def dead(actor_ids: Iterable[str]) -> set[str]:
    """Those of actors, which have all started, that have ended."""
    return set(actor_ids) - _actors("ALIVE").keys()


def actor_info(actor_id: str) -> Any:
    """What the cluster's table knows of one actor; nothing of one that ended long ago."""
    found = _tables().get_actor_info(ray.ActorID.from_hex(actor_id))
    return _pb.ActorTableData.FromString(found or b"")


def living_actors() -> list[Any]:
    """What the cluster's table knows of each actor that has not ended."""
    return [actor for actor in _actors().values() if actor.state != _pb.ActorTableData.DEAD]


def at_once(function: Callable[..., Any], values: Iterable[Any]) -> list[Any]:
    """What a function that asks the cluster returns for each value. Threads call it: one by one,
    each call would wait for the answer to the one before. At the interpreter's exit none starts.
    """
    values = list(values)
    if len(values) < 2 or not threading.main_thread().is_alive():
        return [function(value) for value in values]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(function, values))


def _tables() -> Any:
    """Reads the cluster's tables whole: Ray's own readers leave out which placement group."""
    opened: Any = state
    if hasattr(opened, "_connect_and_get_accessor"):
        return opened._connect_and_get_accessor()
    opened._check_connected()  # as ray 2.41 has it
    return opened.global_state_accessor
