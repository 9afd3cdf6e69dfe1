"""RayWorkerGroup: starts or attaches to hosts, gives a group per role, sends calls to them.

Processes are owned by `hosts`, a call on its way by `calls`.
"""

from __future__ import annotations

import math
import re
import secrets
import string
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from single_controller import checks
from single_controller.base.explain import Carrier
from single_controller.base.host_group import HostGroup
from single_controller.base.method import CallOptions, Pending
from single_controller.base.plan import Call
from single_controller.base.recorder import CallRecord
from single_controller.base.registered import Transport
from single_controller.base.roles import W, check_constructors
from single_controller.base.rows import padding_setting
from single_controller.base.supervisor import RestartPolicy
from single_controller.device import CPU
from single_controller.errors import RegistrationError, WorkerDiedError
from single_controller.ray.actor_spec import RayClassWithInitArgs
from single_controller.ray.calls import RayPending
from single_controller.ray.envelope import Envelope, sealed
from single_controller.ray.hosts import Hosts
from single_controller.ray.lease import Limit, Publication
from single_controller.ray.outbox import Outbox
from single_controller.ray.parcel import pickles
from single_controller.ray.placement import RayResourcePool, check_started
from single_controller.ray.routes import route
from single_controller.ray.start import Recipe, StartOptions, running_names
from single_controller.ray.supervisor import RaySupervisor
from single_controller.ray.tracing import mark

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RayWorkerGroup", "get_random_string"]

_LOOK_S = 1.0  # how long a call that is waited for waits for the rows it reads before it is sent


class RayWorkerGroup(HostGroup[W]):
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
        RegistrationError: a class cannot be used as a worker, or not with these arguments.
        WorkerError: a constructor raised; it names role and rank.
        CallTimeoutError: a process did not start, or a constructor did not return, in time.
    """

    _supervisor: RaySupervisor  # pyright: ignore[reportIncompatibleVariableOverride]

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
        super().__init__(resource_pool, name_prefix, worker_env, startup_timeout_s, call_timeout_s)
        pools = (RayResourcePool, type(None))
        checks.instance(pools, "resource_pool", resource_pool, "a RayResourcePool, or None")
        policy = RestartPolicy(on_failure, max_restarts)
        recipe = None
        if resource_pool is None:
            hosts = _attach(worker_names, worker_handles, startup_timeout_s)
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
            options = StartOptions(
                prefix=name_prefix if name_prefix is not None else f"{get_random_string(6)}_",
                detached=detached,
                worker_env=worker_env,
                master_addr=master_addr,
                master_port=master_port,
                master_port_range=master_port_range,
                placement_timeout_s=resource_pool.placement_timeout_s,
                startup_timeout_s=startup_timeout_s,
            )
            strategy = "STRICT_PACK" if bin_pack else "PACK"
            spec = ray_cls_with_init.actor_spec()
            check_constructors(spec.roles)
            device = CPU.name if use_gpu is False else device_name
            recipe = Recipe(resource_pool, strategy, device, spec, options)
            hosts = recipe.start()
        supervisor = RaySupervisor(hosts, recipe, policy)
        self._start(supervisor, resource_pool, ray_cls_with_init, call_timeout_s)

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

    @property
    def _hosts(self) -> Hosts:
        return self._supervisor.hosts

    def _cluster(self) -> str:
        # The context of a Ray that was shut down would start another.
        return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""

    @property
    def device_name(self) -> str:
        """Torch's name of the kind of device that the ranks have."""
        return re.split(r"[: ]", self._hosts.infos[0].device)[0]

    @property
    def workers(self) -> list[Any]:
        """The hosts' actor handles by rank."""
        return list(self._hosts.handles)

    @property
    def worker_names(self) -> list[str]:
        """The hosts' actor names by rank, for `from_detached`."""
        return list(self._hosts.names)

    def _submit(
        self,
        hosts: Hosts,
        method: str,
        calls: Sequence[Call | None],
        answers: Sequence[int],
        options: CallOptions,
        *,
        record: CallRecord,
        materialize: bool = True,
        reads_only: bool = False,
        deferred: bool = False,
        awaited: bool = False,
        transport: Transport = "host",
    ) -> Pending:
        hosts.check_current()
        began = time.monotonic()
        timeout_s = self.call_timeout_s if options.timeout_s is None else options.timeout_s
        if timeout_s is not None and math.isinf(timeout_s):
            timeout_s = None
        wait_s = min(_LOOK_S, _LOOK_S if timeout_s is None else timeout_s) if awaited else 0
        count = partial(record.count, "bytes_out")
        outbox = Outbox(calls, reads_only, count, late=not hosts.ordered)
        outbox.pack()  # what cannot be sent is known before anything is, and the rows meanwhile
        routes = route(calls, hosts, materialize, wait_s)
        # Before any is sent: ranks whose peers get no call would wait for them.
        different = {id(call): call for call in calls if call is not None}
        packed = {key: outbox.outgoing(call, routes.offers) for key, call in different.items()}
        answering = set(answers)
        token = uuid.uuid4().hex if deferred else ""
        # Whether calls of ranks that get the same values are one.
        alike = hosts.ordered and not (deferred or routes.claims or record.number)
        sites, turns = [], {}
        published: dict[int, Publication] = {}
        padding = padding_setting()
        places, callables = hosts.sites(self.role, method), hosts.callables(self.role, method)
        shared: Call | None = None  # the call of the rank before, and what was made for it
        answered = False
        sent: tuple[Any, ...] = ()
        with hosts.sending_a_call() as refs:
            for rank, call in enumerate(calls):
                if call is None:
                    continue
                turn, answer = hosts.turn(rank), rank in answering
                keeps = f"{token}:{rank}" if deferred and answer else None
                publishes = hosts.read_elsewhere.get((self.role, method, rank)) if keeps else None
                if not (alike and call is shared and answer == answered):
                    shared, answered = call, answer
                    values, parcels = packed[id(call)]
                    envelope = Envelope(
                        role=self.role,
                        method=method,
                        values=values,
                        names=tuple(call.kwargs),
                        materialize=materialize,
                        reads_only=reads_only,
                        answers=answer,
                        turn=turn,
                        keeps=keeps,
                        publishes=publishes,
                        claims=routes.claims.get(rank, ()),
                        mark=mark(record, hosts),
                        padding=padding,
                    )
                    letter = sealed(envelope)
                    sent = () if letter is None else (letter, *parcels)
                if publishes is None:
                    refs.append(callables[rank].remote(*sent))
                else:
                    ref, batch, size = hosts.callables(self.role, method, 3)[rank].remote(*sent)
                    refs.append(ref)
                    published[rank] = Publication(batch, size, publishes)
                if turn is not None:
                    turns[rank] = turn
                sites.append(places[rank])
        routes.sent({site.rank: ref for site, ref in zip(sites, refs, strict=True)})
        limit = Limit(timeout_s, None if timeout_s is None else began + timeout_s)
        lends = transport == "device"
        return RayPending(
            hosts, sites, refs, turns, answers, limit, record, token, lends, published
        )

    def _carrier(self, calls: Sequence[Call | None]) -> Carrier:
        return Outbox(calls)

    def _pickles(self, value: Any) -> object:
        return pickles(value)

    def stacks(self) -> dict[int, str]:
        """By rank, the Python stack of each thread that runs the worker's code, now; also of
        ranks that are stuck in C code or in a collective.
        """
        return self._hosts.stacks()

    def start_worker_aliveness_check(
        self,
        every_n_seconds: float = 1,
        on_death: Callable[[WorkerDiedError], object] | None = None,
    ) -> None:
        """Look every so often, in a thread, whether all processes live. After a death, that is
        logged, `on_death` is called with it, in that thread, and calls raise GroupBrokenError at
        once (or restart the group, with `on_failure="restart"`). What `on_death` raises is logged.

        Raises:
            ValueError: `every_n_seconds` is not above 0. TypeError: `on_death` is no function.
        """
        self._supervisor.watch(every_n_seconds, on_death)


def get_random_string(length: int) -> str:
    """So many letters and digits, other ones each time, also after `random.seed`."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


def _attach(names: Sequence[str] | None, handles: Sequence[Any] | None, timeout_s: float) -> Hosts:
    check_started()
    if not handles:
        if not names:
            raise ValueError(
                "a group needs a resource_pool to start on, or worker_names or worker_handles of "
                "running hosts; none was found"
            )
        handles = [ray.get_actor(name) for name in names]
    return Hosts.attach(handles, names or [], timeout_s)
