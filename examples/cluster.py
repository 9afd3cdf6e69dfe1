"""The Ray cluster that an example runs on, and how it asks for a place there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import ray

__all__ = ["chosen_strategy", "connect"]


def connect(processes: int) -> bool:
    """Use the cluster that this process is connected to or RAY_ADDRESS names, else start one here
    that has a logical CPU for each process.

    Returns:
        Whether the cluster has a GPU for each process.
    """
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level="ERROR")
        else:
            cpus = max(processes, os.cpu_count() or 1)
            ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR")
    return bool(ray.cluster_resources().get("GPU", 0) >= processes)


def chosen_strategy(about: str, arguments: Sequence[str] | None) -> str:
    """Which of Ray's ways to lay bundles on nodes a command line asks for."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(
        "--strategy",
        choices=["STRICT_PACK", "PACK", "SPREAD"],
        default="STRICT_PACK",
        help="all processes on one node, few nodes, or many (default STRICT_PACK)",
    )
    return str(parser.parse_args(arguments).strategy)
