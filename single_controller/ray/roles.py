"""`colocate`: roles in one process per rank, in one call, with a group per role as attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from single_controller.base.colocated import Colocated, colocated
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
    bin_pack: bool = True,
    name_prefix: str | None = None,
    detached: bool = False,
    device_name: str | None = None,
    worker_env: Mapping[str, str] | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    master_port_range: Sequence[int] | None = None,
    startup_timeout_s: float = 600,
    call_timeout_s: float | None = None,
    on_failure: str = "raise",
    max_restarts: int = 3,
    **roles: ClassWithInitArgs | type[Worker],
) -> Colocated:
    """Start one process per process of the pool, each with every role in it.

    Args:
        pool: where the processes go.
        bin_pack … max_restarts: as for `RayWorkerGroup`.
        roles: by name, a worker class, or `RayClassWithInitArgs` where it takes arguments.

    Returns:
        An object with a group per role: `colocate(pool, actor=Actor).actor.update(batch)`.

    Raises:
        ValueError: a role has the name of an option, or of an attribute of what is returned.
        What `RayWorkerGroup` raises.
    """
    options = {
        "bin_pack": bin_pack,
        "name_prefix": name_prefix,
        "detached": detached,
        "device_name": device_name,
        "worker_env": worker_env,
        "master_addr": master_addr,
        "master_port": master_port,
        "master_port_range": master_port_range,
        "startup_timeout_s": startup_timeout_s,
        "call_timeout_s": call_timeout_s,
        "on_failure": on_failure,
        "max_restarts": max_restarts,
    }
    return colocated(
        RayWorkerGroup, create_colocated_worker_cls, RayClassWithInitArgs, pool, roles, options
    )
