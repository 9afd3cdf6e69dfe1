"""Several roles in one inline group: `colocate` in one call, and veRL's ways to ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from single_controller.base.colocated import Colocated, colocated
from single_controller.base.resource_pool import ResourcePool
from single_controller.base.roles import (
    ClassWithInitArgs,
    ColocatedClasses,
    FusedWorker,
    create_fused_worker_cls,
)
from single_controller.base.worker import Worker
from single_controller.inline.worker_group import InlineWorkerGroup

__all__ = [
    "colocate",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
]


def colocate(
    pool: ResourcePool | None = None,
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
    """Every role on each rank of the pool, by default on one rank, in this process.

    Args:
        bin_pack … max_restarts: as for `InlineWorkerGroup`.
        roles: by name, a worker class, or `ClassWithInitArgs` where it takes arguments.

    Returns:
        An object with a group per role: `colocate(actor=Actor).actor.update(batch)`.

    Raises:
        ValueError: a role has the name of an option, or of an attribute of what is returned.
        What `InlineWorkerGroup` raises.
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
        InlineWorkerGroup, create_colocated_worker_cls, ClassWithInitArgs, pool, roles, options
    )


def create_colocated_worker_cls(class_dict: Mapping[str, ClassWithInitArgs]) -> ColocatedClasses:
    """What to start so that each rank holds all roles; `spawn` gives their groups.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    return ColocatedClasses(class_dict)


def create_colocated_worker_raw_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    return create_fused_worker_cls(ColocatedClasses(class_dict))


def create_colocated_worker_cls_fused(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> ClassWithInitArgs:
    """As `create_colocated_worker_cls`, with a `FusedWorker` beside the roles.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    return ClassWithInitArgs(create_colocated_worker_raw_cls(class_dict))
