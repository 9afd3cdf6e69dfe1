"""Pools reserved as placement groups: where each rank goes, and whether the cluster can hold it.

Splitting and merging pools is left to `pools`, removing placement groups to `reservations`, what
runs in them to `worker_group`.
"""

from __future__ import annotations

import ipaddress
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
)

from single_controller import checks
from single_controller.base.resource_pool import ResourcePool
from single_controller.device import CPU, DEVICE_KINDS, DeviceKind, device_kind
from single_controller.errors import ResourceError
from single_controller.ray import patience
from single_controller.ray.feasibility import NodeResources, PoolRequest
from single_controller.ray.holders import holders
from single_controller.ray.reservations import (
    give_back_when_dropped,
    new_name,
    reclaim,
    remove,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Bundle",
    "RayResourcePool",
    "SubRayResourcePool",
    "check_started",
    "cluster_nodes",
    "sort_placement_group_by_node_ip",
]

_LOOK_S = 1.0
_DEVICES = {kind.resource for kind in DEVICE_KINDS}


@dataclass(frozen=True)
class Bundle:
    """What one rank was given: bundle `index` of a placement group, on a node."""

    group: PlacementGroup
    index: int
    node_id: str
    node_ip: str


def sort_placement_group_by_node_ip(pgs: list[PlacementGroup]) -> list[PlacementGroup]:
    """Placement groups by the address of their first bundle's node, numerically (10.0.0.9 comes
    before 10.0.0.10); those on one node in the order of their ids.
    """
    addresses = _node_addresses()

    def key(group: PlacementGroup) -> tuple[Any, ...]:
        first = placement_group_table(group)["bundles_to_node_id"][0]
        return *_address_key(addresses[first]), group.id.hex()

    return sorted(pgs, key=key)


def _address_key(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address)
    return parsed.version, int(parsed)


def _node_addresses() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}


class RayResourcePool(ResourcePool):
    """Processes per node, each with CPUs and, where the cluster has them, accelerators.

    Reserved on first use, once; given back by `close`, or when neither the pool nor a group on it
    is held any more and what runs in it has ended. Several groups may share the pool: each worker
    takes 1/max_colocate_count of its bundle.

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
    ) -> None:
        super().__init__(process_on_nodes, max_colocate_count)
        checks.amount("cpus_per_process", cpus_per_process)
        checks.amount("gpus_per_process", gpus_per_process)
        checks.seconds("placement_timeout_s", placement_timeout_s, optional=False)
        custom = resources_per_process or {}
        checks.instance(Mapping, "resources_per_process", custom, "a dict of amounts by name")
        if _DEVICES & custom.keys():
            raise ValueError(
                "resources_per_process must be amounts of custom resources (CPUs and devices have "
                f"parameters of their own); got {custom}"
            )
        for name, amount in custom.items():
            checks.amount(f"resources_per_process[{name!r}]", amount)
        self.use_gpu = use_gpu
        self.name_prefix = name_prefix or uuid.uuid4().hex[:8]
        self.detached = detached
        self.accelerator_type = accelerator_type
        self.cpus_per_process = cpus_per_process
        self.gpus_per_process = gpus_per_process
        self.resources_per_process = dict(custom)
        self.placement_timeout_s = placement_timeout_s
        self.pgs: list[PlacementGroup] | None = None

    def settings(self) -> dict[str, Any]:
        """What a process gets, as keyword arguments for another pool."""
        return {
            "use_gpu": self.use_gpu,
            "max_colocate_count": self.max_colocate_count,
            "detached": self.detached,
            "accelerator_type": self.accelerator_type,
            "cpus_per_process": self.cpus_per_process,
            "gpus_per_process": self.gpus_per_process,
            "resources_per_process": self.resources_per_process,
            "placement_timeout_s": self.placement_timeout_s,
        }

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
        if kind is not CPU and kind.resource not in groups[0].bundle_specs[0]:
            raise ResourceError(
                f"the pool was reserved without {kind.resource}: its bundles are "
                f"{groups[0].bundle_specs[0]}, and device_name={device_name!r} was asked for"
            )
        self._wait_for_lost_nodes(groups)
        return _bundles_of(groups)

    def _wait_for_lost_nodes(self, groups: Sequence[PlacementGroup]) -> None:
        """Ray looks for another node where one of a reservation was lost."""
        deadline = time.monotonic() + self.placement_timeout_s
        for group in groups:
            lost = placement_group_table(group).get("state") == "RESCHEDULING"
            if lost and not group.wait(max(0.01, deadline - time.monotonic())):
                raise ResourceError(
                    "the pool's reservation lost a node, and no other could take its place within "
                    f"placement_timeout_s={self.placement_timeout_s:g}: "
                    f"{self.request(self.device()).explain(cluster_nodes())}"
                )

    def _reserve(self, strategy: str, name: str | None, kind: DeviceKind) -> list[PlacementGroup]:
        check_started()
        if self.pgs is not None:
            return self.pgs
        if not self.store:
            raise ValueError("process_on_nodes must name the processes of at least one node")
        request = self.request(kind, strategy)
        if not request.fits(nodes := cluster_nodes()):
            raise ResourceError("the cluster cannot hold this pool: " + request.explain(nodes))
        prefix = name or f"{self.name_prefix}single_controller"
        reclaim()
        groups: list[PlacementGroup] = []
        deadline = time.monotonic() + self.placement_timeout_s
        try:
            for node, count in enumerate(request.counts):
                groups.append(
                    placement_group(
                        [dict(request.bundle)] * count,
                        strategy=strategy,
                        name=new_name(prefix, node),
                        lifetime="detached" if self.detached else None,
                    )
                )
            for number, group in enumerate(groups):
                what = f"waiting for resources: {number} of {len(groups)} placement groups"
                if not group.wait(min(_LOOK_S, self.placement_timeout_s)):
                    reclaim()  # of those who have ended meanwhile
                if not patience.placed(group, max(0.01, deadline - time.monotonic()), what):
                    raise ResourceError(
                        f"the pool was not free within placement_timeout_s="
                        f"{self.placement_timeout_s:g}: {request.explain(cluster_nodes())}\n"
                        f"{holders(but={g.id.hex() for g in groups})}".rstrip()
                    )
        except BaseException:
            remove(groups)
            raise
        self.pgs = sort_placement_group_by_node_ip(groups)
        if not self.detached:
            give_back_when_dropped(self.pgs)
        return self.pgs

    def close(self) -> None:
        """Give the reservation back and return when it is, or after 10 s with a warning in the log;
        workers in it end. The pool can be used again afterwards.
        """
        groups, self.pgs = self.pgs or [], None
        if ray.is_initialized():
            remove(groups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_started() -> None:
    """Raise ResourceError in a process without a cluster, where Ray may start one unasked."""
    if not ray.is_initialized():
        raise ResourceError(
            "ray.init() must come before a pool is reserved or a group made; Ray has not been "
            "started in this process, or was shut down"
        )


def cluster_nodes() -> list[NodeResources]:
    """What each living node has, and what of it is free."""
    free = available_resources_per_node()
    return [
        NodeResources(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _bundles_of(groups: Sequence[PlacementGroup]) -> tuple[Bundle, ...]:
    addresses = _node_addresses()
    bundles = []
    for group in groups:
        table = placement_group_table(group)
        nodes = table.get("bundles_to_node_id", {})
        if table.get("state") != "CREATED" or not set(nodes.values()) <= set(addresses):
            raise ResourceError(
                "the pool's reservation is gone: Ray was started anew, a node was lost, or it was "
                "removed. close() the pool to reserve it again"
            )
        for index in range(group.bundle_count):
            bundles.append(Bundle(group, index, nodes[index], addresses[nodes[index]]))
    return tuple(bundles)


class SubRayResourcePool(RayResourcePool):
    """Some bundles of another pool, in order; closing it leaves the other pool as it is."""

    def __init__(
        self,
        placement_groups: Sequence[PlacementGroup],
        start_bundle_index: int,
        subgroup_world_size: int,
        **kwargs: Any,
    ) -> None:
        """`start_bundle_index` counts the bundles of all `placement_groups` as one sequence."""
        super().__init__(**kwargs)
        self.pgs = list(placement_groups)
        held = sum(group.bundle_count for group in placement_groups)
        if not (start_bundle_index >= 0 and 1 <= subgroup_world_size <= held - start_bundle_index):
            raise ValueError(
                f"start_bundle_index {start_bundle_index} and subgroup_world_size "
                f"{subgroup_world_size} must lie within the {held} bundles of the placement groups"
            )
        self.start_bundle_index = start_bundle_index
        self.subgroup_world_size = subgroup_world_size

    @property
    def _slice(self) -> slice:
        return slice(self.start_bundle_index, self.start_bundle_index + self.subgroup_world_size)

    @property
    def store(self) -> list[int]:
        """Processes per placement group of the slice (a copy)."""
        counts: list[int] = []
        first = 0
        for group in self.pgs or ():
            within = range(first, first + group.bundle_count)[
                max(0, self._slice.start - first) : max(0, self._slice.stop - first)
            ]
            counts += [len(within)] if within else []
            first += group.bundle_count
        return counts

    def bundles(
        self, strategy: str = "STRICT_PACK", device_name: str | None = None
    ) -> tuple[Bundle, ...]:
        return super().bundles(strategy, device_name)[self._slice]

    def close(self) -> None:
        """Nothing: the reservation is the other pool's."""
