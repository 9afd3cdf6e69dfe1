"""`colocate`: roles in one process per rank, in one call, with a group per role as attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from single_controller.base.table import GroupTable
from single_controller.base.worker import Worker
from single_controller.base.worker_group import ClassWithInitArgs
from single_controller.ray.actor_spec import RayClassWithInitArgs
from single_controller.ray.colocate import create_colocated_worker_cls
from single_controller.ray.placement import RayResourcePool
from single_controller.ray.worker_group import RayWorkerGroup

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Colocated", "colocate"]


class Colocated:
    """Groups by role, as attributes. A context manager: leaving it ends their processes."""

    def __init__(self, hosts: RayWorkerGroup, roles: list[str]) -> None:
        self.hosts = hosts
        self.roles = hosts.spawn(roles)

    def __getattr__(self, name: str) -> RayWorkerGroup:
        roles: dict[str, RayWorkerGroup] = self.__dict__.get("roles", {})
        if name in roles:
            return roles[name]
        raise AttributeError(f"no role {name!r}; the roles are {list(roles)}")

    def describe(self) -> GroupTable:
        """rank → role → node → device → pid → state, as a value that prints as a table."""
        return self.hosts.describe()

    def close(self) -> None:
        """End the processes."""
        self.hosts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def colocate(pool: RayResourcePool, **roles: ClassWithInitArgs | type[Worker]) -> Colocated:
    """Start one process per process of the pool, each with every role in it.

    Args:
        roles: by name, a worker class, or `RayClassWithInitArgs` where it takes arguments.

    Returns:
        An object with a group per role: `colocate(pool, actor=Actor).actor.update(batch)`.

    Raises:
        What `RayWorkerGroup` raises.
    """
    taken = sorted(name for name in roles if hasattr(Colocated, name) or name in ("hosts", "roles"))
    if taken:
        raise ValueError(
            f"a role cannot be called {taken[0]!r}; every Colocated has that attribute"
        )
    specs: dict[str, Any] = {
        name: RayClassWithInitArgs(role) if not isinstance(role, ClassWithInitArgs) else role
        for name, role in roles.items()
    }
    return Colocated(RayWorkerGroup(pool, create_colocated_worker_cls(specs)), list(specs))
