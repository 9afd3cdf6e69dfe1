"""What `colocate` returns: a group per role of the same hosts, as attributes.

Starting hosts is left to the `colocate` of each backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from single_controller.base.host_group import HostGroup
from single_controller.base.roles import ClassWithInitArgs
from single_controller.base.table import GroupTable
from single_controller.base.worker import Worker
from single_controller.errors import RegistrationError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Colocated", "role_specs"]


class Colocated:
    """Groups by role, as attributes. A context manager: leaving it ends their processes."""

    def __init__(self, hosts: HostGroup, roles: Mapping[str, Any]) -> None:
        self.hosts = hosts
        self.roles = hosts.spawn(roles)

    def __getattr__(self, name: str) -> Any:
        roles: dict[str, HostGroup] = self.__dict__.get("roles", {})
        if name in roles:
            return roles[name]
        raise AttributeError(f"no role {name!r}; the roles are {list(roles)}")

    @classmethod
    def of(cls, roles: Colocated) -> Self:
        """`roles`, as a value of this type, whose annotations are the views of its roles:

            class Team(Colocated):
                actor: ActorGroup  # class ActorGroup(GroupView, Actor): ...

            team = Team.of(colocate(pool, actor=Actor))

        Raises:
            RegistrationError: a role is missing, or of another worker class than its view.
        """
        try:
            views = get_type_hints(cls)
        except NameError:  # classes of a function, which nobody outside can look up
            views = dict(cls.__annotations__)
        for role, view in views.items():
            if role not in roles.roles:
                raise RegistrationError(
                    f"{cls.__name__} has the role {role!r}; there are {list(roles.roles)}"
                )
            if isinstance(view, type):
                roles.roles[role]._check_view(view)
        made: Any = roles
        return made  # type: ignore[no-any-return]

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


def role_specs(
    roles: Mapping[str, ClassWithInitArgs | type[Worker]],
    spec: Callable[[type[Worker]], ClassWithInitArgs],
) -> dict[str, ClassWithInitArgs]:
    """The roles of a `colocate` call, bare classes as a `spec` without arguments.

    Raises:
        ValueError: a role has the name of something every `Colocated` has.
    """
    taken = sorted(name for name in roles if hasattr(Colocated, name) or name in ("hosts", "roles"))
    if taken:
        raise ValueError(
            f"a role cannot be called {taken[0]!r}; every Colocated has that attribute"
        )
    return {
        name: role if isinstance(role, ClassWithInitArgs) else spec(role)
        for name, role in roles.items()
    }
