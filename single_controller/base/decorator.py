"""`register` marks the methods that a group may call; `Dispatch` and `Execute` name the ways.

How a mode splits and merges is in `dispatch`; calling is left to the group. The functions for
meshes are here as well because veRL has them here.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

from single_controller import checks
from single_controller.base.custom import (
    BUILT_IN,
    CustomMode,
    Functions,
    MeshFunctions,
    collect_all_to_all,
    collect_dp_compute,
    collect_dp_compute_data_proto,
    collect_lazy_compute_data_proto,
    collect_nd_compute,
    collect_nd_compute_dataproto,
    dispatch_all_to_all,
    dispatch_dp_compute,
    dispatch_dp_compute_data_proto,
    dispatch_dp_compute_data_proto_with_func,
    dispatch_lazy_compute_data_proto,
    dispatch_nd_compute,
    dispatch_nd_compute_dataproto,
    dispatch_one_to_all,
    dummy_direct_rollout_call,
    make_nd_compute_dataproto_dispatch_fn,
    mode_from_functions,
)
from single_controller.base.dispatch import ByRows, Direct, Mode, RankZero
from single_controller.base.registered import (
    MoreOptions,
    ToAny,
    ToFuture,
    ToList,
    ToListOfAny,
    ToOne,
    Transport,
)
from single_controller.errors import RegistrationError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DISPATCH_MODE_FN_REGISTRY",
    "Dispatch",
    "Execute",
    "MethodSpec",
    "collect_all_to_all",
    "collect_dp_compute",
    "collect_dp_compute_data_proto",
    "collect_lazy_compute_data_proto",
    "collect_nd_compute",
    "collect_nd_compute_dataproto",
    "dispatch_all_to_all",
    "dispatch_dp_compute",
    "dispatch_dp_compute_data_proto",
    "dispatch_dp_compute_data_proto_with_func",
    "dispatch_lazy_compute_data_proto",
    "dispatch_nd_compute",
    "dispatch_nd_compute_dataproto",
    "dispatch_one_to_all",
    "dummy_direct_rollout_call",
    "get_predefined_dispatch_fn",
    "get_predefined_execute_fn",
    "make_nd_compute_dataproto_dispatch_fn",
    "method_spec",
    "register",
    "register_dispatch_mode",
    "registered_methods",
    "update_dispatch_mode",
]

E = TypeVar("E", bound="_OpenEnum")

_SPEC = "__single_controller_spec__"


class _OpenEnum:
    """An enumeration to which members can be added; a member crosses processes by its name."""

    _members: ClassVar[dict[str, Any]]

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __init_subclass__(cls) -> None:
        cls._members = {}

    @classmethod
    def register(cls: type[E], name: str) -> E:
        """The member called `name`, made if it is new."""
        if name not in cls._members:
            member = cls(name, len(cls._members))
            cls._members[name] = member
            setattr(cls, name, member)
        return cls._members[name]  # type: ignore[no-any-return]

    @classmethod
    def members(cls: type[E]) -> Iterator[E]:
        return iter(cls._members.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).register, (self.name,)


class Dispatch(_OpenEnum):
    """How arguments are spread over the ranks, and outputs merged. README has the table."""

    RANK_ZERO: ClassVar[_FirstRank]
    ONE_TO_ALL: ClassVar[_Whole]
    ALL_TO_ALL: ClassVar[_Lists]
    DP_COMPUTE: ClassVar[_Lists]
    DP_COMPUTE_PROTO: ClassVar[_Rows]
    DP_COMPUTE_PROTO_WITH_FUNC: ClassVar[_Rows]
    DP_COMPUTE_METRIC: ClassVar[_Whole]
    DIRECT_ROLLOUT_METHOD: ClassVar[Dispatch]


class Execute(_OpenEnum):
    """Which ranks run the method. With RANK_ZERO, rank 0 gets all arguments whole."""

    ALL: ClassVar[_OnAll]
    RANK_ZERO: ClassVar[_OnFirst]


if TYPE_CHECKING:  # kinds of members, by which `register` tells what a group returns

    class _FirstRank(Dispatch): ...

    class _Whole(Dispatch): ...

    class _Lists(Dispatch): ...

    class _Rows(Dispatch): ...

    class _OnAll(Execute): ...

    class _OnFirst(Execute): ...


_EXECUTE_FN_NAMES = {
    Execute.register("ALL"): "execute_all",
    Execute.register("RANK_ZERO"): "execute_rank_zero",
}

DISPATCH_MODE_FN_REGISTRY: dict[Dispatch, Functions] = {
    Dispatch.register(name): functions for name, (_, functions) in BUILT_IN.items()
}


def register_dispatch_mode(
    dispatch_mode_name: str, dispatch_fn: Callable[..., Any], collect_fn: Callable[..., Any]
) -> None:
    """Add `Dispatch.<dispatch_mode_name>` with functions in veRL's shape (see `CustomMode`).

    Raises:
        RegistrationError: the name is taken, or a function cannot be called.
    """
    if hasattr(_OpenEnum, dispatch_mode_name) or dispatch_mode_name in {
        mode.name for mode in DISPATCH_MODE_FN_REGISTRY
    }:
        raise RegistrationError(
            f"dispatch_mode_name {dispatch_mode_name!r} is taken; update_dispatch_mode changes it"
        )
    functions: Functions = {"dispatch_fn": dispatch_fn, "collect_fn": collect_fn}
    mode_from_functions(functions)
    DISPATCH_MODE_FN_REGISTRY[Dispatch.register(dispatch_mode_name)] = functions


def update_dispatch_mode(
    dispatch_mode: Dispatch, dispatch_fn: Callable[..., Any], collect_fn: Callable[..., Any]
) -> None:
    """Give an existing mode other functions, for groups that are made from now on.

    Raises:
        RegistrationError: the mode is unknown, or a function cannot be called.
    """
    get_predefined_dispatch_fn(dispatch_mode)
    functions: Functions = {"dispatch_fn": dispatch_fn, "collect_fn": collect_fn}
    mode_from_functions(functions)
    DISPATCH_MODE_FN_REGISTRY[dispatch_mode] = functions


def get_predefined_dispatch_fn(dispatch_mode: Dispatch) -> Functions:
    """`{"dispatch_fn": f, "collect_fn": g}` of a mode.

    Raises:
        RegistrationError: the mode has no functions in this process.
    """
    if dispatch_mode not in DISPATCH_MODE_FN_REGISTRY:
        known = ", ".join(mode.name for mode in DISPATCH_MODE_FN_REGISTRY)
        raise RegistrationError(
            f"dispatch_mode must be one of {known}, or a dict with dispatch_fn and collect_fn; "
            f"got {dispatch_mode!r}"
        )
    return DISPATCH_MODE_FN_REGISTRY[dispatch_mode]


def get_predefined_execute_fn(execute_mode: Execute) -> dict[str, str]:
    """`{"execute_fn_name": …}`: the group's method that carries out an execute mode.

    Raises:
        RegistrationError: not an `Execute` member.
    """
    _check_execute_mode(execute_mode)
    return {"execute_fn_name": _EXECUTE_FN_NAMES[execute_mode]}


def _check_execute_mode(execute_mode: Any) -> None:
    """Raise RegistrationError for what is no `Execute` member."""
    if not isinstance(execute_mode, Execute):
        raise RegistrationError(
            f"execute_mode must be Execute.ALL or Execute.RANK_ZERO; got {execute_mode!r}"
        )


def _check_dispatch_mode(dispatch_mode: Any) -> Mode:
    """The mode that `register` was given, by name or as a dict of functions.

    Raises:
        RegistrationError: it is neither, or the mode is unknown.
    """
    if isinstance(dispatch_mode, Dispatch):
        dispatch_mode = get_predefined_dispatch_fn(dispatch_mode)
    if not isinstance(dispatch_mode, Mapping):
        if inspect.isroutine(dispatch_mode):
            name = getattr(dispatch_mode, "__name__", "?")
            raise RegistrationError(f"register needs parentheses: @register() above {name}")
        raise RegistrationError(
            "dispatch_mode must be a Dispatch member or a dict with dispatch_fn and "
            f"collect_fn; got {dispatch_mode!r}"
        )
    return mode_from_functions(dispatch_mode)


@dataclass(frozen=True)
class MethodSpec:
    """What `register` was told about a method."""

    dispatch_mode: Dispatch | Mapping[str, Any] | Mode
    execute_mode: Execute
    blocking: bool
    materialize_futures: bool
    uneven: bool
    reads_only: bool = False
    timeout_s: float | None = None
    transport: Transport = "host"

    def mode(self) -> Mode:
        """The mode that carries this method's calls.

        Raises:
            RegistrationError: the mode is unknown, or cannot do what the method asks of it.
        """
        mode = self.dispatch_mode
        if not isinstance(mode, Mode):
            mode = _check_dispatch_mode(mode)
        if self.uneven:
            if not isinstance(mode, ByRows):
                raise RegistrationError(
                    "uneven=True needs a mode that splits batches by rows: DP_COMPUTE_PROTO, "
                    "DP_COMPUTE_PROTO_WITH_FUNC, DP_COMPUTE_METRIC or a mesh; "
                    f"got {self.dispatch_mode!r}"
                )
            mode = replace(mode, uneven=True)
        if self.execute_mode is Execute.ALL or isinstance(mode, Direct):
            return mode
        return replace(mode, rank_zero=True) if isinstance(mode, CustomMode) else RankZero()


@overload
def register(
    dispatch_mode: Any = ...,
    *,
    execute_mode: _OnFirst,
    blocking: Literal[True] = ...,
    **more: Unpack[MoreOptions],
) -> ToOne: ...
@overload
def register(
    dispatch_mode: _Rows | _FirstRank | MeshFunctions,
    execute_mode: _OnAll = ...,
    blocking: Literal[True] = ...,
    **more: Unpack[MoreOptions],
) -> ToOne: ...
@overload
def register(
    dispatch_mode: _Rows | MeshFunctions,
    execute_mode: _OnAll = ...,
    *,
    blocking: Literal[False],
    **more: Unpack[MoreOptions],
) -> ToFuture: ...
@overload
def register(
    dispatch_mode: _Whole,
    execute_mode: _OnAll = ...,
    blocking: Literal[True] = ...,
    **more: Unpack[MoreOptions],
) -> ToList: ...
@overload
def register(
    dispatch_mode: _Lists = ...,
    execute_mode: _OnAll = ...,
    blocking: Literal[True] = ...,
    **more: Unpack[MoreOptions],
) -> ToListOfAny: ...
@overload
def register(
    dispatch_mode: Dispatch | Mapping[str, Any] = ...,
    execute_mode: Execute = ...,
    blocking: bool = ...,
    **more: Unpack[MoreOptions],
) -> ToAny: ...
def register(
    dispatch_mode: Dispatch | Mapping[str, Any] = Dispatch.ALL_TO_ALL,
    execute_mode: Execute = Execute.ALL,
    blocking: bool = True,
    materialize_futures: bool = True,
    uneven: bool = False,
    reads_only: bool = False,
    timeout_s: float | None = None,
    transport: Transport = "host",
) -> Any:
    """Let groups call a worker's method. It does what it did, sync or `async def`; the function
    that was given is its `__wrapped__`.

    Args:
        dispatch_mode: a `Dispatch` member, what `make_nd_compute_dataproto_dispatch_fn` returns,
            or `{"dispatch_fn": f, "collect_fn": g}`.
        execute_mode: whether all ranks run the method or only rank 0.
        blocking: whether a call waits for its result. Otherwise it returns a `DataProtoFuture`
            (modes that join batches) or Ray references in the shape of the result.
        materialize_futures: whether the worker gets the batch behind a `DataProtoFuture`.
        uneven: let shards differ by one row, so that any batch fits any number of ranks.
        reads_only: the method never writes into the tensors and arrays that it gets, so they may
            be views of memory that others read too, and no byte is copied for it. numpy refuses
            to write into them; torch does not know, and `SINGLE_CONTROLLER_CHECK_READS=1` in the
            workers' environment finds a method that wrote anyway.
        timeout_s: seconds that a call may take, unless it is called with others; None: what its
            group says.
        transport: how tensors on a device that a method without `blocking` returns get to workers
            in other processes. "host": through shared memory; they arrive on the CPU. "device":
            workers on the same node copy them from device to device, and they arrive on the
            worker's own; others get them by "host". To the driver they come on the CPU.

    Raises:
        RegistrationError: an argument is none of these.
    """
    spec = MethodSpec(
        dispatch_mode,
        execute_mode,
        blocking,
        materialize_futures,
        uneven,
        reads_only,
        timeout_s,
        transport,
    )
    try:
        for name in ("blocking", "materialize_futures", "uneven", "reads_only"):
            checks.instance(bool, name, getattr(spec, name), "True or False")
        checks.seconds("timeout_s", timeout_s)
    except (TypeError, ValueError) as error:
        raise RegistrationError(str(error)) from None
    if transport not in ("host", "device"):
        raise RegistrationError(f'transport must be "host" or "device"; got {transport!r}')
    if transport == "device" and blocking:
        raise RegistrationError(
            'transport="device" needs blocking=False: a result that the call waits for comes to '
            "the driver, through shared memory"
        )
    _check_execute_mode(execute_mode)
    spec.mode()

    def mark(method: Any) -> Any:
        if not inspect.isfunction(method):
            raise RegistrationError(
                f"register decorates plain or async functions; got {type(method).__name__}. Under "
                "@staticmethod or @classmethod there is no worker to run on"
            )
        registered = types.FunctionType(
            method.__code__,
            method.__globals__,
            method.__name__,
            method.__defaults__,
            method.__closure__,
        )
        registered.__kwdefaults__ = method.__kwdefaults__
        functools.update_wrapper(registered, method)
        setattr(registered, _SPEC, spec)
        return registered

    return mark


def method_spec(method: Any) -> MethodSpec | None:
    """What `register` was told about `method`; None if it is not registered."""
    return getattr(method, _SPEC, None)


def registered_methods(cls: type) -> dict[str, tuple[Callable[..., Any], MethodSpec]]:
    """A worker class's registered methods, inherited ones included."""
    found: dict[str, tuple[Callable[..., Any], MethodSpec]] = {}
    for name in dir(cls):
        method = getattr(cls, name, None)
        spec = method_spec(method)
        if inspect.isfunction(method) and spec is not None:
            found[name] = (method, spec)
    return found
