"""Backend-neutral parts: workers, registration, dispatch, groups."""

from single_controller.base.decorator import GroupView
from single_controller.base.plan import Broadcast, Handle, PerRank, ResourcePool
from single_controller.base.worker import Worker
from single_controller.base.worker_group import ClassWithInitArgs, WorkerGroup

__all__ = [
    "Broadcast",
    "ClassWithInitArgs",
    "GroupView",
    "Handle",
    "PerRank",
    "ResourcePool",
    "Worker",
    "WorkerGroup",
]
