"""One driver program calls methods on groups of distributed workers as if they were local.

`single_controller.base` holds what workers and modes are, `single_controller.ray` the groups.
"""

from single_controller.base import (
    Broadcast,
    ClassWithInitArgs,
    GroupView,
    Handle,
    PerRank,
    ResourcePool,
    Worker,
    WorkerGroup,
)
from single_controller.base.trace import span, trace
from single_controller.errors import (
    CallTimeoutError,
    CollectiveError,
    DispatchError,
    GroupBrokenError,
    RegistrationError,
    ResourceError,
    SendError,
    SharedMemoryWriteError,
    SingleControllerError,
    UnknownMethodError,
    WorkerDiedError,
    WorkerError,
)

__all__ = [
    "Broadcast",
    "CallTimeoutError",
    "ClassWithInitArgs",
    "CollectiveError",
    "DispatchError",
    "GroupBrokenError",
    "GroupView",
    "Handle",
    "PerRank",
    "RegistrationError",
    "ResourceError",
    "ResourcePool",
    "SendError",
    "SharedMemoryWriteError",
    "SingleControllerError",
    "UnknownMethodError",
    "Worker",
    "WorkerDiedError",
    "WorkerError",
    "WorkerGroup",
    "span",
    "trace",
]
