"""The Ray cluster that an example runs on."""

from __future__ import annotations

import os

import ray

__all__ = ["connect"]


def connect(processes: int) -> None:
    """Use the cluster that this process is connected to or RAY_ADDRESS names, else start one here
    that has a logical CPU for each process.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="ERROR")
    else:
        cpus = max(processes, os.cpu_count() or 1)
        ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR")
