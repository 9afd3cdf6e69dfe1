"""Values put into Ray's object store, several at a time. Arguments of calls need none of this."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from single_controller import checks
from single_controller.ray.placement import check_started

__all__ = ["parallel_put"]


def parallel_put(data_list: Sequence[Any], max_workers: int | None = None) -> list[Any]:
    """`ray.put` each value, in threads; the references in the same order.

    Raises:
        TypeError: `data_list` is no list. ResourceError: Ray has not been started.
    """
    checks.instance(Collection, "data_list", data_list, "a list of values")
    check_started()
    workers = max_workers or min(len(data_list) or 1, os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(ray.put, data_list))
