"""WorkerGroup: binds a role's registered methods and holds the one pipeline that calls go through.

Starting processes, moving arguments and waiting are left to the backends.
"""

from __future__ import annotations

import abc
import difflib
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from single_controller import checks
from single_controller.base.decorator import registered_methods
from single_controller.base.dispatch import Mode, OneToAll, RankZero
from single_controller.base.explain import Carrier, Explanation, explain_arguments
from single_controller.base.method import BoundMethod, CallOptions, MethodBinding, Pending
from single_controller.base.plan import Call, Layout, Plan
from single_controller.base.recorder import CallRecord, Recorder, StatsTable
from single_controller.base.registered import GroupView, Registered, Transport
from single_controller.base.resource_pool import ResourcePool
from single_controller.base.roles import ClassWithInitArgs, W, worker_class
from single_controller.base.sending import arguments_not_sent
from single_controller.base.worker import Worker
from single_controller.errors import (
    DispatchError,
    RegistrationError,
    SendError,
    UnknownMethodError,
)

M = TypeVar("M")

__all__ = [
    "ClassWithInitArgs",
    "WorkerGroup",
    "check_workers_alive",
    "worker_class",
]


class WorkerGroup(abc.ABC, Generic[W]):
    """All ranks of one role, called as if they were one local object.

    Args:
        resource_pool: the processes per node; None for groups made from running workers.
    """

    role: str = ""

    def __init__(self, resource_pool: ResourcePool | None = None, **kwargs: Any) -> None:
        self._worker_cls: type[Worker] | None = None
        self._methods: dict[str, MethodBinding] = {}
        self._flat: Layout | None = None
        self._dispatch_info: dict[str, list[int]] = {}  # by mesh: each rank's data-parallel rank,
        self._collect_info: dict[str, list[bool]] = {}  # and whether its output counts
        self._recorder = Recorder()

    @property
    @abc.abstractmethod
    def world_size(self) -> int: ...

    def _usable(self) -> Any:
        """What one call goes to, taken before it is dispatched: a restart in between must not send
        the plan for the former ranks to others. Raises GroupBrokenError where no call can be taken.
        """
        return None

    @abc.abstractmethod
    def _submit(
        self,
        hosts: Any,
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
        """Send each rank its call, and count in `record` the bytes that leave. `hosts` are those
        that `_usable` gave.

        `deferred`: outputs stay where they are until asked for, then they go by `transport`.
        `awaited`: the caller waits for the result at once.
        `reads_only`: arguments may be views.

        Raises:
            SendError: an argument cannot be pickled; then nothing was sent.
            GroupBrokenError: the group was restarted meanwhile.
        """

    @abc.abstractmethod
    def _pickles(self, value: Any) -> object:
        """Raise what pickling a value for the workers raises."""

    def _invoke(self, method: BoundMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call, from the user's arguments to the merged result."""
        mode, deferred = method.mode, not method.binding.spec.blocking
        place = method.call_options.map_location
        if deferred and place is not None and not mode.batched:
            raise ValueError(
                f"{method.title} returns references at once, whose values map_location cannot "
                "place: use options(map_location=…).submit(…), or move what you get"
            )
        record = self._recorder.call(self.role, method.binding.name)
        plan, pending = self._send(method, args, kwargs, deferred, record, awaited=not deferred)
        if deferred:
            promised = mode.promise(plan, pending.handles(mode.batched))
            if place is not None:
                promised.map_location = place
            return promised
        return method.result(plan, pending, None, record)

    def _send(
        self,
        method: BoundMethod,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: bool,
        record: CallRecord,
        awaited: bool = False,
    ) -> tuple[Plan, Pending]:
        with record.span("dispatch"):
            hosts = self._usable()
            _, plan, calls = self._dispatch(method, args, kwargs)
            answers, ranks = plan.answers, method.call_options.ranks
            if ranks:
                at = dict(zip(ranks, calls, strict=True))
                calls = [at.get(rank) for rank in range(self.world_size)]
                answers = tuple(ranks[i] for i in answers)
            try:
                pending = self._submit(
                    hosts,
                    method.binding.name,
                    calls,
                    answers,
                    method.call_options,
                    record=record,
                    materialize=method.binding.spec.materialize_futures,
                    reads_only=method.binding.spec.reads_only,
                    deferred=deferred and method.mode.batched,
                    awaited=awaited,
                    transport=method.binding.spec.transport,
                )
            except SendError as error:
                found = arguments_not_sent(method.title, args, kwargs, error, self._pickles)
                raise found from error.__cause__
        pending.run_here(record)
        return plan, pending

    def _dispatch(
        self, method: BoundMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Layout, Plan, list[Call | None]]:
        """The layout of the ranks that are asked for, the plan, and these ranks' calls."""
        method.check(args, kwargs)
        ranks = method.call_options.ranks
        layout = self._layout(method.mode)
        layout = layout.subset(ranks) if ranks else layout
        try:
            return layout, *method.mode.dispatch(layout, args, kwargs)
        except DispatchError as error:
            raise DispatchError(f"{method.title}: {error}") from error.__cause__

    def explain(self, method_name: str, *args: Any, **kwargs: Any) -> Explanation:
        """What `group.<method_name>(*args, **kwargs)` would do, as a value that prints as a table:
        which rank gets which rows, keys and bytes, how they travel, what comes back.

        Nothing is sent, save that the workers are asked once where they stand in a mesh. A
        dispatch function of the user's own runs.

        Raises:
            TypeError: `method_name` is no string.
            What the call itself would raise before anything is sent.
        """
        checks.instance(str, "method_name", method_name, "a method's name, a string")
        if method_name not in self._methods:
            raise UnknownMethodError(self._explain_missing(method_name))
        return BoundMethod(self, self._methods[method_name]).explain(*args, **kwargs)

    def _explain(
        self, method: BoundMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Explanation:
        layout, plan, calls = self._dispatch(method, args, kwargs)
        ranks = method.call_options.ranks or range(self.world_size)
        signature = method.__signature__ if method.mode.signature_kept else None
        arguments = explain_arguments(signature, layout, plan, calls, ranks, self._carrier(calls))
        return Explanation(
            title=method.title,
            mode=method.mode_title,
            ranks=tuple(rank for rank, call in zip(ranks, calls, strict=True) if call),
            answers=tuple(ranks[i] for i in plan.answers),
            returns=method.returns,
            arguments=arguments,
        )

    def _carrier(self, calls: Sequence[Call | None]) -> Carrier:
        """How the arguments of a call would travel."""
        return Carrier()

    def _layout(self, mode: Mode) -> Layout:
        """The layout that a mode needs; a mesh is asked for once, from the workers."""
        mesh = mode.mesh
        if mesh is None:
            return self._flat_layout()
        info, collects = self._dispatch_info, self._collect_info  # which a restart replaces
        if mesh not in info:
            info[mesh] = self._query_dispatch_info(mesh)
        if mesh not in collects:
            collects[mesh] = self._query_collect_info(mesh)
        return Layout(tuple(info[mesh]), tuple(collects[mesh]), max(info[mesh]) + 1)

    def _query_dispatch_info(self, mesh_name: str) -> list[int]:
        """By rank, which shard it gets in a mesh."""
        return self.execute_all_sync("_query_dispatch_info", mesh_name)

    def _query_collect_info(self, mesh_name: str) -> list[bool]:
        """By rank, whether its output counts in a mesh."""
        return self.execute_all_sync("_query_collect_info", mesh_name)

    def _flat_layout(self) -> Layout:
        if self._flat is None:
            self._flat = Layout.flat(self.world_size)
        return self._flat

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
        cls = self._worker_cls
        if cls is None:
            return f"this group has no method {name!r}: no worker class is bound to it"
        if inspect.isfunction(getattr(cls, name, None)):
            return (
                f"{cls.__name__}.{name} is not registered: decorate it with @register(...) to call "
                f"it on a group, or use execute_all({name!r}, ...)"
            )
        methods = sorted(registered_methods(cls))
        close = difflib.get_close_matches(name, methods, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        return f"{self.role} has no method {name!r}{hint} It has {', '.join(methods)}"

    def stats(self) -> StatsTable:
        """What the calls of this group cost so far, per method, as a value that prints as a table:
        bytes that moved, seconds in dispatch, wait and collect. Sends nothing.
        """
        return self._recorder.stats()

    def __getitem__(self, method: Registered[Any, Any, M]) -> M:
        """A method by that of the worker class: `group[Actor.update](batch)`.

        The same as `group.update`, with the parameters and the collected result known to type
        checkers, and to tools that rename.

        Raises:
            UnknownMethodError: it is not a registered method of this group's workers.
        """
        name = getattr(method, "__name__", None)
        if name is None:
            raise TypeError(
                "a group finds a method by that of the worker class, group[Actor.update]; by name "
                f"it is an attribute, group.{method}"
            )
        found: Any = getattr(self, name)
        if not any(vars(cls).get(name) is method for cls in self._mro()):
            raise UnknownMethodError(
                f"{getattr(method, '__qualname__', name)} is no method of {self.role}, a group "
                f"of {getattr(self._worker_cls, '__name__', 'no class')}"
            )
        return found  # type: ignore[no-any-return]

    def _mro(self) -> Sequence[type]:
        return () if self._worker_cls is None else self._worker_cls.__mro__

    def _check_view(self, view: type) -> None:
        """Raise RegistrationError where this is no group of the view's worker class."""
        bases = [c for c in view.__mro__ if issubclass(c, Worker) and not issubclass(c, GroupView)]
        if not bases:
            raise RegistrationError(
                f"{view.__name__} is a view of no worker class: say class "
                f"{view.__name__}(GroupView, Actor)"
            )
        if self._worker_cls is None or not issubclass(self._worker_cls, bases[0]):
            mine = getattr(self._worker_cls, "__name__", "no class")
            raise RegistrationError(
                f"{view.__name__} is a view of groups of {bases[0].__name__}; this is of {mine}"
            )

    def execute_all(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """As `execute_all_async`: a reference to each rank's output."""
        return self.execute_all_async(method_name, *args, **kwargs)

    def execute_all_sync(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Run any method of the worker, registered or not, on all ranks; the list of outputs.

        Arguments go whole to every rank; `PerRank([...])` gives each its own.
        """
        return self._execute(OneToAll(), method_name, args, kwargs).wait(None)

    def execute_all_async(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """As `execute_all_sync`, but a reference to each rank's output, at once."""
        return self._execute(OneToAll(), method_name, args, kwargs).handles(False)

    def execute_rank_zero(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """As `execute_rank_zero_async`: a reference to rank 0's output."""
        return self.execute_rank_zero_async(method_name, *args, **kwargs)

    def execute_rank_zero_sync(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Run any method of the worker, registered or not, on rank 0; its output."""
        return self._execute(RankZero(), method_name, args, kwargs).wait(None)[0]

    def execute_rank_zero_async(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """As `execute_rank_zero_sync`, but a reference to the output, at once."""
        return self._execute(RankZero(), method_name, args, kwargs).handles(False)[0]

    def _execute(
        self, mode: Mode, method_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Pending:
        checks.instance(str, "method_name", method_name, "a method's name, a string")
        known = self._worker_cls is None or callable(getattr(self._worker_cls, method_name, None))
        if not self.role or not known:
            raise UnknownMethodError(self._explain_missing(method_name))
        hosts = self._usable()
        plan, calls = mode.dispatch(self._flat_layout(), args, kwargs)
        record = self._recorder.call(self.role, method_name)
        try:
            pending = self._submit(
                hosts, method_name, calls, plan.answers, CallOptions(), record=record
            )
        except SendError as error:
            title = f"{self.role}.{method_name}"
            found = arguments_not_sent(title, args, kwargs, error, self._pickles)
            raise found from error.__cause__
        pending.run_here(record)
        return pending


def check_workers_alive(
    workers: Sequence[Any], is_alive: Callable[[Any], bool], gap_time: float = 1
) -> None:
    """Return when a worker has died, looking every `gap_time` seconds."""
    pause = threading.Event()
    while all(is_alive(worker) for worker in workers):
        pause.wait(gap_time)
