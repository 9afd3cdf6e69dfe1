"""What `colocate` returns: a group per role of the same hosts, as attributes.

Starting hosts is left to the `colocate` of each backend.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_type_hints

from single_controller import checks
from single_controller.base.explain import Explanation
from single_controller.base.host_group import HostGroup
from single_controller.base.recorder import StatsTable
from single_controller.base.roles import ClassWithInitArgs
from single_controller.base.table import GroupTable
from single_controller.base.worker import Worker
from single_controller.errors import RegistrationError, UnknownRoleError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Colocated", "colocated"]


class Colocated:
    """Groups by role, as attributes. A context manager: leaving it ends their processes.

    What is asked of it is asked of all roles; `hosts` is the group that their processes are.
    """

    def __init__(self, hosts: HostGroup, roles: Iterable[str]) -> None:
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

    def stats(self) -> StatsTable:
        """What the calls of all roles cost so far: `stats()["actor.update"]`."""
        return StatsTable(
            tuple(
                replace(row, method=f"{role}.{row.method}")
                for role, group in self.roles.items()
                for row in group.stats()
            )
        )

    def explain(self, method_name: str, *args: Any, **kwargs: Any) -> Explanation:
        """What a call would do, without calling: `explain("actor.update", batch)`.

        Raises:
            UnknownRoleError: there is no such role. What `WorkerGroup.explain` raises.
        """
        checks.instance(str, "method_name", method_name, "a role and its method, as 'actor.update'")
        role, _, method = method_name.rpartition(".")
        if role not in self.roles:
            raise UnknownRoleError(
                f"explain needs a role and its method, as {next(iter(self.roles), 'role')}.update; "
                f"got {method_name!r}, and the roles are {list(self.roles)}"
            )
        return self.roles[role].explain(method, *args, **kwargs)

    def stacks(self) -> dict[int, str]:
        """By rank, what its process is doing now: see `RayWorkerGroup.stacks`."""
        return self.hosts.stacks()

    def restart(self) -> None:
        """Start all processes and roles anew: see `RayWorkerGroup.restart`.

        Raises:
            GroupBrokenError: they were closed. What starting them raises.
        """
        self.hosts.restart()

    def close(self) -> None:
        """End the processes."""
        self.hosts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def colocated(
    group: Callable[..., HostGroup],
    classes: Callable[[Mapping[str, ClassWithInitArgs]], ClassWithInitArgs],
    spec: Callable[[Any], ClassWithInitArgs],
    pool: Any,
    roles: Mapping[str, ClassWithInitArgs | type[Worker]],
    options: Mapping[str, Any],
) -> Colocated:
    """The groups of a `colocate` call, on a backend's `group` of what its `classes` make of roles;
    bare classes are a `spec` without arguments.

    Raises:
        ValueError: a role has the name of an option, or of something every `Colocated` has.
        RegistrationError: a role is no worker class.
    """
    for name, value in {"pool": pool, **options}.items():
        if _spec(value, spec) is not None:
            raise ValueError(f"a role cannot be called {name!r}: colocate has that option")
    specs = {}
    for name, role in roles.items():
        if hasattr(Colocated, name) or name in ("hosts", "roles"):
            raise ValueError(
                f"a role cannot be called {name!r}: every Colocated has that attribute"
            )
        if (found := _spec(role, spec)) is None:
            close = difflib.get_close_matches(name, options, n=1)
            hint = f": did you mean {close[0]!r}?" if close else "."
            raise RegistrationError(
                f"role {name!r} needs a subclass of single_controller.base.Worker, or "
                f"{spec.__name__}(cls, ...); got {role!r}{hint} Options are {', '.join(options)}"
            )
        specs[name] = found
    return Colocated(group(pool, classes(specs), **options), specs)


def _spec(role: Any, spec: Callable[[Any], ClassWithInitArgs]) -> ClassWithInitArgs | None:
    """What to start for a role; None for what is no worker class."""
    if isinstance(role, ClassWithInitArgs):
        return role
    try:
        made = spec(role)
        made.roles()
    except RegistrationError:
        return None
    return made
