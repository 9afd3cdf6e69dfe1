"""A role's method on a group, and the future of a call of it. Sending is left to the group."""

from __future__ import annotations

import abc
import asyncio
import copy
import inspect
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from single_controller.base.decorator import MethodSpec, Transport, check_bytes
from single_controller.base.dispatch import CustomMode
from single_controller.base.plan import Call, Layout, Plan
from single_controller.base.trace import CallRecord
from single_controller.errors import DispatchError, check_seconds

__all__ = [
    "BoundMethod",
    "CallFuture",
    "MethodBinding",
    "Pending",
    "Request",
]


@dataclass(frozen=True)
class Request:
    """What a backend is asked for besides the ranks' arguments.

    `answers` are the ranks whose outputs count, in order. `deferred`: outputs stay where they are
    until asked for, then they go by `transport`. `awaited`: the caller waits for them at once.
    `opens`: an output is a value of any kind, not a batch; those that are not deferred are for
    anyone to ask the backend for.
    `bucket_bytes`: they are generators of pairs, which are sent in buckets of that size.
    `reads_only`: arguments may be views. `materialize`: futures arrive as their batches.
    """

    role: str
    method: str
    answers: tuple[int, ...]
    record: CallRecord
    timeout_s: float | None = None
    materialize: bool = True
    reads_only: bool = False
    deferred: bool = False
    awaited: bool = False
    opens: bool = False
    transport: Transport = "host"
    bucket_bytes: int | None = None

    @property
    def title(self) -> str:
        return f"{self.role}.{self.method}"


class Pending(abc.ABC):
    """A call on its way: what a group's `_submit` returns."""

    record: CallRecord

    @abc.abstractmethod
    def wait(self, timeout_s: float | None) -> list[Any]:
        """The outputs of the ranks that answer. Raises what went wrong.

        `timeout_s` only ends this wait; None: wait as long as the call was told it may take.
        """

    @abc.abstractmethod
    async def arrive(self) -> bool:
        """Wait on the running event loop until every rank has finished, one has failed or the
        call's time is up; whether `wait` has outputs at once. Cancelling ends this wait only.
        """

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether every rank has finished, well or not."""

    @abc.abstractmethod
    def cancel(self) -> bool:
        """Ask for the call to be dropped where it has not started; whether that can be asked."""

    @abc.abstractmethod
    def handles(self, batched: bool) -> list[Any]:
        """For each rank that answers, a source of its batch or a handle; of a call that is not
        `deferred` a reference to its output.
        """


class CallFuture:
    """The result of a call that was submitted.

    `await` gives it too, while the event loop runs on; an `await` that is cancelled, as by
    `asyncio.wait_for`, returns at once, and the call still runs.
    """

    def __init__(self, method: BoundMethod, plan: Plan, pending: Pending) -> None:
        self._method, self._plan, self._pending = method, plan, pending

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the merged result, at most `timeout` seconds; then the call still runs on.

        Raises:
            WorkerError: a rank raised. CallTimeoutError: not all ranks finished in time.
            ValueError: `timeout` is no number of seconds.
        """
        check_seconds("timeout", timeout)
        return self._method.result(self._plan, self._pending, timeout)

    def done(self) -> bool:
        """Whether every rank has finished, well or not."""
        return self._pending.done()

    def cancel(self) -> bool:
        """Ask for the call to be dropped where its turn has not come; False if it will run.

        Only hosts with an `async def` method can be asked, and where another method keeps their
        loop busy, they may learn of it too late. `result` then raises
        `concurrent.futures.CancelledError`, or gives the result of a call that ran.
        """
        return self._pending.cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._arrived().__await__()

    async def _arrived(self) -> Any:
        if await self._pending.arrive():
            return self.result()
        return await asyncio.to_thread(self.result)  # finding out why takes seconds

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CallFuture stays on the driver: use .result(), or register the method with "
            "blocking=False and call it without submit"
        )

    def __repr__(self) -> str:
        return f"<future of {self._method.title}, {'done' if self.done() else 'running'}>"


class MethodBinding:
    """What calls of a registered method need and a group knows once. `signature` is that of its
    callers, without `self`.
    """

    def __init__(self, name: str, function: Callable[..., Any], spec: MethodSpec) -> None:
        self.name, self.function, self.spec, self.mode = name, function, spec, spec.mode()
        signature = inspect.signature(function)
        parameters = [*signature.parameters.values()]
        if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            del parameters[0]  # self
        # @ray.remote adds this one to the methods of a class and of its bases
        parameters = [p for p in parameters if p.name != "_ray_trace_ctx"]
        self.signature = signature.replace(parameters=parameters)
        self.shown = _shown(self.signature)


def _shown(signature: inspect.Signature) -> str:
    """A signature as its author wrote it: Python quotes annotations that are strings, and names the
    modules of others.
    """
    return re.sub(r"'|\b[A-Za-z_][\w.]*\.(?=[A-Z])", "", str(signature))


class BoundMethod:
    """A role's method on a group: call it, `submit` it, or set `options` first."""

    def __init__(self, group: Any, binding: MethodBinding) -> None:
        mode, spec = binding.mode, binding.spec
        self.group, self.binding = group, binding
        self.timeout_s, self.bucket_bytes = spec.timeout_s, spec.bucket_bytes
        self.ranks: tuple[int, ...] | None = None
        self.mode = replace(mode, group=group) if isinstance(mode, CustomMode) else mode
        self.__name__ = binding.name
        self.__doc__ = binding.function.__doc__
        self.__signature__ = binding.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.group._invoke(self, args, kwargs)

    def submit(self, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> CallFuture:
        """Send the call and return at once, whatever `blocking` the method is registered with."""
        if self.bucket_bytes is not None:
            raise TypeError(f"{self.title} yields: call it without submit; that does not wait")
        method = self.options(timeout_s=timeout_s) if timeout_s is not None else self
        return CallFuture(self, *self.group._send(method, args, kwargs))

    def options(
        self,
        *,
        timeout_s: float | None = None,
        ranks: Iterable[int] | None = None,
        bucket_bytes: int | None = None,
    ) -> BoundMethod:
        """The same method with a deadline, or on some ranks only.

        `timeout_s` goes before what the method is registered with, and that before the group's
        `call_timeout_s`; `math.inf` is no deadline. With `ranks`, the call goes as if these, in
        this order, were the whole group. `bucket_bytes` is that of a method which yields.

        Raises:
            ValueError: a rank that the group does not have, no rank, or no time.
        """
        made, size = copy.copy(self), self.group.world_size
        if ranks is not None:
            made.ranks = tuple(ranks)
            if not made.ranks or len({*made.ranks} & {*range(size)}) < len(made.ranks):
                wanted = f"some of 0 … {size - 1}, each once, as ranks=[0]"
                raise ValueError(f"ranks must be {wanted}; got {made.ranks}")
        check_seconds("timeout_s", timeout_s)
        if timeout_s is not None:
            made.timeout_s = timeout_s
        if bucket_bytes is not None:
            if self.bucket_bytes is None:
                raise ValueError(f"{self.title} sends nothing in buckets: see register")
            made.bucket_bytes = check_bytes(bucket_bytes)
        return made

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        """The plan, and the calls of the ranks that `layout` is of.

        Raises:
            TypeError: the worker's method would not take these arguments.
            DispatchError: they cannot be spread.
        """
        try:
            if self.mode.signature_kept:
                self.binding.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.title}: {error}") from None
        try:
            return self.mode.dispatch(layout, args, kwargs)
        except DispatchError as error:
            raise DispatchError(f"{self.title}: {error}") from error.__cause__

    def result(self, plan: Plan, pending: Pending, timeout_s: float | None = None) -> Any:
        """Wait for the outputs and merge them; an error says which method's they were."""
        with pending.record.span("wait"), self.mode.reading(plan):
            outputs = pending.wait(timeout_s)
        try:
            with pending.record.span("collect"):
                return self.mode.collect(plan, outputs)
        except DispatchError as error:
            raise DispatchError(f"{self.title}: {error}") from error.__cause__

    def promise(self, plan: Plan, pending: Pending) -> Any:
        """What stands for the result of a call that does not block."""
        return self.mode.promise(plan, pending.handles(self.mode.batched))

    @property
    def title(self) -> str:
        """The method as messages name it: ``actor.update(batch: DataProto) -> DataProto``."""
        return f"{self.group.role}.{self.__name__}{self.binding.shown}"

    @property
    def mode_title(self) -> str:
        """`Dispatch.DP_COMPUTE_PROTO`, the name of a mesh, or of a user's dispatch function."""
        mode = self.mode
        if mode.mesh is not None:
            return f"mesh {mode.mesh!r}"
        return mode.name if isinstance(mode, CustomMode) else repr(self.binding.spec.dispatch_mode)

    def __repr__(self) -> str:
        return f"<{self.title}, {self.binding.spec.dispatch_mode}>"
