"""Groups of workers in the driver's own process, for debuggers and unit tests."""

from single_controller.base.roles import Colocated
from single_controller.inline.group import (
    InlineReference,
    InlineWorkerGroup,
    colocate,
    create_colocated_worker_cls,
    create_colocated_worker_cls_fused,
    create_colocated_worker_raw_cls,
    pin,
)

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
