"""What to start: worker classes, their arguments and Ray's options, also several roles in one
actor. Starting reads a spec, never changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from ray.actor import ActorClass

from single_controller.base.roles import (
    ClassWithInitArgs,
    ColocatedClasses,
    FusedWorker,
    P,
    W,
    create_fused_worker_cls,
    worker_class,
)
from single_controller.errors import RegistrationError

__all__ = [
    "ActorSpec",
    "RayClassWithInitArgs",
    "RayColocatedClasses",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
]


@dataclass(frozen=True)
class ActorSpec:
    """One host: its roles by name, and Ray's options for its process."""

    roles: Mapping[str, ClassWithInitArgs]
    options: Mapping[str, Any] = field(default_factory=dict)


class RayClassWithInitArgs(ClassWithInitArgs[W]):
    """A worker class, plain or under `@ray.remote`, and what to construct it with on each rank.

    Raises:
        RegistrationError: `cls` is not a subclass of `Worker`.
    """

    @overload
    def __init__(self, cls: ActorClass[W], *args: Any, **kwargs: Any) -> None: ...
    @overload
    def __init__(self, cls: Callable[P, W], *args: P.args, **kwargs: P.kwargs) -> None: ...
    def __init__(self, cls: Any, *args: Any, **kwargs: Any) -> None:
        self._options: dict[str, Any] = {}
        if isinstance(cls, ActorClass):
            remote: Any = cls
            cls, self._options = remote.__ray_actor_class__, dict(remote._default_options)
        worker: Any = worker_class(cls, getattr(cls, "__name__", "?"))
        super().__init__(worker, *args, **kwargs)

    def update_options(self, options: Mapping[str, Any]) -> None:
        """Add to Ray's options for the actor, such as `runtime_env`."""
        self._options.update(options)

    def set_additional_resource(self, additional_resource: Mapping[str, float]) -> None:
        """Ask for custom resources on top of the pool's, such as `{"high_bandwidth": 1}`."""
        resources = self._options.get("resources") or {}
        self._options["resources"] = {**resources, **additional_resource}

    def actor_spec(self) -> ActorSpec:
        """What to start, as a value: later changes to this object do not reach it."""
        return ActorSpec(self.roles(), dict(self._options))


class RayColocatedClasses(ColocatedClasses, RayClassWithInitArgs[Any]):
    """Roles by name, to be built in one actor per rank.

    Raises:
        RegistrationError: no role, a role that is no worker class, or roles that give one of Ray's
            options different values.
    """

    _spec = RayClassWithInitArgs

    def __init__(self, class_dict: Mapping[str, ClassWithInitArgs]) -> None:
        self._options: dict[str, Any] = {}
        ColocatedClasses.__init__(self, class_dict)
        self.actor_spec()

    def actor_spec(self) -> ActorSpec:
        options = dict(self._options)
        for role, spec in self.specs.items():
            for key, value in getattr(spec, "_options", {}).items():
                if options.setdefault(key, value) != value:
                    raise RegistrationError(
                        f"roles of one host must agree on Ray's options: {key!r} is "
                        f"{options[key]!r} and, for role {role!r}, {value!r}"
                    )
        return ActorSpec(self.roles(), options)


def create_colocated_worker_raw_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> type[FusedWorker]:
    """A worker class with the roles as attributes, to subclass with methods that use several."""
    return create_fused_worker_cls(RayColocatedClasses(class_dict))


def create_colocated_worker_cls(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> RayColocatedClasses:
    """What to start so that each rank's process holds all roles; `spawn` gives their groups."""
    return RayColocatedClasses(class_dict)


def create_colocated_worker_cls_fused(
    class_dict: Mapping[str, ClassWithInitArgs],
) -> RayClassWithInitArgs:
    """As `create_colocated_worker_cls`, with a `FusedWorker` beside the roles."""
    spec = RayClassWithInitArgs(create_colocated_worker_raw_cls(class_dict))
    spec.update_options(RayColocatedClasses(class_dict).actor_spec().options)
    return spec
