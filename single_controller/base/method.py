"""A role's method on a group, and the future of a call of it. Sending is left to the group."""

from __future__ import annotations

import abc
import asyncio
import inspect
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from single_controller import checks
from single_controller.base.custom import CustomMode
from single_controller.base.decorator import MethodSpec
from single_controller.base.explain import Explanation
from single_controller.base.plan import Plan, named_arguments
from single_controller.base.recorder import CallRecord, Recorder
from single_controller.errors import DispatchError

__all__ = [
    "BoundMethod",
    "CallFuture",
    "CallOptions",
    "MethodBinding",
    "Pending",
    "callers_signature",
    "shown",
]


@dataclass(frozen=True)
class CallOptions:
    """What a caller may ask of one call beyond its arguments."""

    timeout_s: float | None = None
    ranks: tuple[int, ...] | None = None
    map_location: Any = None


class Pending(abc.ABC):
    """A call on its way: what a group's `_submit` returns."""

    def run_here(self, record: CallRecord) -> None:  # noqa: B027 — for Ray there is nothing to do
        """Run the call on ranks that this process holds; those in others run it by themselves."""

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
        """For each rank that answers, a source of its batch or a reference to its output."""


class _Group(Protocol):
    """What a method needs of its group."""

    role: str
    _recorder: Recorder

    @property
    def world_size(self) -> int: ...

    def _invoke(
        self, method: BoundMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...

    def _send(
        self,
        method: BoundMethod,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: bool,
        record: CallRecord,
    ) -> tuple[Plan, Pending]: ...

    def _explain(
        self, method: BoundMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Explanation: ...


class CallFuture:
    """The result of a call that was submitted.

    `await` gives it too, while the event loop runs on; an `await` that is cancelled, as by
    `asyncio.wait_for`, returns at once, and the call still runs.
    """

    def __init__(
        self, method: BoundMethod, plan: Plan, pending: Pending, record: CallRecord
    ) -> None:
        self._method, self._plan, self._pending = method, plan, pending
        self._record = record

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the merged result, at most `timeout` seconds; then the call still runs on.

        Raises:
            WorkerError: a rank raised. CallTimeoutError: not all ranks finished in time.
            ValueError: `timeout` is no number of seconds.
        """
        checks.seconds("timeout", timeout)
        return self._method.result(self._plan, self._pending, timeout, self._record)

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

    def __repr__(self) -> str:
        return f"<future of {self._method.title}, {'done' if self.done() else 'running'}>"


class MethodBinding:
    """What calls of a registered method need and a group knows once: mode, signature, checks."""

    def __init__(self, name: str, function: Callable[..., Any], spec: MethodSpec) -> None:
        self.name, self.function, self.spec, self.mode = name, function, spec, spec.mode()
        self.signature = callers_signature(function)
        self.bind = self.signature.bind if self.mode.signature_kept else None
        self.shown = shown(self.signature)


def callers_signature(method: Any, follow_wrapped: bool = True) -> inspect.Signature:
    """The signature of a method as its callers see it, without `self`."""
    signature = inspect.signature(method, follow_wrapped=follow_wrapped)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]  # self
    # @ray.remote adds this one to the methods of a class and of its bases
    parameters = [p for p in parameters if p.name != "_ray_trace_ctx"]
    return signature.replace(parameters=parameters)


class _Bare:
    """Text that a signature shows as it is, without quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def shown(signature: inspect.Signature) -> str:
    """A signature as its author wrote it: `(batch: DataProto) -> DataProto`."""

    def bare(annotation: Any) -> Any:
        if annotation is inspect.Signature.empty:
            return annotation
        if isinstance(annotation, str):
            return _Bare(annotation)
        return _Bare(annotation.__name__) if type(annotation) is type else annotation

    parameters = [p.replace(annotation=bare(p.annotation)) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters, return_annotation=bare(signature.return_annotation)))


class BoundMethod:
    """A role's method on a group: call it, `submit` it, or set `options` first."""

    def __init__(
        self, group: _Group, binding: MethodBinding, options: CallOptions | None = None
    ) -> None:
        mode = binding.mode
        self.group, self.binding = group, binding
        self.call_options = options or CallOptions(binding.spec.timeout_s)
        self.mode = mode.for_group(group) if isinstance(mode, CustomMode) else mode
        self.__name__ = binding.name
        self.__doc__ = binding.function.__doc__
        self.__signature__ = binding.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.group._invoke(self, args, kwargs)

    def submit(self, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> CallFuture:
        """Send the call and return at once, whatever `blocking` the method is registered with."""
        method = self.options(timeout_s=timeout_s) if timeout_s is not None else self
        record = self.group._recorder.call(self.group.role, self.__name__)
        plan, pending = self.group._send(method, args, kwargs, False, record)
        return CallFuture(self, plan, pending, record)

    def options(
        self,
        *,
        timeout_s: float | None = None,
        ranks: Iterable[int] | None = None,
        map_location: Any = None,
    ) -> BoundMethod:
        """The same method with a deadline, on some ranks only, or with a place for its result.

        `timeout_s` goes before what the method is registered with, and that before the group's
        `call_timeout_s`; `math.inf` is no deadline. With `ranks`, the call goes as if these, in
        this order, were the whole group. Tensors of workers' devices come to the CPU;
        `map_location`, a `torch.device` or its name, is where a batch or tensor that the call
        returns, or a list of them, goes from there.

        Raises:
            ValueError: a rank that the group does not have, no rank, or no time.
        """
        chosen, size = self.call_options.ranks, self.group.world_size
        if ranks is not None:
            chosen = tuple(ranks) if isinstance(ranks, Iterable) else ()
            known = chosen and all(rank in range(size) for rank in chosen)
            if not known or len(set(chosen)) < len(chosen):
                raise ValueError(
                    f"ranks must be some of 0 … {size - 1}, each once, as ranks=[0]; got "
                    f"{chosen or ranks!r}"
                )
        checks.seconds("timeout_s", timeout_s)
        if timeout_s is None:
            timeout_s = self.call_options.timeout_s
        place = self.call_options.map_location if map_location is None else map_location
        return BoundMethod(self.group, self.binding, CallOptions(timeout_s, chosen, place))

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What the call would do, without calling: see `WorkerGroup.explain`."""
        return self.group._explain(self, args, kwargs)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise TypeError where the worker's method would not take these arguments, and
        DispatchError for one that only the driver can use.
        """
        if self.binding.bind is None:
            return
        try:
            self.binding.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.title}: {error}") from None
        for name, value in named_arguments(args, kwargs):
            if isinstance(value, CallFuture):
                raise DispatchError(
                    f"{self.title}: {name} is a CallFuture, which stays on the driver: use "
                    ".result(), or register the method with blocking=False"
                )

    def result(
        self, plan: Plan, pending: Pending, timeout_s: float | None, record: CallRecord
    ) -> Any:
        """Wait for the outputs and merge them; an error says which method's they were."""
        with record.span("wait"), self.mode.reading(plan):
            outputs = pending.wait(timeout_s)
        try:
            with record.span("collect"):
                return _placed(self.mode.collect(plan, outputs), self.call_options.map_location)
        except DispatchError as error:
            raise DispatchError(f"{self.title}: {error}") from error.__cause__

    @property
    def title(self) -> str:
        """The method as messages name it: ``actor.update(batch: DataProto) -> DataProto``."""
        return f"{self.group.role}.{self.__name__}{self.binding.shown}"

    @property
    def mode_title(self) -> str:
        """`Dispatch.DP_COMPUTE_PROTO`, the name of a mesh, or of a user's dispatch function."""
        mode, given = self.mode, self.binding.spec.dispatch_mode
        if self.mode.mesh is not None:
            return f"mesh {self.mode.mesh!r}"
        return mode.name if isinstance(mode, CustomMode) else repr(given)

    @property
    def returns(self) -> str:
        """What a call gives, in words."""
        if self.binding.spec.blocking:
            return self.mode.returns
        return (
            "a DataProtoFuture"
            if self.mode.batched
            else f"at once, references to {self.mode.returns}"
        )

    def __repr__(self) -> str:
        return f"<{self.title}, {self.binding.spec.dispatch_mode}>"


def _placed(result: Any, place: Any) -> Any:
    """A batch, a tensor or a list of them on a device; other values as they are."""
    if place is None:
        return result
    import torch

    from protocol.batches import is_batch

    if isinstance(result, list):
        return [_placed(item, place) for item in result]
    return result.to(place) if is_batch(result) or isinstance(result, torch.Tensor) else result
