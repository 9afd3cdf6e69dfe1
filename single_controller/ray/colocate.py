"""Several roles in one Ray actor: one actor's options from those of its roles. What the roles are
is said by `base.roles`; a group's views on them are made by `spawn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from single_controller.base.roles import (
    ClassWithInitArgs,
    ColocatedClasses,
    FusedWorker,
    check_class_dict,
    create_fused_worker_cls,
)
from single_controller.errors import RegistrationError
from single_controller.ray.actor_spec import ActorSpec, RayClassWithInitArgs

__all__ = [
    "RayColocatedClasses",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
]


class RayColocatedClasses(ColocatedClasses, RayClassWithInitArgs[Any]):
    """Roles by name, to be built in one actor per rank.

    Raises:
        RegistrationError: no role, a role that is not `RayClassWithInitArgs` of a `Worker`, or
            roles that give one of Ray's options different values.
    """

    def __init__(self, class_dict: Mapping[str, ClassWithInitArgs]) -> None:
        check_class_dict(class_dict)
        ColocatedClasses.__init__(self, {r: _ray_spec(spec) for r, spec in class_dict.items()})
        self._options: dict[str, Any] = {}
        self._additional_resource: dict[str, float] = {}
        self.actor_spec()

    def _own_options(self) -> dict[str, Any]:
        options = super()._own_options()
        for role, spec in self.specs.items():
            own: ActorSpec = spec.actor_spec()  # type: ignore[attr-defined]
            for key, value in own.options.items():
                if options.setdefault(key, value) != value:
                    raise RegistrationError(
                        f"roles of one host must agree on Ray's options: {key!r} is "
                        f"{options[key]!r} and, for role {role!r}, {value!r}"
                    )
        return options


def _ray_spec(spec: Any) -> Any:
    if isinstance(spec, RayClassWithInitArgs) or type(spec) is not ClassWithInitArgs:
        return spec
    return RayClassWithInitArgs(spec.cls, *spec.args, **spec.kwargs)


def create_colocated_worker_raw_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several.

    Raises:
        RegistrationError: see `RayColocatedClasses`.
    """
    return create_fused_worker_cls(RayColocatedClasses(class_dict))


def create_colocated_worker_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> RayColocatedClasses:
    """What to start so that each rank's process holds all roles; `spawn` gives their groups.

    Raises:
        RegistrationError: see `RayColocatedClasses`.
    """
    return RayColocatedClasses(class_dict)


def create_colocated_worker_cls_fused(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> RayClassWithInitArgs:
    """As `create_colocated_worker_cls`, with a `FusedWorker` beside the roles.

    Raises:
        RegistrationError: see `RayColocatedClasses`.
    """
    spec = RayClassWithInitArgs(create_colocated_worker_raw_cls(class_dict))
    spec.update_options(RayColocatedClasses(class_dict).actor_spec().options)
    return spec
