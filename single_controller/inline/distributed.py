"""`torch.distributed` as each rank sees it, though all ranks share one process.

While a rank's code runs, torch's record of process groups is that rank's own. Groups of one rank
are real. Groups of several know their ranks, so that meshes can be built, and refuse to
communicate: ranks run one after another, and would wait for each other for ever.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

from single_controller.base.rendezvous import OnImport
from single_controller.errors import CollectiveError

__all__ = ["RankWorld"]

_C10D = "torch.distributed.distributed_c10d"
_BACKEND = "inline"
_COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
_labels = itertools.count()


class RankWorld:
    """One rank's process groups. Entered while the rank's code runs, and left after it."""

    def __init__(self) -> None:
        self._groups: Any = None
        self._excepthook: Any = None
        self._asked: Any = None  # the backend that the worker wanted
        self._label = f"{_BACKEND}{next(_labels)}"
        self._outside: tuple[Any, ...] | None = None
        self._finder: OnImport | None = None

    def enter(self) -> None:
        c10d = sys.modules.get(_C10D)
        if c10d is None:
            self._finder = OnImport(_C10D, self._swap_in)
            sys.meta_path.insert(0, self._finder)
        else:
            self._swap_in(c10d)

    def leave(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        if self._outside is not None:
            c10d: Any = sys.modules[_C10D]
            self._groups, self._excepthook = c10d._world, sys.excepthook
            c10d._world, c10d.rendezvous, c10d._new_process_group_helper, sys.excepthook = (
                self._outside
            )
            self._outside = None

    def close(self) -> None:
        """End the rank's process groups."""
        if self._groups is not None and self._groups.default_pg is not None:
            self.enter()
            try:
                sys.modules[_C10D].destroy_process_group()
            finally:
                self.leave()
        self._groups = None

    def _swap_in(self, c10d: Any) -> None:
        helper = c10d._new_process_group_helper
        self._outside = (c10d._world, c10d.rendezvous, helper, sys.excepthook)
        if self._groups is None:
            self._groups = _no_groups()
        if self._excepthook is not None:
            sys.excepthook = self._excepthook
        c10d._world, c10d.rendezvous = self._groups, _rendezvous
        c10d._new_process_group_helper = functools.partial(self._new_group, helper)

    def _new_group(
        self,
        helper: Any,
        group_size: int,
        group_rank: int,
        global_ranks: list[int],
        backend: Any,
        store: Any,
        group_name: str,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """As torch's own function of that name; its registry of names is one for all ranks."""
        if group_size > 1:
            self._asked = self._asked or backend
            backend, rest = _refusing_backend(), ()
            kept = ("timeout", "pg_tag", "group_desc")
            options = {key: value for key, value in options.items() if key in kept}
        elif backend == _BACKEND:  # taken over from the group of all ranks
            backend = self._asked
        name = f"{self._label}/{group_name}"
        return helper(group_size, group_rank, global_ranks, backend, store, name, *rest, **options)


def _no_groups() -> SimpleNamespace:
    """A fresh record, as torch keeps one for the process."""
    return SimpleNamespace(
        default_pg=None,
        pg_map={},
        pg_names={},
        pg_group_ranks={},
        pg_backend_config={},
        group_count=0,
        tags_to_pg={},
        pg_to_tag={},
        pg_coalesce_state={},
        comms=[],
    )


def _rendezvous(
    url: str, rank: int = -1, world_size: int = -1, **_: Any
) -> Iterator[tuple[Any, int, int]]:
    """Meet nobody: there is no other process, and other ranks cannot answer."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    yield (
        HashStore(),
        rank if rank >= 0 else int(os.environ["RANK"]),
        world_size if world_size >= 0 else int(os.environ["WORLD_SIZE"]),
    )


@functools.cache
def _refusing_backend() -> Any:
    """The backend of groups that cannot communicate, made known to torch on first use."""
    from torch import distributed as dist

    members: dict[str, Any] = {name: _refusal(name) for name in _COLLECTIVES}
    members["getBackendName"] = lambda group: _BACKEND
    members["group_name"] = property(lambda group: sys.modules[_C10D]._world.pg_names[group])
    members["group_desc"] = property(lambda group: "ranks of an inline group")
    refusing: Any = type("InlineProcessGroup", (dist.ProcessGroup,), members)

    def create(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return refusing(rank, size)

    dist.Backend.register_backend(_BACKEND, create, devices=["cpu", "cuda"])
    return dist.Backend(_BACKEND)


def _refusal(name: str) -> Any:
    def refuse(group: Any, *_: Any, **__: Any) -> NoReturn:
        raise CollectiveError(
            f"{name.strip('_')} needs {group.size()} ranks at once, and ranks of an inline group "
            "run one after another in this process: test it with one rank, or run it on Ray"
        )

    return refuse
