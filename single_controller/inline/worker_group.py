"""InlineWorkerGroup: a role's ranks as objects of this process, called as on Ray.

Ranks are owned by `hosts`, a call by `calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from single_controller import checks
from single_controller.base.host_group import HostGroup
from single_controller.base.method import CallOptions, Pending
from single_controller.base.plan import Call
from single_controller.base.recorder import CallRecord
from single_controller.base.registered import Transport
from single_controller.base.resource_pool import ResourcePool
from single_controller.base.roles import ClassWithInitArgs, W, check_constructors
from single_controller.base.supervisor import RestartPolicy, Supervisor, check_watch
from single_controller.device import CPU
from single_controller.errors import (
    RegistrationError,
    SendError,
    SingleControllerError,
    WorkerDiedError,
)
from single_controller.inline.calls import Arguments, send
from single_controller.inline.hosts import InlineHosts
from single_controller.inline.privacy import Package

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["InlineWorkerGroup"]

_NO_ATTACHING = (
    "worker_names, worker_handles and from_detached find running Ray actors; an inline group lives "
    "in this process alone, and has none to attach to"
)


class InlineWorkerGroup(HostGroup[W]):
    """A role's ranks in the driver's own process, for debuggers and unit tests.

    It takes what `RayWorkerGroup` takes and does what that does, without Ray: ranks run one after
    another, in the thread that calls, so `breakpoint()` in a worker's method works. What a rank
    gets and returns is copied as between processes; classes and functions are passed as they are.
    `torch.distributed` works with one rank; with more, meshes can be built, and a collective
    raises CollectiveError. Ctrl-C interrupts the driver.

    Args:
        resource_pool: how many ranks on how many nodes, which all are this one; None: one rank.
        ray_cls_with_init: what they hold.
        name_prefix: the workers' WG_PREFIX.
        use_gpu: False is `device_name="cpu"`.
        device_name: "cuda", "cpu", …: by default what torch sees, where torch is loaded already.
        worker_env: environment variables for all ranks, there while their code runs.
        master_port, master_port_range: the workers' MASTER_PORT; nobody listens there.
        call_timeout_s: how long an `async def` method may take; others end when they end.
        on_failure, max_restarts: as on Ray; what breaks a group is a rank that exits.
        bin_pack, detached, ray_wait_register_center_timeout, master_addr, startup_timeout_s:
            without meaning here, and taken so that a program can be switched.
        worker_names, worker_handles: refused, there being nothing to attach to.

    Raises:
        RegistrationError: a class cannot be used as a worker, or not with these arguments.
        WorkerError: a constructor raised; it names role and rank.
        ResourceError: `master_port` is taken.
    """

    _supervisor: _Supervisor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        resource_pool: ResourcePool | None = None,
        ray_cls_with_init: ClassWithInitArgs[W] | None = None,
        bin_pack: bool = True,
        name_prefix: str | None = None,
        detached: bool = False,
        worker_names: Sequence[str] | None = None,
        worker_handles: Sequence[Any] | None = None,
        ray_wait_register_center_timeout: float | None = None,
        *,
        use_gpu: bool | None = None,
        device_name: str | None = None,
        worker_env: Mapping[str, str] | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        master_port_range: Sequence[int] | None = None,
        startup_timeout_s: float = 600,
        call_timeout_s: float | None = None,
        on_failure: str = "raise",
        max_restarts: int = 3,
    ) -> None:
        startup_timeout_s = ray_wait_register_center_timeout or startup_timeout_s
        super().__init__(resource_pool, name_prefix, worker_env, startup_timeout_s, call_timeout_s)
        policy = RestartPolicy(on_failure, max_restarts)
        if worker_names or worker_handles:
            raise ValueError(_NO_ATTACHING)
        if not isinstance(ray_cls_with_init, ClassWithInitArgs):
            raise RegistrationError(
                "ray_cls_with_init must say what to start, as ClassWithInitArgs(cls, ...) or "
                f"create_colocated_worker_cls(...); got {ray_cls_with_init!r}"
            )
        pool = ResourcePool([1]) if resource_pool is None else resource_pool
        checks.instance(ResourcePool, "resource_pool", pool, "a ResourcePool, or None")
        if not pool.world_size:
            raise ValueError("process_on_nodes must name the processes of at least one node")
        roles = ray_cls_with_init.roles()
        check_constructors(roles)
        start = partial(
            InlineHosts,
            pool,
            roles,
            dict(worker_env or {}),
            name_prefix or "",
            CPU.name if use_gpu is False else device_name,
            master_port or 0,
            master_port_range,
        )
        supervisor = _Supervisor(start(), partial(start, restored=True), policy)
        self._start(supervisor, resource_pool, ray_cls_with_init, call_timeout_s)

    @classmethod
    def from_detached(cls, *_: Any, **__: Any) -> Self:
        """Refused: an inline group ends with its driver.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_ATTACHING)

    @property
    def _hosts(self) -> InlineHosts:
        return self._supervisor.hosts

    @property
    def workers(self) -> list[W]:
        """The role's workers by rank: the very objects, to look at. For the hosts of several
        roles, a dict of them by role.
        """
        ranks = self._hosts.ranks
        workers: list[Any] = [
            rank.workers[self.role] if self.role else dict(rank.workers) for rank in ranks
        ]
        return workers

    @property
    def worker_names(self) -> list[str]:
        """As on Ray, a name for each rank."""
        label = "_".join(self._hosts.roles)
        return [f"{rank.context.prefix}{label}_0:{i}" for i, rank in enumerate(self._hosts.ranks)]

    def stacks(self) -> dict[int, str]:
        """By rank, the Python stack of the thread that runs the worker's code, now, and of its
        `async def` methods that wait.
        """
        return {rank.context.rank: rank.stack() for rank in self._hosts.ranks}

    def start_worker_aliveness_check(
        self,
        every_n_seconds: float = 1,
        on_death: Callable[[WorkerDiedError], object] | None = None,
    ) -> None:
        """Have `on_death` called once a rank has asked for the end of its process; there is nothing
        to look for every so often. What `on_death` raises is logged.

        Raises:
            ValueError: `every_n_seconds` is not above 0. TypeError: `on_death` is no function.
        """
        check_watch(every_n_seconds, on_death)
        if on_death is not None:
            self._supervisor.watch(on_death)

    def _submit(
        self,
        hosts: InlineHosts,
        method: str,
        calls: Sequence[Call | None],
        answers: Sequence[int],
        options: CallOptions,
        *,
        record: CallRecord,
        materialize: bool = True,
        reads_only: bool = False,
        transport: Transport = "host",
        deferred: bool = False,
        awaited: bool = False,
    ) -> Pending:
        timeout_s = self.call_timeout_s if options.timeout_s is None else options.timeout_s
        arguments = Arguments(materialize, reads_only)
        hosts.check_current()
        try:
            return send(hosts, self.role, method, calls, answers, arguments, timeout_s)
        except SingleControllerError:
            raise
        except Exception as error:
            raise SendError(f"its arguments cannot be sent: {error}") from error

    def _pickles(self, value: Any) -> object:
        return Package(value)


class _Supervisor(Supervisor[InlineHosts]):
    """Tells whoever asked of a rank's end, also after a restart."""

    def restart(self) -> None:
        told = self.hosts.on_death
        super().restart()
        self.hosts.on_death = told

    def watch(self, on_death: Callable[[WorkerDiedError], object]) -> None:
        self.hosts.on_death.append(on_death)
