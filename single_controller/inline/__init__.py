"""Groups of workers in the driver's own process, for debuggers and unit tests."""

from single_controller.base.colocated import Colocated
from single_controller.inline.calls import InlineReference
from single_controller.inline.pin import pin
from single_controller.inline.roles import (
    colocate,
    create_colocated_worker_cls,
    create_colocated_worker_cls_fused,
    create_colocated_worker_raw_cls,
)
from single_controller.inline.worker_group import InlineWorkerGroup

__all__ = [
    "Colocated",
    "InlineReference",
    "InlineWorkerGroup",
    "colocate",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
    "pin",
]
