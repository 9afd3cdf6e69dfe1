"""Processes per node as arithmetic; reserving anything is left to the backends."""

from __future__ import annotations

from collections.abc import Sequence

from single_controller import checks

__all__ = ["ResourcePool"]


class ResourcePool:
    """How many processes each node gets.

    Args:
        process_on_nodes: processes on node 0, 1, …; `[2, 4]` is six processes on two nodes.
        max_colocate_count: how many groups may share one process's resources.
        n_gpus_per_node: devices on each node, for programs that ask.

    Raises:
        ValueError: a count that is not a positive integer.
    """

    def __init__(
        self,
        process_on_nodes: Sequence[int] | None = None,
        max_colocate_count: int = 10,
        n_gpus_per_node: int = 8,
    ) -> None:
        self._store: list[int] = []
        if not isinstance(process_on_nodes, Sequence | None):
            raise ValueError(
                "process_on_nodes must list the processes of each node, such as [2]; "
                f"got {process_on_nodes!r}"
            )
        for count in process_on_nodes or ():
            self.add_node(count)
        checks.count("max_colocate_count", max_colocate_count)
        self.max_colocate_count = max_colocate_count
        self.n_gpus_per_node = n_gpus_per_node

    def add_node(self, process_count: int) -> None:
        """Append a node with `process_count` processes."""
        if not (checks.is_whole(process_count) and process_count >= 1):
            raise ValueError(
                "process_on_nodes must hold positive integers, one per node; "
                f"got {process_count!r} for node {len(self._store)}"
            )
        self._store.append(int(process_count))

    @property
    def store(self) -> list[int]:
        """Processes per node (a copy)."""
        return list(self._store)

    @property
    def world_size(self) -> int:
        return sum(self.store)

    def __call__(self) -> list[int]:
        return self.store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store})"

    def local_world_size_list(self) -> list[int]:
        """For each rank, how many ranks its node has: `[2, 1]` gives `[2, 2, 1]`."""
        return [count for count in self.store for _ in range(count)]

    def local_rank_list(self) -> list[int]:
        """For each rank, its index on its node: `[2, 1]` gives `[0, 1, 0]`."""
        return [rank for count in self.store for rank in range(count)]
