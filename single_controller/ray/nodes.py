"""Running a function beside the processes that it is about: here, or in a task on their node.

The functions are those of `process`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from single_controller.ray.process import ProcessInfo

__all__ = ["beside"]

T = TypeVar("T")


def beside(
    function: Callable[..., list[T]],
    processes: Sequence[ProcessInfo],
    timeout_s: float,
    **options: Any,
) -> list[T | None]:
    """`function(processes, **options)`, run on each one's own node with those of that node.

    Returns:
        One result for each process; None where its node did not answer within `timeout_s`.
    """
    results: list[T | None] = [None] * len(processes)
    here = ray.get_runtime_context().get_node_id()
    on_node: dict[str, list[int]] = {}
    for i, process in enumerate(processes):
        on_node.setdefault(process.node_id, []).append(i)
    local = on_node.pop(here, [])
    remote: Any = ray.remote(function)
    tasks = {}
    for node_id, indices in on_node.items():
        place = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=place)
        tasks[task.remote([processes[i] for i in indices], **options)] = indices
    done = [(local, function([processes[i] for i in local], **options))] if local else []
    waiting = list(tasks)
    if waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)
        for ref in ready:
            try:
                done.append((tasks[ref], ray.get(ref)))
            except Exception:
                continue  # the node is gone, and its results stay None
    for ref in waiting:
        ray.cancel(ref, force=True)
    for indices, found in done:
        for i, result in zip(indices, found, strict=True):
            results[i] = result
    return results
