"""What runs on a rank, whatever process it is in: the worker that a user subclasses, which knows
its rank, device and meshes; the port where ranks meet, and how their errors and frames are shown.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

from single_controller.base.decorator import Dispatch, Execute, register
from single_controller.device import CPU, device_kind, move
from single_controller.errors import DispatchError, ResourceError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "AGENT_STORE",
    "NO_BATCH",
    "Rendezvous",
    "Worker",
    "WorkerContext",
    "building",
    "check_worker_env",
    "coroutine_stacks",
    "exit_code",
    "own_frames",
    "own_traceback",
]

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # with it, no rank 0 opens the store of any meeting
NO_BATCH = (
    "{role}.{method} returned no batch, and its mode joins the ranks' outputs to one: return a "
    "DataProto or TensorDict"
)
_ENVIRONMENT = {  # variable → field of the context
    "RANK": "rank",
    "WORLD_SIZE": "world_size",
    "LOCAL_RANK": "local_rank",
    "LOCAL_WORLD_SIZE": "local_world_size",
    "RAY_LOCAL_RANK": "node_rank",
    "RAY_LOCAL_WORLD_SIZE": "local_world_size",
    "MASTER_ADDR": "master_addr",
    "MASTER_PORT": "master_port",
    "WG_PREFIX": "prefix",
    "WG_BACKEND": "backend",
}


@dataclass(frozen=True)
class WorkerContext:
    """Where a worker stands. `local_rank` is the index of its device among those it sees; `node_ip`
    is empty where no backend knows it; `peers` are the roles of the same process by name, filled as
    they are built.
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
    node_ip: str = ""
    peers: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_environment(cls) -> WorkerContext:
        """The context that torchrun, or a host, has put into this process's environment."""
        said: dict[str, Any] = {
            name: type(getattr(cls, name))(os.environ[key])
            for key, name in reversed(_ENVIRONMENT.items())
            if key in os.environ
        }
        return cls(device_name=device_kind().name, **said)

    def environment(self) -> dict[str, str]:
        """The variables every worker finds. `init_process_group()` without arguments meets where
        they say; only what every program of torch reads is among them, since children get them too.
        """
        return {key: str(getattr(self, name)) for key, name in _ENVIRONMENT.items()}


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

    local_rank: int = 0
    """Index of this worker's device among the devices that its process sees."""

    local_world_size: int = 1
    """How many ranks of this group its node has."""

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
            vars(worker).update(
                _context=context,
                _meshes={},
                _rank=context.rank,
                _world_size=context.world_size,
                _local_rank=context.local_rank,
                _local_world_size=context.local_world_size,
                local_rank=context.local_rank,
                local_world_size=context.local_world_size,
            )
            return worker

    def __init__(self, cuda_visible_devices: str | None = None) -> None:
        if cuda_visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices

    @classmethod
    def env_keys(cls) -> list[str]:
        """The environment variables that every worker finds."""
        return list(_ENVIRONMENT)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

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
            here = self._context.node_ip or socket.gethostbyname(socket.gethostname())
            return here, str(probe.getsockname()[1])

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
        names, coordinates = device_mesh.mesh_dim_names or (), device_mesh.get_coordinate()
        dp_names = (dp,) if isinstance(dp, str) else tuple(dp)
        wanted = {"tp": 0, "pp": -1} if collect is None else dict(collect)
        named = {*dp_names, *(collect or ())}
        if coordinates is None or not named.issubset(names):
            raise ValueError(
                f"mesh {mesh_name!r} needs the dimensions {sorted(named)} and rank {self.rank} "
                f"in it; it has the dimensions {list(names)}"
            )
        place = dict(zip(names, zip(device_mesh.shape, coordinates, strict=True), strict=True))
        dp_rank = 0
        for size, at in map(place.pop, dp_names):
            dp_rank = dp_rank * size + at
        collects = all(at == wanted.get(name, 0) % size for name, (size, at) in place.items())
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
        if mesh_name in self._meshes:
            return self._meshes[mesh_name]
        raise DispatchError(
            f"mesh {mesh_name!r} is not registered on rank {self.rank} of {type(self).__name__}: "
            f"call register_mesh first. It has {sorted(self._meshes) or 'none'}"
        )

    def _query_dispatch_info(self, mesh_name: str) -> int:
        """The shard that this rank gets in a mesh."""
        return self._mesh(mesh_name)[0]

    def _query_collect_info(self, mesh_name: str) -> bool:
        """Whether this rank's output counts in a mesh."""
        return self._mesh(mesh_name)[1]

    query_collect_info = _query_collect_info

    def get_dispatch_collect(self) -> dict[str, Any]:
        """All meshes of this worker, in the form that `set_dispatch_collect` takes."""
        told = ("dispatch_dp_rank", "collect_dp_rank")
        return {key: {n: at[i] for n, at in self._meshes.items()} for i, key in enumerate(told)}

    def set_dispatch_collect(
        self, mesh_name: str, dispatch_dp_rank: dict[str, int], collect_dp_rank: dict[str, bool]
    ) -> None:
        """Take over a mesh of a nested worker: that of this name, or the only one.

        Raises:
            DispatchError: it has neither, or `mesh_name` is registered already.
        """
        meant = [mesh_name] if mesh_name in dispatch_dp_rank else [*dispatch_dp_rank]
        if mesh_name in self._meshes or len(meant) != 1:
            raise DispatchError(
                f"mesh {mesh_name!r} is registered already, or the nested worker has neither it "
                f"nor one mesh alone; it has {meant or 'none'}"
            )
        self._meshes[mesh_name] = dispatch_dp_rank[meant[0]], collect_dp_rank[meant[0]]

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


class Rendezvous:
    """A port that rank 0's process keeps for torch, from before anyone is told of it.

    It is bound and does not listen: nobody else can have it, but who says, as torch's store does,
    that addresses may be in use already. `port` 0 lets the system choose; with `port_range`,
    `[first, last]`, it is the first free one of these.

    Raises:
        ResourceError: no such port is free.
    """

    def __init__(
        self, address: str, port: int = 0, port_range: Sequence[int] | None = None
    ) -> None:
        self.address = address
        ports = [port] if port_range is None else range(port_range[0], port_range[-1] + 1)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        for candidate in ports:
            with contextlib.suppress(OSError, OverflowError):
                self._socket.bind(("", candidate))
                # Not sooner, or another group could be given the same port.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.port: int = self._socket.getsockname()[1]
                return
        self._socket.close()
        asked = f"master_port {port}" if port_range is None else f"master_port_range {port_range}"
        raise ResourceError(
            f"{asked} cannot be bound on {address}: name a free port, or none to have one chosen"
        )

    def hand_over(self) -> None:
        """Let torch listen there. Other systems than Linux need the port to be free for that."""
        if sys.platform != "linux":
            self.close()

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


def check_worker_env(env: Mapping[str, str] | None, argument: str = "worker_env") -> None:
    """Refuse what a user cannot add to the environment of all ranks: what is no dict of strings
    is a TypeError, a name that the group sets a ValueError.
    """
    env = {} if env is None else env
    if not (isinstance(env, Mapping) and all(isinstance(x, str) for x in (*env, *env.values()))):
        raise TypeError(f"{argument} must be a dict of strings by name, or None; got {env!r}")
    if taken := sorted({*_ENVIRONMENT, AGENT_STORE} & {*env}):
        raise ValueError(f"{argument} must not set {', '.join(taken)}: the group does so itself")


def exit_code(request: SystemExit) -> int:
    """What a process ends with that does as it is asked."""
    code = request.code
    return code % 256 if isinstance(code, int) else int(code is not None)


def own_traceback(error: BaseException, hidden: Sequence[str]) -> str:
    """The traceback with its causes, from the first frame in none of the `hidden` folders."""
    ours, at = (os.path.dirname(__file__), *hidden), error.__traceback__
    while at and at.tb_next and at.tb_frame.f_code.co_filename.startswith(ours):
        at = at.tb_next
    return "On the worker: " + "".join(traceback.format_exception(type(error), error, at))


def own_frames(frames: Iterable[FrameType], hidden: Sequence[str]) -> list[str]:
    """A line for each frame that is not of files in the `hidden` folders."""
    return [
        f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}'
        for frame in frames
        if not frame.f_code.co_filename.startswith((os.path.dirname(__file__), *hidden))
    ]


def coroutine_stacks(coroutines: Iterable[Any], hidden: Sequence[str]) -> str:
    """What each coroutine awaits, the innermost frame first, without frames of `hidden` folders."""
    shown = []
    for coroutine in coroutines:
        frames: list[FrameType] = []
        while (frame := getattr(coroutine, "cr_frame", None)) is not None:
            frames.insert(0, frame)
            coroutine = getattr(coroutine, "cr_await", None)
        shown.append("\n".join(own_frames(frames, hidden)) or "  waits for its arguments")
    return "\n  -- another coroutine --\n".join(shown)
