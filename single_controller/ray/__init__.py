"""Groups of workers in Ray actors."""

from single_controller.base.roles import Colocated
from single_controller.ray.backend import (
    RayWorkerGroup,
    ResourcePoolManager,
    colocate,
    merge_resource_pool,
    pin,
    split_resource_pool,
)
from single_controller.ray.placement import (
    RayResourcePool,
    SubRayResourcePool,
    sort_placement_group_by_node_ip,
)
from single_controller.ray.pools import extract_pg_from_exist, parallel_put
from single_controller.ray.spec import (
    RayClassWithInitArgs,
    create_colocated_worker_cls,
    create_colocated_worker_cls_fused,
    create_colocated_worker_raw_cls,
)
from single_controller.ray.worker_group import get_random_string

__all__ = [
    "Colocated",
    "RayClassWithInitArgs",
    "RayResourcePool",
    "RayWorkerGroup",
    "ResourcePoolManager",
    "SubRayResourcePool",
    "colocate",
    "create_colocated_worker_cls",
    "create_colocated_worker_cls_fused",
    "create_colocated_worker_raw_cls",
    "extract_pg_from_exist",
    "get_random_string",
    "merge_resource_pool",
    "parallel_put",
    "pin",
    "sort_placement_group_by_node_ip",
    "split_resource_pool",
]
