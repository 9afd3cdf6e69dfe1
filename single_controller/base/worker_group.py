"""WorkerGroup: a role's methods on all its ranks, and the one pipeline that calls go through.

Starting hosts, moving arguments and waiting are left to the backends.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic

from single_controller.base.decorator import registered_methods
from single_controller.base.dispatch import Mode, OneToAll, RankZero
from single_controller.base.explain import Explanation, GroupTable, explain_arguments
from single_controller.base.hosts import Generation, Hosts
from single_controller.base.message import Message, Packer, not_sent
from single_controller.base.method import BoundMethod, MethodBinding, Pending, Request
from single_controller.base.plan import Call, Layout, Plan, ResourcePool, named_arguments
from single_controller.base.roles import ClassWithInitArgs, W, worker_class
from single_controller.base.trace import Recorder, StatsTable
from single_controller.base.worker import Worker, check_worker_env
from single_controller.errors import (
    RegistrationError,
    SendError,
    UnknownMethodError,
    WorkerDiedError,
    check_seconds,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClassWithInitArgs", "WorkerGroup", "check_workers_alive", "worker_class"]


class WorkerGroup(abc.ABC, Generic[W]):
    """All ranks of one role, called as if they were one local object.

    With the role "", it is the hosts of several roles. A context manager: leaving it closes the
    group, and all views on its hosts.

    Args:
        resource_pool: the processes per node; None for groups made from running workers.
    """

    role: str = ""
    ray_cls_with_init: ClassWithInitArgs | None = None
    call_timeout_s: float | None = None
    _packer: Packer
    _hosts: Hosts

    def __init__(self, resource_pool: ResourcePool | None = None, **kwargs: Any) -> None:
        self.resource_pool = resource_pool
        self._worker_cls: type[Worker] | None = None
        self._methods: dict[str, MethodBinding] = {}
        self._dispatch_info: dict[str, list[int]] = {}  # by mesh: each rank's data-parallel rank,
        self._collect_info: dict[str, list[bool]] = {}  # and whether its output counts
        self._recorder = Recorder()

    def _check_options(
        self,
        name_prefix: str | None,
        worker_env: Mapping[str, str] | None,
        startup_timeout_s: float | None,
        call_timeout_s: float | None,
    ) -> None:
        """Refuse options that would fail on their first use.

        Raises:
            ValueError: no time, or a variable that each rank gets its own of.
            TypeError: no string, or no dict of strings.
        """
        if not isinstance(name_prefix, str | None):
            raise TypeError(f"name_prefix must be a string, or None; got {name_prefix!r}")
        check_seconds("startup_timeout_s", startup_timeout_s)
        check_seconds("call_timeout_s", call_timeout_s)
        check_worker_env(worker_env)
        self.call_timeout_s = call_timeout_s

    def _take(self, hosts: Hosts, ray_cls_with_init: ClassWithInitArgs | None) -> None:
        """Be the group of what the hosts hold.

        Raises:
            ValueError: they hold other roles than `ray_cls_with_init` says.
        """
        self._hosts, self._layouts_of = hosts, hosts.now
        self.ray_cls_with_init = ray_cls_with_init
        self._classes: dict[str, type[Worker]] = {}
        held, role = hosts.now.roles, ""
        if ray_cls_with_init is not None:
            roles, role = ray_cls_with_init.roles(), ray_cls_with_init.role
            if len(roles) == len(held) == 1 and role:
                # Whatever its name: the class given says which methods the group has.
                roles, role = dict(zip(held, roles.values(), strict=True)), held[0]
            if tuple(roles) != held:
                raise ValueError(
                    f"the running hosts hold roles {list(held)}, and ray_cls_with_init says "
                    f"{list(roles)}"
                )
            self._classes = {name: spec.cls for name, spec in roles.items()}
        elif len(held) == 1:
            role = held[0]
        self._take_role(role)

    def _take_role(self, role: str) -> None:
        self.role = role
        if role in self._classes:
            self._bind(self._classes[role])

    @abc.abstractmethod
    def _submit(self, hosts: Any, request: Request, calls: Sequence[Call | None]) -> Pending:
        """Send each rank of a generation its call.

        Raises:
            SendError: an argument cannot be pickled; then nothing was sent.
            GroupBrokenError: the group was restarted meanwhile.
        """

    def _invoke(self, method: BoundMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call, from the user's arguments to the merged result."""
        if method.binding.spec.blocking:
            plan, pending = self._send(method, args, kwargs, awaited=True)
            return method.result(plan, pending)
        plan, pending = self._send(method, args, kwargs, deferred=True)
        return method.promise(plan, pending)

    def _send(
        self,
        method: BoundMethod,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: bool = False,
        awaited: bool = False,
    ) -> tuple[Plan, Pending]:
        """Dispatch and submit. The hosts are taken once: a restart in between must not send the
        plan for the former ranks to others.
        """
        record, spec = self._recorder.call(self.role, method.__name__), method.binding.spec
        with record.span("dispatch"):
            hosts, ranks = self._hosts.usable(), method.ranks
            plan, calls = method.dispatch(self._layout(method.mode, ranks, hosts), args, kwargs)
            answers = plan.answers
            if ranks:
                answers, of = tuple(ranks[i] for i in answers), dict(zip(ranks, calls, strict=True))
                calls = [of.get(rank) for rank in range(self.world_size)]
            request = Request(
                role=self.role,
                method=method.__name__,
                answers=answers,
                record=record,
                timeout_s=self._limit(method.timeout_s),
                materialize=spec.materialize_futures,
                reads_only=spec.reads_only,
                deferred=deferred,
                awaited=awaited,
                opens=deferred and not method.mode.batched,
                transport=spec.transport,
                bucket_bytes=method.bucket_bytes,
            )
            return plan, self._submitted(method.title, hosts, request, calls, args, kwargs)

    def _limit(self, timeout_s: float | None) -> float | None:
        """What a call has, asked for by itself or its method: that of the group, or no limit."""
        found = self.call_timeout_s if timeout_s is None else timeout_s
        return None if found is None or math.isinf(found) else found

    def _submitted(
        self,
        title: str,
        hosts: Generation,
        request: Request,
        calls: Sequence[Call | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Pending:
        try:
            return self._submit(hosts, request, calls)
        except SendError as error:
            named = named_arguments(args, kwargs)
            found = not_sent(title, named, self._packer) if error.__cause__ else None
            raise found or SendError(f"{title}: {error}") from error.__cause__

    def _layout(
        self, mode: Mode, ranks: Sequence[int] | None = None, hosts: Generation | None = None
    ) -> Layout:
        """The layout that a mode needs, of all ranks or those asked for. A mesh is asked for once,
        from the workers.
        """
        hosts = hosts or self._hosts.usable()
        if hosts is not self._layouts_of:
            self._dispatch_info, self._collect_info, self._layouts_of = {}, {}, hosts
        mesh = mode.mesh
        layout = Layout.flat(self.world_size)
        if mesh is not None:
            info, collects = self._dispatch_info, self._collect_info  # which a restart replaces
            if mesh not in info:
                info[mesh] = self._query_dispatch_info(mesh)
            if mesh not in collects:
                collects[mesh] = self._query_collect_info(mesh)
            layout = Layout.of(info[mesh], collects[mesh])
        return layout.subset(ranks) if ranks else layout

    def _query_dispatch_info(self, mesh_name: str) -> list[int]:
        """By rank, which shard it gets in a mesh."""
        return self.execute_all_sync("_query_dispatch_info", mesh_name)

    def _query_collect_info(self, mesh_name: str) -> list[bool]:
        """By rank, whether its output counts in a mesh."""
        return self.execute_all_sync("_query_collect_info", mesh_name)

    def explain(self, method_name: str, *args: Any, **kwargs: Any) -> Explanation:
        """What `group.<method_name>(*args, **kwargs)` would do, as a value that prints as a table:
        which ranks get which rows, keys and bytes, and whose outputs count.

        Nothing is sent, save that the workers are asked once where they stand in a mesh. A
        dispatch function of the user's own runs.

        Raises:
            What the call itself would raise before anything is sent.
        """
        if method_name not in self._methods:
            raise UnknownMethodError(self._explain_missing(method_name))
        method: BoundMethod = getattr(self, method_name)
        plan, calls = method.dispatch(self._layout(method.mode), args, kwargs)

        def size(value: Any) -> int | None:
            late: list[Any] = []  # which is fetched where it is read
            with suppress(Exception):
                found = Message.of(value, self._packer, late=late).size
                return None if late else found
            return None

        sent = explain_arguments(method.__signature__, calls, size)
        called = tuple(rank for rank, call in enumerate(calls) if call)
        return Explanation(f"{method.title} [{method.mode_title}]", called, plan.answers, sent)

    def _bind(self, cls: type[Worker]) -> None:
        """Give the group a callable for each registered method of `cls`.

        Raises:
            RegistrationError: a method has the name of something every group has.
        """
        self._worker_cls = cls
        for name, (function, spec) in registered_methods(cls).items():
            if hasattr(type(self), name) or name in vars(self):
                raise RegistrationError(
                    f"{cls.__name__}.{name} is registered under a name that every group has of "
                    "its own; rename the method"
                )
            self._methods[name] = MethodBinding(name, function, spec)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_methods" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in self._methods:
            return BoundMethod(self, self._methods[name])
        raise UnknownMethodError(self._explain_missing(name))

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._methods]

    def _explain_missing(self, name: str) -> str:
        if name == "spawn_fused":
            return "veRL's spawn_fused is spawn, or fuse, here: docs/from_verl.md has what differs"
        if not self.role:
            roles = list(self._hosts.now.roles)
            return f"this group is the host of roles {roles}: call {name!r} on spawn({roles})[role]"
        if callable(getattr(self._worker_cls, name, None)):
            return (
                f"{self.role}.{name} is not registered: decorate it with @register(...) to call "
                f"it on a group, or use execute_all({name!r}, ...)"
            )
        known = ", ".join(sorted(self._methods)) or "none: no worker class is bound to it"
        return f"{self.role} has no method {name!r}; it has {known}"

    def execute_all_sync(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Run any method of the worker, registered or not, on all ranks; the list of outputs.

        Arguments go whole to every rank; `PerRank([...])` gives each its own.
        """
        return self._execute(OneToAll(), method_name, args, kwargs, awaited=True).wait(None)

    def execute_all_async(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """As `execute_all_sync`, but a reference to each rank's output, at once."""
        return self._execute(OneToAll(), method_name, args, kwargs).handles(False)

    def execute_rank_zero_sync(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Run any method of the worker, registered or not, on rank 0; its output."""
        return self._execute(RankZero(), method_name, args, kwargs, awaited=True).wait(None)[0]

    def execute_rank_zero_async(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """As `execute_rank_zero_sync`, but a reference to the output, at once."""
        return self._execute(RankZero(), method_name, args, kwargs).handles(False)[0]

    execute_all, execute_rank_zero = execute_all_async, execute_rank_zero_async

    def _execute(
        self,
        mode: Mode,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        awaited: bool = False,
    ) -> Pending:
        known = self._worker_cls is None or callable(getattr(self._worker_cls, name, None))
        if not self.role or not known:
            raise UnknownMethodError(self._explain_missing(name))
        hosts, record = self._hosts.usable(), self._recorder.call(self.role, name)
        plan, calls = mode.dispatch(Layout.flat(self.world_size), args, kwargs)
        limit, where = self._limit(None), (self.role, name, plan.answers, record)
        request = Request(*where, timeout_s=limit, awaited=awaited, opens=not awaited)
        return self._submitted(request.title, hosts, request, calls, args, kwargs)

    @property
    def world_size(self) -> int:
        return len(self._hosts.now.infos)

    @property
    def master_address(self) -> str:
        """Where `torch.distributed` of this group meets; "" for workers of several groups."""
        return str(self._hosts.now.address[0])

    @property
    def master_port(self) -> str:
        """The port of `master_address`, as bound by rank 0's process."""
        return str(self._hosts.now.address[1])

    def spawn(self, prefix_set: Iterable[str]) -> dict[str, Self]:
        """A group for each named role of the hosts. They share the processes; closing one, or
        this group, ends them all.

        Raises:
            ValueError: the hosts hold no such role.
        """
        wanted = [prefix_set] if isinstance(prefix_set, str) else prefix_set
        return {role: self._view(role) for role in wanted}

    def fuse(self, prefix_set: Iterable[str]) -> None:
        """Make each named role's group an attribute of this one: `group.actor.update(batch)`.

        Raises:
            ValueError: the hosts hold no such role.
        """
        views = self.spawn(prefix_set)
        for role in views:
            if hasattr(type(self), role) or role in self._methods:
                raise ValueError(f"role {role!r} cannot be an attribute: groups have one already")
        for role, view in views.items():
            setattr(self, role, view)

    def _view(self, role: str) -> Self:
        roles = self._hosts.now.roles
        if role not in roles:
            raise ValueError(f"unknown role {role!r}: the hosts hold {list(roles)}")
        view = object.__new__(type(self))
        WorkerGroup.__init__(view, self.resource_pool)
        view.ray_cls_with_init, view.call_timeout_s = self.ray_cls_with_init, self.call_timeout_s
        view._hosts, view._layouts_of = self._hosts, self._hosts.now
        view._classes = self._classes
        view._take_role(role)
        return view

    def __repr__(self) -> str:
        what = self.role or f"roles {list(self._hosts.now.roles)}"
        return f"<{type(self).__name__} of {what} on {self.world_size} ranks>"

    def describe(self) -> GroupTable:
        """rank → role → node → device → pid → state, as a value that prints as a table."""
        hosts = self._hosts.now
        roles = (self.role,) if self.role else hosts.roles
        return GroupTable.of(hosts.infos, roles, hosts.states(), self._cluster())

    def _cluster(self) -> str:
        """The address of the cluster that the hosts run on; "" where there is none."""
        return ""

    def stats(self) -> StatsTable:
        """What the calls of this group cost so far, per method, as a value that prints as a table:
        bytes that moved, seconds in dispatch, wait and collect. Sends nothing.
        """
        return self._recorder.stats()

    def stacks(self) -> dict[int, str]:
        """By rank, the Python stack of each thread that runs the worker's code, now, and of
        `async def` methods that wait; also of ranks that are stuck in a collective.

        Raises:
            GroupBrokenError: Ray was shut down.
        """
        found: dict[int, str] = self._hosts.now.stacks()
        return found

    def start_worker_aliveness_check(
        self,
        every_n_seconds: float = 1,
        on_death: Callable[[WorkerDiedError], object] | None = None,
    ) -> None:
        """Look every so often, in a thread, whether all ranks live. After a death, that is
        logged, `on_death` is called with it, in that thread, and calls raise GroupBrokenError at
        once (or restart the group, with `on_failure="restart"`). What `on_death` raises is logged.

        Raises:
            ValueError: `every_n_seconds` is not above 0.
        """
        self._hosts.watch(every_n_seconds, on_death)

    def restart(self) -> None:
        """Start the group anew: other hosts and another rendezvous, the same ranks and devices, all
        roles built from their specs. Then each worker's `restore()` is called, if it has one.

        All groups on these hosts follow. Calls that were under way raise GroupBrokenError.

        Raises:
            GroupBrokenError: the group is closed, or was started by another driver.
            What starting a group raises; then it may be tried again.
        """
        self._hosts.restart()

    @property
    def restarts(self) -> int:
        """How often the group was restarted."""
        return self._hosts.restarts

    def close(self) -> None:
        """End the hosts, with all their roles, and return when they are gone.

        Calls raise GroupBrokenError from then on.
        """
        self._hosts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_workers_alive(
    workers: Sequence[Any], is_alive: Callable[[Any], bool], gap_time: float = 1
) -> None:
    """Return when a worker has died, looking every `gap_time` seconds."""
    while all(map(is_alive, workers)):
        time.sleep(gap_time)
