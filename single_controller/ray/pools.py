"""Pools made from pools: split, merged, named for roles; and values for all of them. Reserving is
left to `placement`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from single_controller.errors import ResourceError
from single_controller.ray.placement import RayResourcePool, SubRayResourcePool, check_started

__all__ = [
    "ResourcePoolManager",
    "extract_pg_from_exist",
    "merge_resource_pool",
    "parallel_put",
    "split_resource_pool",
    "split_sizes",
]


def split_sizes(total: int, split_size: int | list[int]) -> list[int]:
    """The processes of each part of a pool of `total`."""
    if isinstance(split_size, int):
        sizes = [split_size] * (total // max(split_size, 1))
    else:
        sizes = list(split_size)
    if not all(isinstance(size, int) and size >= 1 for size in sizes) or sum(sizes) != total:
        raise ValueError(
            "split_size must be whole numbers, at least 1, that add up to the pool's "
            f"{total} processes, or one for all parts; got {split_size!r}"
        )
    return sizes


def split_resource_pool(
    resource_pool: RayResourcePool, split_size: int | list[int]
) -> list[SubRayResourcePool]:
    """Cut a pool into consecutive ones, which may be cut again.

    Args:
        split_size: processes of each part, or one size for all of them.

    Raises:
        ResourceError: the pool cannot be reserved. ValueError: the sizes do not add up to it.
    """
    sizes = split_sizes(resource_pool.world_size, split_size)
    groups, settings = _reserved(resource_pool), resource_pool.settings()
    first, ranks = getattr(resource_pool, "start_bundle_index", 0), resource_pool.ranks
    return [
        SubRayResourcePool(groups, first + at, size, **settings).keep(ranks[at : at + size])
        for at, size in zip(accumulate(sizes, initial=0), sizes, strict=False)
    ]


def merge_resource_pool(rp1: RayResourcePool, rp2: RayResourcePool) -> RayResourcePool:
    """One pool over the reservations of both, which stay theirs to close: first the ranks of `rp1`,
    then those of `rp2`. It may be merged and split again.

    Raises:
        ValueError: they differ in what a process gets, or have a bundle in common.
    """
    first, second = rp1.settings(), rp2.settings()
    different = sorted(key for key in first if first[key] != second[key])
    if different:
        raise ValueError(f"pools to be merged must agree; these differ in {', '.join(different)}")
    groups = [*dict.fromkeys([*_reserved(rp1), *_reserved(rp2)])]
    ranks = [*rp1.ranks, *rp2.ranks]
    if len(set(ranks)) < len(ranks):
        raise ValueError("pools to be merged must not have bundles in common; these do")
    return SubRayResourcePool(groups, 0, len(ranks), **first).keep(ranks)


def extract_pg_from_exist(
    resource_pools: dict[str, RayResourcePool],
    src_role_names: list[str],
    resource_pool: RayResourcePool,
) -> list[PlacementGroup]:
    """Placement groups of other roles' pools that `resource_pool` can use instead of new ones.

    Each of its nodes takes the smallest unused group that is large enough.

    Raises:
        ResourceError: no such group is left for a node.
    """
    taken = [pool for name, pool in resource_pools.items() if name in src_role_names]
    free = [group for pool in taken for group in _reserved(pool)]
    chosen = []
    for count in resource_pool.store:
        large = [group for group in free if group.bundle_count >= count]
        if not large:
            raise ResourceError(
                f"no placement group of {src_role_names} with {count} bundles is left; unused ones "
                f"have {[group.bundle_count for group in free]}"
            )
        chosen.append(min(large, key=lambda group: group.bundle_count))
        free.remove(chosen[-1])
    return chosen


def _reserved(pool: RayResourcePool) -> list[PlacementGroup]:
    """The pool's placement groups, on whatever accelerator the cluster has."""
    return pool.get_placement_groups(device_name=pool.device().name)


@dataclass
class ResourcePoolManager:
    """Named pools, and which role runs on which.

    Args:
        resource_pool_spec: processes per node of each pool, by name.
        mapping: the pool's name for each role.
    """

    resource_pool_spec: dict[str, list[int]]
    mapping: Mapping[Any, str]
    max_colocate_count: int = 3
    resource_pool_dict: dict[str, RayResourcePool] = field(default_factory=dict)

    def create_resource_pool(self) -> None:
        """Make all pools, and check that the cluster can hold them together.

        Raises:
            ResourceError: it cannot.
        """
        self._check()
        for name, counts in self.resource_pool_spec.items():
            self.resource_pool_dict[name] = RayResourcePool(
                counts, name_prefix=name, max_colocate_count=self.max_colocate_count
            )

    def _check(self) -> None:
        all_nodes = [count for counts in self.resource_pool_spec.values() for count in counts]
        together = RayResourcePool(all_nodes)
        together.request(together.device()).check("these pools together")

    def get_resource_pool(self, role: Any) -> RayResourcePool:
        """The pool that a role runs on.

        Raises:
            ValueError: the role is not mapped, or its pool not created.
        """
        name = self.mapping.get(role)
        if name not in self.resource_pool_dict:
            raise ValueError(
                f"role {role!r} is mapped to pool {name!r}, and create_resource_pool has made "
                f"{sorted(self.resource_pool_dict)}"
            )
        return self.resource_pool_dict[name]

    def get_n_gpus(self) -> int:
        """Processes, and so devices, of all pools together."""
        return sum(sum(counts) for counts in self.resource_pool_spec.values())


def parallel_put(data_list: Sequence[Any], max_workers: int | None = None) -> list[Any]:
    """`ray.put` each value, in threads; the references in the same order. Arguments of calls need
    none of this.

    Raises:
        ResourceError: Ray has not been started.
    """
    check_started()
    with ThreadPoolExecutor(max_workers) as threads:
        return list(threads.map(ray.put, data_list))
