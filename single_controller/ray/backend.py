"""What the names of this package stand for: Ray's groups, or, in a program that was started with
SINGLE_CONTROLLER_BACKEND=inline, groups in the driver's own process, which take Ray's references
and pools that reserve nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from single_controller import inline
from single_controller.base.method import Pending, Request
from single_controller.base.plan import Call, Handle, ResourcePool
from single_controller.base.roles import Colocate, W
from single_controller.inline.group import InlinePending, Ranks
from single_controller.ray import pools
from single_controller.ray.placement import RayResourcePool
from single_controller.ray.remote_batch import RayHandle
from single_controller.ray.shelf import Kept
from single_controller.ray.spec import create_colocated_worker_cls

__all__ = [
    "RayWorkerGroup",
    "ResourcePoolManager",
    "SwitchedWorkerGroup",
    "backend_name",
    "colocate",
    "merge_resource_pool",
    "pin",
    "split_resource_pool",
]


def backend_name() -> str:
    """The backend that this process was started for.

    Raises:
        ValueError: SINGLE_CONTROLLER_BACKEND is neither "ray", the default, nor "inline".
    """
    name = os.environ.get("SINGLE_CONTROLLER_BACKEND") or "ray"
    if name not in ("ray", "inline"):
        raise ValueError(f"SINGLE_CONTROLLER_BACKEND must be ray or inline; got {name!r}")
    return name


class _Pending(InlinePending):
    """Its references are Ray's where Ray is there to hold them, and the method has returned."""

    def handles(self, batched: bool) -> list[Any]:
        made = super().handles(batched)
        if batched or not ray.is_initialized():
            return made
        return [_known_to_ray(one) if one.done() else one for one in made]


def _known_to_ray(one: Any) -> Any:
    if isinstance(one, Handle):
        source = one.source
        return RayHandle(source, ray.put(Kept().keep_value(one.get(), source.title)))
    return ray.put(one.get())


class SwitchedWorkerGroup(inline.InlineWorkerGroup[W]):
    """An inline group that takes and gives Ray references. A call that does not block and has
    failed raises at once.
    """

    _pending = _Pending

    def _submit(self, hosts: Ranks, request: Request, calls: Sequence[Call | None]) -> Pending:
        here = [call and Call(tuple(map(_here, call.args)), _named(call)) for call in calls]
        return super()._submit(hosts, request, here)


def _here(value: Any) -> Any:
    stands = isinstance(value, ray.ObjectRef) and not isinstance(value, Handle)
    return ray.get(value) if stands else value


def _named(call: Call) -> dict[str, Any]:
    return {name: _here(value) for name, value in call.kwargs.items()}


class _PoolManager(pools.ResourcePoolManager):
    """Named pools that are not asked of a cluster."""

    def create_resource_pool(self) -> None:
        for name, counts in self.resource_pool_spec.items():
            self.resource_pool_dict[name] = RayResourcePool(
                counts, name_prefix=name, max_colocate_count=self.max_colocate_count
            )


def _split(pool: ResourcePool, split_size: int | list[int]) -> list[RayResourcePool]:
    return [RayResourcePool([n]) for n in pools.split_sizes(pool.world_size, split_size)]


def _merge(rp1: ResourcePool, rp2: ResourcePool) -> RayResourcePool:
    return RayResourcePool([*rp1.store, *rp2.store])


if TYPE_CHECKING or backend_name() == "ray":
    from single_controller.ray.pools import (
        ResourcePoolManager,
        merge_resource_pool,
        split_resource_pool,
    )
    from single_controller.ray.remote_batch import pin
    from single_controller.ray.worker_group import RayWorkerGroup, colocate
else:
    RayWorkerGroup, ResourcePoolManager = SwitchedWorkerGroup, _PoolManager
    colocate = Colocate(SwitchedWorkerGroup, create_colocated_worker_cls)
    pin = inline.pin
    merge_resource_pool, split_resource_pool = _merge, _split
