"""Worker: what a user subclasses; it knows which rank it is, on which device, in which mesh."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from single_controller import checks
from single_controller.base.decorator import Dispatch, Execute, register
from single_controller.base.residency import move
from single_controller.device import CPU, device_kind
from single_controller.errors import DispatchError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["AGENT_STORE", "Worker", "WorkerContext", "building", "check_worker_env"]

_ENV_KEYS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "RAY_LOCAL_RANK",
    "RAY_LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WG_PREFIX",
    "WG_BACKEND",
)
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # with it, no rank 0 opens the store of any meeting


@dataclass(frozen=True)
class WorkerContext:
    """Where a worker stands. `local_rank` is the index of its device among those it sees;
    `peers` are the roles of the same process by name, filled as they are built.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    device_name: str = "cpu"
    prefix: str = ""
    backend: str = ""
    peers: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_environment(cls) -> WorkerContext:
        """The context that torchrun, or a host, has put into this process's environment."""
        env = os.environ.get
        return cls(
            rank=int(env("RANK", "0")),
            world_size=int(env("WORLD_SIZE", "1")),
            local_rank=int(env("LOCAL_RANK", "0")),
            local_world_size=int(env("LOCAL_WORLD_SIZE", "1")),
            node_rank=int(env("RAY_LOCAL_RANK", "0")),
            master_addr=env("MASTER_ADDR", ""),
            master_port=int(env("MASTER_PORT", "0")),
            device_name=device_kind().name,
            prefix=env("WG_PREFIX", ""),
            backend=env("WG_BACKEND", ""),
        )

    def environment(self) -> dict[str, str]:
        """The variables every worker finds. `init_process_group()` without arguments meets where
        they say; only what every program of torch reads is among them, since children get them too.
        """
        values = (
            self.rank,
            self.world_size,
            self.local_rank,
            self.local_world_size,
            self.node_rank,
            self.local_world_size,
            self.master_addr,
            self.master_port,
            self.prefix,
            self.backend,
        )
        return {key: str(value) for key, value in zip(_ENV_KEYS, values, strict=True)}


_building: ContextVar[WorkerContext | None] = ContextVar("building", default=None)


@contextlib.contextmanager
def building(context: WorkerContext) -> Generator[None, None, None]:
    """Workers constructed inside get `context`, also those that a worker constructs itself."""
    token = _building.set(context)
    try:
        yield
    finally:
        _building.reset(token)


class Worker:
    """One rank's part of a role. Subclass it, and mark methods with `register`.

    The process's place is known from the start of `__init__`, whether or not a subclass calls
    `super().__init__()`.
    """

    takes_turns: bool = False
    """Whether this role leaves the device while another such role of its process is called, for
    roles that do not fit together: then `offload` and `onload` go around calls. May be set by
    `__init__`, too. Needs a process whose roles have no `async def` method."""

    _context: WorkerContext
    _rank: int  # these four are read by programs that were written for veRL
    _world_size: int
    _local_rank: int
    _local_world_size: int
    _meshes: dict[str, tuple[int, bool]]

    if not TYPE_CHECKING:  # or type checkers would take its parameters for the constructor's

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            worker = super().__new__(cls)
            context = _building.get() or WorkerContext.from_environment()
            worker._context = context
            worker._rank, worker._world_size = context.rank, context.world_size
            worker._local_rank = context.local_rank
            worker._local_world_size = context.local_world_size
            worker._meshes = {}
            return worker

    def __init__(self, cuda_visible_devices: str | None = None) -> None:
        if cuda_visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices

    @classmethod
    def env_keys(cls) -> list[str]:
        """The environment variables that every worker finds."""
        return list(_ENV_KEYS)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @cached_property  # may be assigned, as veRL's programs do
    def local_rank(self) -> int:
        """Index of this worker's device among the devices that its process sees."""
        return self._local_rank

    @cached_property
    def local_world_size(self) -> int:
        """How many ranks of this group its node has."""
        return self._local_world_size

    @cached_property
    def device(self) -> torch.device:
        """The device this rank was given, `cpu` without an accelerator."""
        import torch

        name = self._context.device_name
        return torch.device(name) if name == CPU.name else torch.device(name, self.local_rank)

    def offload(self) -> None:
        """Leave the device: modules and optimizers among the attributes go to the CPU.

        Override it, and `onload`, for an engine that has ways of its own.
        """
        move(self, CPU.name)

    def onload(self) -> None:
        """Come back to the device."""
        move(self, self.device)

    def get_master_addr_port(self) -> tuple[str, str]:
        """Where `torch.distributed` of this group meets, as it stands in the environment."""
        return self._context.master_addr, str(self._context.master_port)

    def get_available_master_addr_port(self) -> tuple[str, str]:
        """This node's address and a port that was free a moment ago, for a rendezvous of the
        user's own. Another program may take it; the group's own rendezvous has no such gap.
        """
        with socket.socket() as probe:
            probe.bind(("", 0))
            return _node_ip(), str(probe.getsockname()[1])

    get_availale_master_addr_port = get_available_master_addr_port  # veRL's spelling

    def get_cuda_visible_devices(self) -> str:
        """What CUDA_VISIBLE_DEVICES says in this process; "not set" where it says nothing."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "not set")

    @property
    def fused_worker_dict(self) -> dict[str, Any]:
        """The roles in this process by name, this one included."""
        return self._context.peers

    def get_fused_worker_by_name(self, worker_name: str) -> Any:
        """The worker of another role in this process; None if there is no such role."""
        return self._context.peers.get(worker_name)

    def register_mesh(
        self,
        device_mesh: DeviceMesh,
        dp: str | tuple[str, ...] = "dp",
        collect: Mapping[str, int] | None = None,
        mesh_name: str = "default",
    ) -> None:
        """Tell the driver where this rank stands in `device_mesh`.

        Args:
            device_mesh: with named dimensions, over all ranks of the group.
            dp: the dimension (or several, outer first) that shards of a batch go along.
            collect: for each other dimension, the coordinate whose output counts, -1 for the
                last. Default `{"tp": 0, "pp": -1}`; dimensions not named count at 0.
            mesh_name: what `make_nd_compute_dataproto_dispatch_fn` calls it.

        Raises:
            ValueError: the mesh has no such dimension, or this rank is not in it.
        """
        names = device_mesh.mesh_dim_names or ()
        coordinates = device_mesh.get_coordinate()
        dp_names = (dp,) if isinstance(dp, str) else tuple(dp)
        wanted = {"tp": 0, "pp": -1} if collect is None else dict(collect)
        named = {*dp_names, *(collect or ())}
        if coordinates is None or not named.issubset(names):
            raise ValueError(
                f"mesh {mesh_name!r} needs the dimensions {sorted(named)} and rank {self.rank} "
                f"in it; it has the dimensions {list(names)}"
            )
        dp_rank, collects = 0, True
        for name, size, at in zip(names, device_mesh.shape, coordinates, strict=True):
            if name not in dp_names and at != wanted.get(name, 0) % size:
                collects = False
        for name in dp_names:
            axis = names.index(name)
            dp_rank = dp_rank * device_mesh.shape[axis] + coordinates[axis]
        self._register_dispatch_collect_info(mesh_name, dp_rank, collects)

    def _register_dispatch_collect_info(
        self, mesh_name: str, dp_rank: int, is_collect: bool
    ) -> None:
        """Tell the driver which shard this rank gets in a mesh and whether its output counts."""
        if mesh_name in self._meshes and self._meshes[mesh_name] != (dp_rank, is_collect):
            raise ValueError(
                f"mesh {mesh_name!r} is registered already on rank {self.rank}, as (dp_rank, "
                f"is_collect) = {self._meshes[mesh_name]}; got {(dp_rank, is_collect)}"
            )
        self._meshes[mesh_name] = (dp_rank, is_collect)

    def _mesh(self, mesh_name: str) -> tuple[int, bool]:
        if mesh_name not in self._meshes:
            raise DispatchError(
                f"mesh {mesh_name!r} is not registered on rank {self.rank} of "
                f"{type(self).__name__}; registered: {sorted(self._meshes) or 'none'}. Call "
                "register_mesh, or _register_dispatch_collect_info, before the first call"
            )
        return self._meshes[mesh_name]

    def _query_dispatch_info(self, mesh_name: str) -> int:
        """The shard that this rank gets in a mesh."""
        return self._mesh(mesh_name)[0]

    def _query_collect_info(self, mesh_name: str) -> bool:
        """Whether this rank's output counts in a mesh."""
        return self._mesh(mesh_name)[1]

    def query_collect_info(self, mesh_name: str) -> bool:
        """Whether this rank's output counts in a mesh."""
        return self._query_collect_info(mesh_name)

    def get_dispatch_collect(self) -> dict[str, Any]:
        """All meshes of this worker, in the form that `set_dispatch_collect` takes."""
        return {
            "dispatch_dp_rank": {name: mesh[0] for name, mesh in self._meshes.items()},
            "collect_dp_rank": {name: mesh[1] for name, mesh in self._meshes.items()},
        }

    def set_dispatch_collect(
        self, mesh_name: str, dispatch_dp_rank: dict[str, int], collect_dp_rank: dict[str, bool]
    ) -> None:
        """Take over the meshes of a nested worker, `mesh_name` among them.

        Raises:
            DispatchError: `mesh_name` is registered already, or the nested worker lacks a mesh.
            ValueError: another mesh is registered already, with other values.
        """
        if mesh_name in self._meshes:
            raise DispatchError(f"mesh {mesh_name!r} is registered already")
        if mesh_name not in dispatch_dp_rank and len(dispatch_dp_rank) == len(collect_dp_rank) == 1:
            dispatch_dp_rank = {mesh_name: next(iter(dispatch_dp_rank.values()))}
            collect_dp_rank = {mesh_name: next(iter(collect_dp_rank.values()))}
        names = [*dict.fromkeys([mesh_name, *dispatch_dp_rank])]
        if lost := [n for n in names if n not in dispatch_dp_rank or n not in collect_dp_rank]:
            raise DispatchError(
                f"meshes {lost} need a dp rank and whether they collect; got dispatch_dp_rank="
                f"{dispatch_dp_rank} and collect_dp_rank={collect_dp_rank}. Register them in the "
                "nested worker first"
            )
        for name in names:
            self._register_dispatch_collect_info(
                name, dispatch_dp_rank[name], collect_dp_rank[name]
            )

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO_WITH_FUNC)
    def execute_with_func_generator(
        self, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run `func(self, *args, **kwargs)` on this rank."""
        return func(self, *args, **kwargs)

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def execute_func_rank_zero(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `func(*args, **kwargs)` on rank 0."""
        return func(*args, **kwargs)


def check_worker_env(env: Mapping[str, str] | None, argument: str = "worker_env") -> None:
    """Refuse what a user cannot add to the environment of all ranks.

    Raises:
        ValueError: it sets what the group sets. TypeError: it is no dict of strings.
    """
    wanted = "a dict of strings by name, or None"
    env = env or {}
    checks.instance(Mapping, argument, env, wanted)
    for name, value in env.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(f"{argument} must be {wanted}; got {name!r}: {value!r}")
    if taken := sorted({*_ENV_KEYS, AGENT_STORE} & set(env)):
        raise ValueError(
            f"{argument} must not set {', '.join(taken)}: the group does, on each rank"
        )


def _node_ip() -> str:
    """The address that this node's packets leave from; asking sends none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
