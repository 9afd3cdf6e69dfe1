"""What to start: worker classes, their arguments and Ray's options. Starting reads a spec, never
changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from ray.actor import ActorClass

from single_controller import checks
from single_controller.base.roles import ClassWithInitArgs, P, RoleSpec, W, worker_class

__all__ = ["ActorSpec", "RayClassWithInitArgs", "unwrap_remote"]


def unwrap_remote(cls: Any) -> tuple[Any, dict[str, Any]]:
    """The class under `@ray.remote`, and the options given there."""
    if isinstance(cls, ActorClass):
        inner: Any = cls
        return inner.__ray_actor_class__, dict(inner._default_options)
    return cls, {}


@dataclass(frozen=True)
class ActorSpec:
    """One host: its roles by name, and Ray's options for its process."""

    roles: Mapping[str, RoleSpec]
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
        plain, self._options = unwrap_remote(cls)
        worker: Any = worker_class(plain, getattr(plain, "__name__", "?"))
        super().__init__(worker, *args, **kwargs)
        self._additional_resource: dict[str, float] = {}

    def update_options(self, options: Mapping[str, Any]) -> None:
        """Add to Ray's options for the actor, such as `runtime_env`."""
        checks.instance(Mapping, "options", options, "a dict of Ray's options by name")
        self._options.update(options)

    def set_additional_resource(self, additional_resource: Mapping[str, float]) -> None:
        """Ask for custom resources on top of the pool's, such as `{"high_bandwidth": 1}`."""
        checks.instance(Mapping, "additional_resource", additional_resource, "a dict of amounts")
        self._additional_resource = dict(additional_resource)

    def actor_spec(self) -> ActorSpec:
        """What to start, as a value: later changes to this object do not reach it."""
        return ActorSpec(self.roles(), self._own_options())

    def _own_options(self) -> dict[str, Any]:
        options = dict(self._options)
        if self._additional_resource:
            resources = options.get("resources") or {}
            options["resources"] = {**resources, **self._additional_resource}
        return options
