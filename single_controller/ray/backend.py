"""What the names of this package stand for: Ray's groups, or, in a program that was started with
SINGLE_CONTROLLER_BACKEND=inline, groups in the driver's own process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__all__ = [
    "RayWorkerGroup",
    "ResourcePoolManager",
    "backend_name",
    "colocate",
    "merge_resource_pool",
    "pin",
    "split_resource_pool",
]


def backend_name() -> str:
    """The backend that this process was started for.

    Raises:
        ValueError: SINGLE_CONTROLLER_BACKEND is neither "ray", the default, nor "inline".
    """
    name = os.environ.get("SINGLE_CONTROLLER_BACKEND") or "ray"
    if name not in ("ray", "inline"):
        raise ValueError(f"SINGLE_CONTROLLER_BACKEND must be ray or inline; got {name!r}")
    return name


if TYPE_CHECKING or backend_name() == "ray":
    from single_controller.ray.pin import pin
    from single_controller.ray.pools import (
        ResourcePoolManager,
        merge_resource_pool,
        split_resource_pool,
    )
    from single_controller.ray.roles import colocate
    from single_controller.ray.worker_group import RayWorkerGroup
else:
    from single_controller.inline.pin import pin as pin
    from single_controller.ray.switched import SwitchedPoolManager as ResourcePoolManager
    from single_controller.ray.switched import SwitchedWorkerGroup as RayWorkerGroup
    from single_controller.ray.switched import colocate_switched as colocate
    from single_controller.ray.switched import merge_unreserved as merge_resource_pool
    from single_controller.ray.switched import split_unreserved as split_resource_pool
