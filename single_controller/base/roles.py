"""What to build on each rank: worker classes with their arguments, several in one process.

Starting processes, and options of the processes, are left to the backends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec

from single_controller.base.method import callers_signature, shown
from single_controller.base.worker import Worker
from single_controller.errors import RegistrationError

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    W = TypeVar("W", default=Any)
else:
    from typing import TypeVar

    W = TypeVar("W")  # Python 3.10 knows no defaults
P = ParamSpec("P")

__all__ = [
    "ClassWithInitArgs",
    "ColocatedClasses",
    "FusedWorker",
    "RoleSpec",
    "check_class_dict",
    "check_constructors",
    "create_fused_worker_cls",
    "worker_class",
]


@dataclass(frozen=True)
class RoleSpec:
    """One role of a host: its class and what to construct it with."""

    cls: type[Worker]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def worker_class(cls: Any, role: str) -> type[Worker]:
    """`cls` as a worker class.

    Raises:
        RegistrationError: it is not a subclass of `Worker`.
    """
    if not (isinstance(cls, type) and issubclass(cls, Worker)):
        raise RegistrationError(
            f"role {role!r} needs a subclass of single_controller.base.Worker; got {cls!r}"
        )
    return cls


def check_constructors(roles: Mapping[str, RoleSpec]) -> None:
    """Refuse arguments that a constructor would not take; one whose parameters cannot be told, as
    under a decorator, takes any.

    Raises:
        RegistrationError: it names class, role and argument.
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


class FusedWorker(Worker):
    """A worker with other roles of its host as attributes: `self.actor`, `self.critic`.

    The roles are built before it, in the same process.
    """

    fused_roles: ClassVar[Mapping[str, RoleSpec]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fused_roles:
            return self.fused_worker_dict[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def check_class_dict(class_dict: object) -> None:
    """Raise RegistrationError for what names no role."""
    if not (isinstance(class_dict, Mapping) and class_dict):
        raise RegistrationError(
            "class_dict must be a dict of role names and RayClassWithInitArgs(cls, ...), or "
            f"ClassWithInitArgs, with at least one role; got {class_dict!r}"
        )


class ColocatedClasses(ClassWithInitArgs[Any]):
    """Roles by name, to be built in one host per rank.

    Raises:
        RegistrationError: no role, or a role that is not `ClassWithInitArgs` of a `Worker`.
    """

    def __init__(self, class_dict: Mapping[str, ClassWithInitArgs]) -> None:
        check_class_dict(class_dict)
        for role, spec in class_dict.items():
            if isinstance(spec, ColocatedClasses) or not isinstance(spec, ClassWithInitArgs):
                raise RegistrationError(
                    f"role {role!r} needs RayClassWithInitArgs(cls, ...), or ClassWithInitArgs, "
                    f"of one worker class; got {spec!r}"
                )
        self.specs: dict[str, ClassWithInitArgs] = dict(class_dict)
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


def create_fused_worker_cls(classes: ColocatedClasses) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several."""
    roles = classes.roles()
    return type("FusedWorker_" + "_".join(roles), (FusedWorker,), {"fused_roles": roles})
