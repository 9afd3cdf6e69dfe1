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


def colocate(
    pool: RayResourcePool,
    *,
    startup_timeout_s: float = 600,
    call_timeout_s: float | None = None,
    on_failure: str = "raise",
    max_restarts: int = 3,
    **roles: ClassWithInitArgs | type[Worker],
) -> Colocated:
    """Start one process per process of the pool, each with every role in it.

    Args:
        startup_timeout_s, call_timeout_s, on_failure, max_restarts: as for `RayWorkerGroup`.
        roles: by name, a worker class, or `RayClassWithInitArgs` where it takes arguments.

    Returns:
        An object with a group per role: `colocate(pool, actor=Actor).actor.update(batch)`.

    Raises:
        What `RayWorkerGroup` raises.
    """
    specs = role_specs(roles, RayClassWithInitArgs)
    hosts = RayWorkerGroup(
        pool,
        create_colocated_worker_cls(specs),
        startup_timeout_s=startup_timeout_s,
        call_timeout_s=call_timeout_s,
        on_failure=on_failure,
        max_restarts=max_restarts,
    )
    return Colocated(hosts, specs)
