"""What a program written for Ray needs in order to run, without an edit, on inline groups: Ray's
references among arguments and results, and pools that reserve nothing.

What inline groups are is said by `single_controller.inline`, when they are used by `backend`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import ray

from single_controller import checks, inline
from single_controller.base.colocated import Colocated, colocated
from single_controller.base.method import CallOptions, Pending
from single_controller.base.plan import Call
from single_controller.base.recorder import CallRecord
from single_controller.base.registered import Transport
from single_controller.base.resource_pool import ResourcePool
from single_controller.base.roles import W
from single_controller.inline.hosts import InlineHosts
from single_controller.inline.worker_group import InlineWorkerGroup
from single_controller.ray.actor_spec import RayClassWithInitArgs
from single_controller.ray.colocate import create_colocated_worker_cls
from single_controller.ray.placement import RayResourcePool
from single_controller.ray.pools import ResourcePoolManager, split_sizes

__all__ = [
    "SwitchedPoolManager",
    "SwitchedWorkerGroup",
    "colocate_switched",
    "merge_unreserved",
    "split_unreserved",
]


class SwitchedWorkerGroup(InlineWorkerGroup[W]):
    """An inline group that takes Ray references, and gives them where Ray is there to hold them.

    A call that does not block and has failed raises at once; what an `async def` method has not
    returned yet is an `InlineReference`.
    """

    def _submit(
        self,
        hosts: InlineHosts,
        method: str,
        calls: Sequence[Call | None],
        answers: Sequence[int],
        options: CallOptions,
        *,
        record: CallRecord,
        materialize: bool = True,
        reads_only: bool = False,
        deferred: bool = False,
        awaited: bool = False,
        transport: Transport = "host",
    ) -> Pending:
        here = [call and Call(tuple(map(_here, call.args)), _named(call)) for call in calls]
        pending = super()._submit(
            hosts,
            method,
            here,
            answers,
            options,
            record=record,
            materialize=materialize,
            reads_only=reads_only,
            deferred=deferred,
            awaited=awaited,
            transport=transport,
        )
        return _WithRayReferences(pending) if ray.is_initialized() else pending


def _here(value: Any) -> Any:
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def _named(call: Call) -> dict[str, Any]:
    return {name: _here(value) for name, value in call.kwargs.items()}


class _WithRayReferences(Pending):
    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def run_here(self, record: CallRecord) -> None:
        self._pending.run_here(record)

    def wait(self, timeout_s: float | None) -> list[Any]:
        return self._pending.wait(timeout_s)

    async def arrive(self) -> bool:
        return await self._pending.arrive()

    def done(self) -> bool:
        return self._pending.done()

    def cancel(self) -> bool:
        return self._pending.cancel()

    def handles(self, batched: bool) -> list[Any]:
        made = self._pending.handles(batched)
        return made if batched else [ray.put(r.result()) if r.done() else r for r in made]


class SwitchedPoolManager(ResourcePoolManager):
    """Named pools that are not asked of a cluster."""

    def create_resource_pool(self) -> None:
        for name, counts in self.resource_pool_spec.items():
            self.resource_pool_dict[name] = RayResourcePool(
                counts, name_prefix=name, max_colocate_count=self.max_colocate_count
            )


def split_unreserved(
    resource_pool: ResourcePool, split_size: int | list[int]
) -> list[RayResourcePool]:
    """Pools of these sizes, each on one node.

    Raises:
        ValueError: the sizes do not add up to the pool.
    """
    checks.instance(ResourcePool, "resource_pool", resource_pool, "a ResourcePool")
    return [RayResourcePool([n]) for n in split_sizes(resource_pool.world_size, split_size)]


def merge_unreserved(rp1: ResourcePool, rp2: ResourcePool) -> RayResourcePool:
    """A pool of the nodes of both."""
    checks.instance(ResourcePool, "rp1", rp1, "a ResourcePool")
    checks.instance(ResourcePool, "rp2", rp2, "a ResourcePool")
    return RayResourcePool([*rp1.store, *rp2.store])


def colocate_switched(pool: ResourcePool | None = None, **given: Any) -> Colocated:
    """As `single_controller.ray.colocate`, in this process."""
    names = inspect.signature(inline.colocate).parameters
    options = {name: given.pop(name) for name in names if name in given}
    return colocated(
        SwitchedWorkerGroup, create_colocated_worker_cls, RayClassWithInitArgs, pool, given, options
    )
