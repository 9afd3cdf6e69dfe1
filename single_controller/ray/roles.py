"""`colocate`: roles in one process per rank, in one call, with a group per role as attribute."""

from __future__ import annotations

from single_controller.base.colocated import Colocated, role_specs
from single_controller.base.roles import ClassWithInitArgs
from single_controller.base.worker import Worker
from single_controller.ray.actor_spec import RayClassWithInitArgs
from single_controller.ray.colocate import create_colocated_worker_cls
from single_controller.ray.placement import RayResourcePool
from single_controller.ray.worker_group import RayWorkerGroup

__all__ = ["Colocated", "colocate"]


def colocate(pool: RayResourcePool, **roles: ClassWithInitArgs | type[Worker]) -> Colocated:
    """Start one process per process of the pool, each with every role in it.

    Args:
        roles: by name, a worker class, or `RayClassWithInitArgs` where it takes arguments.

    Returns:
        An object with a group per role: `colocate(pool, actor=Actor).actor.update(batch)`.

    Raises:
        What `RayWorkerGroup` raises.
    """
    specs = role_specs(roles, RayClassWithInitArgs)
    return Colocated(RayWorkerGroup(pool, create_colocated_worker_cls(specs)), specs)
