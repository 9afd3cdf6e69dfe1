"""RayWorkerGroup: starts or attaches to hosts, and gives a group per role.

Processes are owned by `hosts`, a call on its way by `remote_batch`.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from single_controller.base.hosts import Hosts, allowed_restarts
from single_controller.base.roles import Colocate, W
from single_controller.base.worker_group import WorkerGroup
from single_controller.device import CPU
from single_controller.errors import RegistrationError
from single_controller.ray.hosts import RayHosts, end_when_dropped
from single_controller.ray.message import Packer
from single_controller.ray.placement import RayResourcePool, at_once, check_started
from single_controller.ray.remote_batch import send
from single_controller.ray.spec import RayClassWithInitArgs, create_colocated_worker_cls
from single_controller.ray.start import Recipe, running_names

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RayWorkerGroup", "colocate", "get_random_string"]


class RayWorkerGroup(WorkerGroup[W]):
    """A role's ranks in Ray actors.

    Made from a pool and a class, it starts one host per process of the pool. With the class of
    several roles (`create_colocated_worker_cls`), `spawn` gives the group of each role. With
    `worker_handles` or `worker_names` it attaches to running hosts. A context manager: leaving it
    closes the group.

    Args:
        resource_pool: where the hosts go.
        ray_cls_with_init: what they hold.
        bin_pack: each node's processes on one node (STRICT_PACK); False: PACK.
        name_prefix: of the actors' names; by default random.
        detached: the hosts outlive the driver.
        worker_names, worker_handles: running actors to attach to instead: all of a group, or by
            handles also workers of several groups, which are ranks in the order of the handles.
            `ray_cls_with_init` may be another class than theirs: it says which methods to call.
        ray_wait_register_center_timeout: veRL's name for `startup_timeout_s`.
        use_gpu: False is `device_name="cpu"`; otherwise it is as the pool says.
        device_name: "cuda", "cpu", …: by default what the pool's cluster has.
        worker_env: environment variables for all ranks, set before any library loads.
        master_addr, master_port, master_port_range: where `torch.distributed` meets; by default
            rank 0's node and a port that the system chooses.
        startup_timeout_s: how long the processes, with their runtime_env, and then the roles'
            constructors may take.
        call_timeout_s: how long each call may take, unless its method or the call itself says
            otherwise; None: for ever.
        on_failure: what a call on a broken group does: "raise", or "restart" the group first. The
            call that failed raises in any case, and is not repeated.
        max_restarts: how often "restart" does so.

    Raises:
        ResourceError: the cluster cannot hold the pool, or the pool one more group.
        RegistrationError: a class cannot be used as a worker.
        WorkerError: a constructor raised; it names role and rank.
        CallTimeoutError: a process did not start, or a constructor did not return, in time.
    """

    _packer = Packer
    _submit = staticmethod(send)  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        resource_pool: RayResourcePool | None = None,
        ray_cls_with_init: RayClassWithInitArgs[W] | None = None,
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
        super().__init__(resource_pool)
        self._check_options(name_prefix, worker_env, startup_timeout_s, call_timeout_s)
        allowed = allowed_restarts(on_failure, max_restarts)
        if resource_pool is None:
            hosts = Hosts(_attach(worker_names, worker_handles, startup_timeout_s))
        elif not isinstance(resource_pool, RayResourcePool):
            raise TypeError(f"resource_pool must be a RayResourcePool; got {resource_pool!r}")
        elif not isinstance(ray_cls_with_init, RayClassWithInitArgs):
            raise RegistrationError(
                "ray_cls_with_init must say what to start, as RayClassWithInitArgs(cls, ...) or "
                f"create_colocated_worker_cls(...); got {ray_cls_with_init!r}"
            )
        elif detached and not resource_pool.detached:
            raise ValueError(
                "detached=True needs a pool with detached=True: the group would die with the "
                "pool's reservation when this driver exits"
            )
        else:
            recipe = Recipe(
                resource_pool,
                ray_cls_with_init.actor_spec(),
                strategy="STRICT_PACK" if bin_pack else "PACK",
                device_name=CPU.name if use_gpu is False else device_name,
                prefix=name_prefix if name_prefix is not None else f"{get_random_string(6)}_",
                detached=detached,
                worker_env=worker_env,
                master_addr=master_addr,
                master_port=master_port,
                master_port_range=master_port_range,
                startup_timeout_s=startup_timeout_s,
            )
            hosts = Hosts(recipe.start(), partial(recipe.start, restored=True), allowed)
            if not detached:
                end_when_dropped(hosts)
        self._take(hosts, ray_cls_with_init)

    @classmethod
    def from_detached(
        cls,
        name_prefix: str | None = None,
        worker_names: Sequence[str] | None = None,
        worker_handles: Sequence[Any] | None = None,
        ray_cls_with_init: RayClassWithInitArgs[W] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A group on hosts that another driver started (in the same Ray namespace). Its `close()`
        also gives the detached reservation back, once no other group runs in it.

        Args:
            name_prefix: the prefix they were started with, to find them by; or
            worker_names, worker_handles: the actors' names or handles.
            ray_cls_with_init: what they hold.

        Raises:
            ValueError: there are no such actors, or they are not all ranks of one group.
        """
        if worker_names is None and worker_handles is None and name_prefix is not None:
            spec = ray_cls_with_init.actor_spec() if ray_cls_with_init else None
            worker_names = running_names(name_prefix, spec)
        return cls(
            None,
            ray_cls_with_init,
            name_prefix=name_prefix,
            worker_names=worker_names,
            worker_handles=worker_handles,
            **kwargs,
        )

    def _cluster(self) -> str:
        # The context of a Ray that was shut down would start another.
        return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""

    @property
    def device_name(self) -> str:
        """Torch's name of the kind of device that the ranks have."""
        return re.split(r"[: ]", self._hosts.now.infos[0].device)[0]

    @property
    def workers(self) -> list[Any]:
        """The hosts' actor handles by rank."""
        return list(self._hosts.now.handles)

    @property
    def worker_names(self) -> list[str]:
        """The hosts' actor names by rank, for `from_detached`."""
        return list(self._hosts.now.names)


def get_random_string(length: int) -> str:
    """So many letters and digits, other ones each time, also after `random.seed`."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


def _attach(
    names: Sequence[str] | None, handles: Sequence[Any] | None, timeout_s: float
) -> RayHosts:
    check_started()
    if not handles and not names:
        raise ValueError(
            "a group needs a resource_pool to start on, or worker_names or worker_handles of "
            "running hosts; none was found"
        )
    handles = handles or at_once(ray.get_actor, names or ())
    return RayHosts.attach(handles, names or [], timeout_s)


colocate = Colocate(RayWorkerGroup, create_colocated_worker_cls)
"""Start one process per process of the pool, each with every role in it: see `Colocate`."""
