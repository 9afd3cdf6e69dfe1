"""What to build on each rank: worker classes with their arguments, several in one process, each
with a group of its own.

Starting processes, and options of the processes, are left to the backends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec

from single_controller.base.explain import Explanation, GroupTable
from single_controller.base.plan import ResourcePool
from single_controller.base.trace import StatsTable
from single_controller.base.worker import Worker, WorkerContext, building
from single_controller.device import Turns
from single_controller.errors import RegistrationError

if TYPE_CHECKING:
    from typing_extensions import Self, TypeVar

    W = TypeVar("W", default=Any)
else:
    from typing import TypeVar

    W = TypeVar("W")  # Python 3.10 knows no defaults
P = ParamSpec("P")

__all__ = [
    "ClassWithInitArgs",
    "Colocate",
    "Colocated",
    "ColocatedClasses",
    "FusedWorker",
    "build_roles",
    "create_fused_worker_cls",
    "has_async_method",
    "restore_hooks",
    "worker_class",
]


class ClassWithInitArgs(Generic[W]):
    """A class and the arguments to construct it with, later and elsewhere."""

    def __init__(self, cls: Callable[P, W], *args: P.args, **kwargs: P.kwargs) -> None:
        self.cls: Any = cls
        self.args: tuple[Any, ...] = args
        self.kwargs: dict[str, Any] = kwargs

    def __call__(self) -> W:
        """Construct it here and now."""
        made: W = self.cls(*self.args, **self.kwargs)
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.role})"

    @property
    def role(self) -> str:
        """The role that a group made from this calls; "" if it calls none."""
        return str(getattr(self.cls, "__name__", self.cls))

    def roles(self) -> dict[str, ClassWithInitArgs[Any]]:
        """The roles of each host, in the order to build them; later changes do not reach them.

        Raises:
            RegistrationError: the class is not a subclass of `Worker`.
        """
        cls = worker_class(self.cls, self.role)
        fused: Mapping[str, ClassWithInitArgs] = getattr(cls, "fused_roles", {})
        return {**fused, self.role: ClassWithInitArgs(cls, *self.args, **self.kwargs)}


class ColocatedClasses(ClassWithInitArgs[Any]):
    """Roles by name, to be built in one host per rank.

    Raises:
        RegistrationError: no role, one that is not of a `Worker`, or two of one name.
    """

    _spec: ClassVar[Any] = ClassWithInitArgs  # what a bare class becomes

    def __init__(self, class_dict: Mapping[str, Any]) -> None:
        if not class_dict:
            raise RegistrationError("at least one role is needed, a worker class by its name")
        self.specs: dict[str, ClassWithInitArgs] = {
            role: spec if isinstance(spec, ClassWithInitArgs) else self._spec(spec)
            for role, spec in class_dict.items()
        }
        self.roles()

    @property
    def role(self) -> str:
        return ""

    def roles(self) -> dict[str, ClassWithInitArgs]:
        found: dict[str, ClassWithInitArgs] = {}
        for role, spec in self.specs.items():
            for name, role_spec in spec.roles().items():
                name = role if name == spec.role else name
                if found.setdefault(name, role_spec) is not role_spec:
                    raise RegistrationError(f"two roles of one host are called {name!r}")
        return found


class FusedWorker(Worker):
    """A worker with other roles of its host as attributes: `self.actor`, `self.critic`.

    The roles are built before it, in the same process.
    """

    fused_roles: ClassVar[Mapping[str, ClassWithInitArgs]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fused_roles:
            return self.fused_worker_dict[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def create_fused_worker_cls(classes: ColocatedClasses) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several."""
    roles = classes.roles()
    return type("FusedWorker_" + "_".join(roles), (FusedWorker,), {"fused_roles": roles})


def worker_class(cls: Any, role: str) -> type[Worker]:
    """`cls`; RegistrationError if it is not a subclass of `Worker`."""
    if not (isinstance(cls, type) and issubclass(cls, Worker)):
        raise RegistrationError(
            f"role {role!r} needs a subclass of single_controller.base.Worker; got {cls!r}"
        )
    return cls


def has_async_method(roles: Mapping[str, ClassWithInitArgs]) -> bool:
    """Whether any role has an `async def` method."""
    methods = (getattr(role.cls, name, None) for role in roles.values() for name in dir(role.cls))
    return any(map(inspect.iscoroutinefunction, methods))


def build_roles(
    context: WorkerContext,
    roles: Mapping[str, ClassWithInitArgs],
    turns: Turns,
    failure: Callable[[str, BaseException], BaseException],
) -> Iterator[tuple[str, Worker]]:
    """Construct a rank's workers in their order, each known to the others once it is there.

    Those that take turns are off the device then. What a constructor raised is raised as what
    `failure(role, error)` makes of it.
    """
    for role, spec in roles.items():
        try:
            with building(context):
                worker = spec()
            if worker.takes_turns and has_async_method(roles):
                raise RegistrationError(
                    f"role {role!r} takes turns on the device, which needs calls that run one "
                    "after another; a role of this process has an async def method"
                )
            turns.add(role, worker)
        except (Exception, SystemExit) as error:
            failed = failure(role, error)
            raise failed from failed.__cause__
        if not isinstance(worker, FusedWorker):
            context.peers[role] = worker
        yield role, worker


def restore_hooks(workers: Mapping[str, Worker]) -> list[tuple[str, Callable[[], Any]]]:
    """The optional `restore()` of the workers that have one, by role, for those that take over."""
    found = ((role, getattr(worker, "restore", None)) for role, worker in workers.items())
    return [(role, hook) for role, hook in found if callable(hook)]


class Colocated:
    """Groups by role, as attributes. A context manager: leaving it ends their processes.

    What is asked of it is asked of all roles; `hosts` is the group that their processes are.
    """

    def __init__(self, hosts: Any, roles: Iterable[str]) -> None:
        self.hosts = hosts
        self.roles: dict[str, Any] = hosts.spawn(roles)

    def __getattr__(self, name: str) -> Any:
        if name in (roles := self.__dict__.get("roles", {})):
            return roles[name]
        raise AttributeError(f"no role {name!r}; the roles are {list(roles)}")

    @classmethod
    def of(cls, roles: Colocated) -> Self:
        """`roles`, as type checkers see them: a value of this type, whose annotations are the views
        of its roles.

            class Team(Colocated):
                actor: ActorGroup  # class ActorGroup(GroupView, Actor): ...

            team = Team.of(colocate(pool, actor=Actor))
        """
        made: Any = roles
        return made  # type: ignore[no-any-return]

    def describe(self) -> GroupTable:
        """rank → role → node → device → pid → state, as a value that prints as a table."""
        table: GroupTable = self.hosts.describe()
        return table

    def stats(self) -> StatsTable:
        """What the calls of all roles cost so far: `stats()["actor.update"]`."""
        every = ((role, row) for role, group in self.roles.items() for row in group.stats())
        return StatsTable(tuple(replace(row, method=f"{role}.{row.method}") for role, row in every))

    def explain(self, method_name: str, *args: Any, **kwargs: Any) -> Explanation:
        """What a call would do, without calling: `explain("actor.update", batch)`.

        Raises:
            ValueError: there is no such role. What `WorkerGroup.explain` raises.
        """
        role, _, method = method_name.rpartition(".")
        if role not in self.roles:
            raise ValueError(
                f"explain needs a role and its method, as {next(iter(self.roles), 'role')}.update; "
                f"got {method_name!r}, and the roles are {list(self.roles)}"
            )
        told: Explanation = self.roles[role].explain(method, *args, **kwargs)
        return told

    def stacks(self) -> dict[int, str]:
        """By rank, what its process is doing now: see `RayWorkerGroup.stacks`."""
        stacks: dict[int, str] = self.hosts.stacks()
        return stacks

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


@dataclass(frozen=True)
class Colocate:
    """Starts one process per process of a pool, with every role in it.

        team = colocate(pool, actor=Actor, critic=RayClassWithInitArgs(Critic, 0.1), detached=True)
        team.actor.update(batch)

    Args:
        pool: where the processes go.
        given: by name, roles and options. A role is a worker class, or where it takes arguments
            `RayClassWithInitArgs` or `ClassWithInitArgs` of it. The options are those of the
            backend's `group`, `RayWorkerGroup` or `InlineWorkerGroup`.

    Raises:
        ValueError: a role has the name of an attribute of what is returned.
        RegistrationError: a role is no worker class. What the `group` raises.
    """

    group: Callable[..., Any]
    classes: Callable[[Mapping[str, Any]], ClassWithInitArgs]

    def __call__(self, pool: ResourcePool | None = None, **given: Any) -> Colocated:
        roles = {name: value for name, value in given.items() if callable(value)}
        options = {name: value for name, value in given.items() if name not in roles}
        for name in roles:
            if hasattr(Colocated, name) or name in ("hosts", "roles"):
                raise ValueError(f"a role cannot be called {name!r}: every Colocated has that")
        return Colocated(self.group(pool, self.classes(roles), **options), roles)
