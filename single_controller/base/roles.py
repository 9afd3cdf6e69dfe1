"""What to build on each rank: worker classes with their arguments, several in one process, each
with a group of its own.

Starting processes, and options of the processes, are left to the backends.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, get_type_hints

from single_controller.base.explain import Explanation, GroupTable
from single_controller.base.method import callers_signature, shown
from single_controller.base.plan import ResourcePool
from single_controller.base.trace import StatsTable
from single_controller.base.worker import Worker, WorkerContext, building
from single_controller.device import Turns
from single_controller.errors import RegistrationError, UnknownRoleError

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
    "RoleSpec",
    "build_roles",
    "check_constructors",
    "create_fused_worker_cls",
    "has_async_method",
    "restore_hooks",
    "worker_class",
]


@dataclass(frozen=True)
class RoleSpec:
    """One role of a host: its class and what to construct it with."""

    cls: type[Worker]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


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
        return f"{type(self).__name__}({getattr(self.cls, '__name__', self.cls)})"

    @property
    def role(self) -> str:
        """The role that a group made from this calls; "" if it calls none."""
        return str(getattr(self.cls, "__name__", self.cls))

    def roles(self) -> dict[str, RoleSpec]:
        """The roles of each host, in the order to build them; later changes do not reach them.

        Raises:
            RegistrationError: the class is not a subclass of `Worker`.
        """
        cls = worker_class(self.cls, self.role)
        fused: Mapping[str, RoleSpec] = getattr(cls, "fused_roles", {})
        return {**fused, self.role: RoleSpec(cls, tuple(self.args), dict(self.kwargs))}


class ColocatedClasses(ClassWithInitArgs[Any]):
    """Roles by name, to be built in one host per rank.

    Raises:
        RegistrationError: no role, or a role that is not `ClassWithInitArgs` of a `Worker`.
    """

    def __init__(self, class_dict: Mapping[str, ClassWithInitArgs]) -> None:
        wanted = "RayClassWithInitArgs(cls, ...), or ClassWithInitArgs, of one worker class"
        if not (isinstance(class_dict, Mapping) and class_dict):
            raise RegistrationError(
                f"class_dict must be a dict of {wanted}, with at least one role; got {class_dict!r}"
            )
        self.specs = dict(class_dict)
        for role, spec in self.specs.items():
            if isinstance(spec, ColocatedClasses) or not isinstance(spec, ClassWithInitArgs):
                raise RegistrationError(f"role {role!r} needs {wanted}; got {spec!r}")
        self.roles()

    @property
    def role(self) -> str:
        return ""

    def roles(self) -> dict[str, RoleSpec]:
        found: dict[str, RoleSpec] = {}
        for role, spec in self.specs.items():
            for name, role_spec in spec.roles().items():
                name = role if name == spec.role else name
                if found.setdefault(name, role_spec) is not role_spec:
                    raise RegistrationError(f"two roles of one host are called {name!r}")
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.specs})"


class FusedWorker(Worker):
    """A worker with other roles of its host as attributes: `self.actor`, `self.critic`.

    The roles are built before it, in the same process.
    """

    fused_roles: ClassVar[Mapping[str, RoleSpec]] = {}

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


def check_constructors(roles: Mapping[str, RoleSpec]) -> None:
    """Refuse arguments that a constructor would not take, with a RegistrationError; one whose
    parameters cannot be told, as under a decorator, takes any.
    """
    for role, spec in roles.items():
        init: Any = spec.cls.__init__
        if not inspect.isfunction(init) or type(spec.cls).__call__ is not type.__call__:
            continue
        signature = callers_signature(init, follow_wrapped=False)
        try:
            signature.bind(*spec.args, **spec.kwargs)
        except TypeError as error:
            takes = shown(signature.replace(return_annotation=signature.empty))
            raise RegistrationError(
                f"role {role!r} cannot be built: {spec.cls.__name__}{takes}: {error}"
            ) from None


def has_async_method(roles: Mapping[str, RoleSpec]) -> bool:
    """Whether any role has an `async def` method."""
    methods = (getattr(role.cls, name, None) for role in roles.values() for name in dir(role.cls))
    return any(map(inspect.iscoroutinefunction, methods))


def build_roles(
    context: WorkerContext,
    roles: Mapping[str, RoleSpec],
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
                worker = spec.cls(*spec.args, **spec.kwargs)
            if worker.takes_turns and has_async_method(roles):
                raise RegistrationError(
                    f"role {role!r} takes turns on the device, which needs calls that run one "
                    "after another; a role of this process has an async def method"
                )
            turns.add(role, worker)
        except (Exception, SystemExit) as error:
            raise failure(role, error) from None
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
        table: GroupTable = self.hosts.describe()
        return table

    def stats(self) -> StatsTable:
        """What the calls of all roles cost so far: `stats()["actor.update"]`."""
        every = ((role, row) for role, group in self.roles.items() for row in group.stats())
        return StatsTable(tuple(replace(row, method=f"{role}.{row.method}") for role, row in every))

    def explain(self, method_name: str, *args: Any, **kwargs: Any) -> Explanation:
        """What a call would do, without calling: `explain("actor.update", batch)`.

        Raises:
            UnknownRoleError: there is no such role. What `WorkerGroup.explain` raises.
        """
        role, _, method = method_name.rpartition(".")
        if role not in self.roles:
            raise UnknownRoleError(
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

    Args:
        pool: where the processes go.
        bin_pack … max_restarts: as for the backend's `group`, `RayWorkerGroup` or
            `InlineWorkerGroup`.
        roles: by name, a worker class, or the backend's `spec` where it takes arguments:
            `RayClassWithInitArgs` or `ClassWithInitArgs`.

    Returns:
        An object with a group per role: `colocate(pool, actor=Actor).actor.update(batch)`.

    Raises:
        ValueError: a role has the name of an option, or of an attribute of what is returned.
        RegistrationError: a role is no worker class. What the `group` raises.
    """

    group: Callable[..., Any]
    classes: Callable[[Mapping[str, ClassWithInitArgs]], ClassWithInitArgs]
    spec: Callable[[Any], ClassWithInitArgs]

    def __call__(
        self,
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
        options = {name: value for name, value in locals().items() if name not in ("self", "roles")}
        specs = {}
        for name, role in {**options, **roles}.items():
            found = self._spec(role)
            taken = name in options or hasattr(Colocated, name) or name in ("hosts", "roles")
            if taken and (found is not None or name in roles):
                has = "colocate has that option" if name in options else "every Colocated has that"
                raise ValueError(f"a role cannot be called {name!r}: {has}")
            if found is not None:
                specs[name] = found
            elif name in roles:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f": did you mean {close[0]!r}?" if close else "."
                raise RegistrationError(
                    f"role {name!r} needs a subclass of single_controller.base.Worker, or "
                    f"{self.spec.__name__}(cls, ...); got {role!r}{hint} "
                    f"Options are {', '.join(options)}"
                )
        return Colocated(self.group(options.pop("pool"), self.classes(specs), **options), specs)

    def _spec(self, role: Any) -> ClassWithInitArgs | None:
        """What to start for a role; None for what is no worker class."""
        with contextlib.suppress(RegistrationError):
            made = role if isinstance(role, ClassWithInitArgs) else self.spec(role)
            made.roles()
            return made
        return None
