"""Bytes that reached a node from others, as its object store counts them: what is there now of
objects that another node sent. What is less than 100 kB travels within Ray's messages, uncounted.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import TestCase

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["counts", "received", "received_here"]

counts = hasattr(ray._raylet.CoreWorker, "log_plasma_usage")
"""Whether this Ray says what it has received; 2.41 does not."""


def received() -> dict[str, int]:
    """By the address of each living node, what is there from others. Held by those who hold
    references: of a call's arguments while it runs, of a future as long as it is not dropped.
    """
    look: Any = ray.remote(num_cpus=0)(received_here)
    refs = {}
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            refs[node["NodeManagerAddress"]] = look.options(scheduling_strategy=place).remote()
    return dict(zip(refs, ray.get(list(refs.values())), strict=True))


def received_here() -> int:
    """The same, of the node that this process is on."""
    worker: Any = ray._private.worker.global_worker.core_worker
    with TestCase().assertLogs("ray._raylet", "INFO") as told:
        worker.log_plasma_usage()
    (found,) = re.findall(r"bytes received: (\d+)", "\n".join(told.output))
    return int(found)
