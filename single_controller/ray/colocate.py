"""Several roles in one host: the specs that ask for it. A group's views on roles are made by
`RayWorkerGroup.spawn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from single_controller.base.worker import Worker
from single_controller.base.worker_group import ClassWithInitArgs
from single_controller.errors import RegistrationError
from single_controller.ray.actor_spec import ActorSpec, RayClassWithInitArgs, RoleSpec

__all__ = [
    "ColocatedClasses",
    "FusedWorker",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
]


class ColocatedClasses(RayClassWithInitArgs):
    """Roles by name, to be built in one host per rank.

    Raises:
        RegistrationError: no role, a role that is not `RayClassWithInitArgs` of a `Worker`, or
            roles that give one of Ray's options different values.
    """

    role = ""

    def __init__(self, class_dict: Mapping[str, ClassWithInitArgs]) -> None:
        if not class_dict:
            raise RegistrationError("class_dict must hold at least one role")
        self._specs = {role: _ray_spec(role, spec) for role, spec in class_dict.items()}
        self._options: dict[str, Any] = {}
        self._additional_resource: dict[str, float] = {}
        self.actor_spec()

    def actor_spec(self) -> ActorSpec:
        roles: dict[str, RoleSpec] = {}
        options = self._own_options()
        for role, spec in self._specs.items():
            one = spec.actor_spec()
            for name, role_spec in one.roles.items():
                name = role if name == spec.role else name
                if roles.setdefault(name, role_spec) is not role_spec:
                    raise RegistrationError(f"two roles of one host are called {name!r}")
            for key, value in one.options.items():
                if options.setdefault(key, value) != value:
                    raise RegistrationError(
                        f"roles of one host must agree on Ray's options: {key!r} is "
                        f"{options[key]!r} and, for role {role!r}, {value!r}"
                    )
        return ActorSpec(roles, options)

    def __repr__(self) -> str:
        return f"ColocatedClasses({self._specs})"


def _ray_spec(role: str, spec: Any) -> RayClassWithInitArgs:
    if isinstance(spec, ColocatedClasses) or not isinstance(spec, ClassWithInitArgs):
        raise RegistrationError(
            f"role {role!r} needs RayClassWithInitArgs(cls, ...) of one worker class; got {spec!r}"
        )
    if isinstance(spec, RayClassWithInitArgs):
        return spec
    return RayClassWithInitArgs(spec.cls, *spec.args, **spec.kwargs)


class FusedWorker(Worker):
    """A worker with other roles of its host as attributes: `self.actor`, `self.critic`.

    The roles are built before it, in the same process.
    """

    fused_roles: ClassVar[Mapping[str, RoleSpec]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fused_roles:
            return self.fused_worker_dict[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def create_colocated_worker_cls(class_dict: Mapping[str, ClassWithInitArgs]) -> ColocatedClasses:
    """What to start so that each rank's process holds all roles; `spawn` gives their groups.

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
    roles = ColocatedClasses(class_dict).actor_spec().roles
    return type("FusedWorker_" + "_".join(roles), (FusedWorker,), {"fused_roles": roles})


def create_colocated_worker_cls_fused(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> RayClassWithInitArgs:
    """As `create_colocated_worker_cls`, with a `FusedWorker` beside the roles.

    Raises:
        RegistrationError: see `ColocatedClasses`.
    """
    spec = RayClassWithInitArgs(create_colocated_worker_raw_cls(class_dict))
    spec.update_options(ColocatedClasses(class_dict).actor_spec().options)
    return spec
