"""One driver program calls methods on groups of distributed workers as if they were local.

`single_controller.base` holds what workers and modes are, `single_controller.ray` the groups.
"""

from single_controller.errors import (
    CallTimeoutError,
    DispatchError,
    GroupBrokenError,
    RegistrationError,
    ResourceError,
    SingleControllerError,
    UnknownMethodError,
    UnknownRoleError,
    WorkerDiedError,
    WorkerError,
)

__all__ = [
    "CallTimeoutError",
    "DispatchError",
    "GroupBrokenError",
    "RegistrationError",
    "ResourceError",
    "SingleControllerError",
    "UnknownMethodError",
    "UnknownRoleError",
    "WorkerDiedError",
    "WorkerError",
]
