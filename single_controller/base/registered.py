"""What type checkers see of a registered method: on a worker what its author wrote, on a group the
collected result. At run time `register` returns the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    overload,
)

from single_controller.base.explain import Explanation
from single_controller.base.table import GroupTable

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from protocol import DataProtoFuture

__all__ = [
    "GroupFuture",
    "GroupMethod",
    "GroupView",
    "MoreOptions",
    "Registered",
    "ToAny",
    "ToFuture",
    "ToList",
    "ToListOfAny",
    "ToOne",
    "Transport",
]

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")
G_co = TypeVar("G_co", covariant=True)

Transport: TypeAlias = Literal["host", "device"]
_Async: TypeAlias = Coroutine[Any, Any, R]


class GroupFuture(Protocol[G_co]):
    """The result of a call that was submitted."""

    def result(self, timeout: float | None = None) -> G_co: ...
    def done(self) -> bool: ...
    def cancel(self) -> bool: ...
    def __await__(self) -> Generator[Any, None, G_co]: ...


class GroupMethod(Protocol[P, G_co]):
    """A worker's method on a group.

    Type checkers know no way to say `submit(…, timeout_s=…)` of a method's own parameters: they
    check them without a deadline, or where it is given by `options(timeout_s=…).submit(…)`.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> G_co: ...
    @overload
    def submit(self, *args: P.args, **kwargs: P.kwargs) -> GroupFuture[G_co]: ...
    @overload
    def submit(self, *args: Any, timeout_s: float | None, **kwargs: Any) -> GroupFuture[G_co]: ...
    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation: ...
    def options(
        self,
        *,
        timeout_s: float | None = None,
        ranks: Iterable[int] | None = None,
        map_location: torch.device | str | None = None,
    ) -> GroupMethod[P, G_co]: ...


class GroupView:
    """Makes a worker class into the type of its groups, for completion and type checkers:

        class ActorGroup(GroupView, Actor): ...

        actor = ActorGroup.of(group)  # group itself
        actor.update(batch)  # the collected type, where `self.update` is one rank's

    It is never constructed.
    """

    @classmethod
    def of(cls, group: Any) -> Self:
        """`group`, as a value of this type.

        Raises:
            RegistrationError: it is a group of another worker class.
        """
        group._check_view(cls)
        view: Self = group
        return view

    if TYPE_CHECKING:

        def describe(self) -> GroupTable: ...
        def explain(self, method_name: str, *args: Any, **kwargs: Any) -> Explanation: ...
        def close(self) -> None: ...
        def __enter__(self) -> Self: ...
        def __exit__(self, *_: object) -> None: ...


class Registered(Generic[P, R, M]):
    """A method that groups may call; `M` is what it is on a group."""

    __name__: str

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(self, instance: GroupView, owner: Any = None) -> M: ...
    @overload
    def __get__(self, instance: object, owner: Any = None) -> Callable[P, R]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        raise NotImplementedError  # no value has this type: it is a function's

    def __call__(self, worker: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        raise NotImplementedError


class ToOne(Protocol):
    """Decorates methods of which a group returns what one rank does: its rows, or its output."""

    @overload
    def __call__(
        self, method: Callable[Concatenate[Any, P], _Async[R]], /
    ) -> Registered[P, _Async[R], GroupMethod[P, R]]: ...
    @overload
    def __call__(
        self, method: Callable[Concatenate[Any, P], R], /
    ) -> Registered[P, R, GroupMethod[P, R]]: ...


class ToList(Protocol):
    """Decorates methods of which a group returns the list of outputs."""

    @overload
    def __call__(
        self, method: Callable[Concatenate[Any, P], _Async[R]], /
    ) -> Registered[P, _Async[R], GroupMethod[P, list[R]]]: ...
    @overload
    def __call__(
        self, method: Callable[Concatenate[Any, P], R], /
    ) -> Registered[P, R, GroupMethod[P, list[R]]]: ...


class ToListOfAny(Protocol):
    """The same, where a group takes lists with one element per rank instead of the parameters."""

    @overload
    def __call__(
        self, method: Callable[Concatenate[Any, P], _Async[R]], /
    ) -> Registered[P, _Async[R], GroupMethod[..., list[R]]]: ...
    @overload
    def __call__(
        self, method: Callable[Concatenate[Any, P], R], /
    ) -> Registered[P, R, GroupMethod[..., list[R]]]: ...


class ToFuture(Protocol):
    """Decorates methods of which a group returns a batch that is still in the workers."""

    def __call__(
        self, method: Callable[Concatenate[Any, P], R], /
    ) -> Registered[P, R, GroupMethod[P, DataProtoFuture]]: ...


class ToAny(Protocol):
    """Decorates methods of which only the workers' side is known."""

    def __call__(
        self, method: Callable[Concatenate[Any, P], R], /
    ) -> Registered[P, R, GroupMethod[..., Any]]: ...


class MoreOptions(TypedDict, total=False):
    """What `register` takes besides, which does not change types."""

    materialize_futures: bool
    uneven: bool
    reads_only: bool
    timeout_s: float | None
    transport: Transport
