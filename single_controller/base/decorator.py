"""`register` marks the methods that a group may call, and tells type checkers what they are: on a
worker what their author wrote, on a group the collected result.

How a mode splits and merges is in `dispatch`. The modes are here as functions in veRL's shape too,
`f(worker_group, *args)` and `g(worker_group, output)`.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
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

from single_controller.base.dispatch import (
    AllToAll,
    Args,
    ByRows,
    CustomMode,
    Direct,
    Kwargs,
    Mode,
    OneToAll,
    PerElement,
    RankZero,
)
from single_controller.base.plan import Call, Handle, Layout, Plan
from single_controller.errors import DispatchError, RegistrationError, check_seconds

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from protocol import DataProtoFuture
    from single_controller.base.explain import Explanation, GroupTable

__all__ = [
    "BUCKET_BYTES",
    "DISPATCH_MODE_FN_REGISTRY",
    "Dispatch",
    "Execute",
    "GroupFuture",
    "GroupMethod",
    "GroupView",
    "MeshFunctions",
    "MethodSpec",
    "Registered",
    "Transport",
    "check_bytes",
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
    "register",
    "register_dispatch_mode",
    "registered_methods",
    "update_dispatch_mode",
]

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")
G_co = TypeVar("G_co", covariant=True)

Functions: TypeAlias = dict[str, Callable[..., Any]]
Lists: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # one element per rank in each value
Transport: TypeAlias = Literal["host", "device"]
_Awaited: TypeAlias = Coroutine[Any, Any, R]
_Plain: TypeAlias = Callable[Concatenate[Any, P], R]
_Async: TypeAlias = Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]

_OnAll: TypeAlias = "Literal[Execute.ALL]"

BUCKET_BYTES = 256 << 20
_SPEC = "__single_controller_spec__"


class Dispatch:
    """How arguments go to the ranks, and outputs are merged; docs/options.md has the table.

    An enumeration to which members can be added; a member crosses processes by its name.
    """

    RANK_ZERO: ClassVar[_FirstRank]
    ONE_TO_ALL: ClassVar[_Whole]
    ALL_TO_ALL: ClassVar[Dispatch]
    DP_COMPUTE: ClassVar[Dispatch]
    DP_COMPUTE_PROTO: ClassVar[_Rows]
    DP_COMPUTE_PROTO_WITH_FUNC: ClassVar[_Rows]
    DP_COMPUTE_METRIC: ClassVar[_Whole]
    DIRECT_ROLLOUT_METHOD: ClassVar[Dispatch]

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def register(cls, name: str) -> Dispatch:
        """The member called `name`, made if it is new."""
        if name not in vars(cls):
            setattr(cls, name, cls(name))
        member: Dispatch = vars(cls)[name]
        return member

    def __repr__(self) -> str:
        return f"Dispatch.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatch.register, (self.name,)


class Execute(enum.Enum):
    """Which ranks run the method. With RANK_ZERO, rank 0 gets all arguments whole."""

    ALL = 0
    RANK_ZERO = 1


if TYPE_CHECKING:  # kinds of members, by which `register` tells what a group returns

    class _FirstRank(Dispatch): ...

    class _Whole(Dispatch): ...

    class _Rows(Dispatch): ...


class MeshFunctions(Functions):
    """The functions of a mesh. A type of its own, as its methods return one batch."""


def make_nd_compute_dataproto_dispatch_fn(mesh_name: str) -> MeshFunctions:
    """The dispatch mode that splits batches over the dp ranks of the workers' mesh `mesh_name`.

    Workers say where they are in it with `register_mesh` or `_register_dispatch_collect_info`;
    the driver asks them once, on the first call.
    """
    return MeshFunctions(
        dispatch_fn=partial(dispatch_lazy_compute_data_proto, mesh_name),
        collect_fn=partial(collect_lazy_compute_data_proto, mesh_name),
    )


def dispatch_lazy_compute_data_proto(
    mesh_name: str, worker_group: Any, *args: Any, **kwargs: Any
) -> Lists:
    """Batches split over the mesh's dp ranks: each argument as a list with one shard per rank."""
    return _dispatch(ByRows(mesh=mesh_name), worker_group, *args, **kwargs)


def collect_lazy_compute_data_proto(
    mesh_name: str, worker_group: Any, output: Sequence[Any]
) -> Any:
    """The collecting ranks' outputs as one batch; `output` has one element per rank."""
    return _collect(ByRows(mesh=mesh_name), worker_group, output)


def dispatch_nd_compute(
    dp_rank_mapping: Sequence[int], dp_size: int, worker_group: Any, *args: Any, **kwargs: Any
) -> Lists:
    """Lists of `dp_size` elements: rank i gets element `dp_rank_mapping[i]` of each."""
    return _lists(PerElement(), _mapped(dp_rank_mapping, dp_size), args, kwargs)


def dispatch_nd_compute_dataproto(
    dp_rank_mapping: Sequence[int], dp_size: int, worker_group: Any, *args: Any, **kwargs: Any
) -> Lists:
    """Batches split in `dp_size` shards: rank i gets shard `dp_rank_mapping[i]` of each."""
    return _lists(ByRows(merge="list"), _mapped(dp_rank_mapping, dp_size), args, kwargs)


def collect_nd_compute(
    collect_mask: Sequence[bool], worker_group: Any, output: Sequence[Any]
) -> list[Any]:
    """The outputs of the ranks whose mask is set."""
    return [value for value, collects in zip(output, collect_mask, strict=True) if collects]


def collect_nd_compute_dataproto(
    collect_mask: Sequence[bool], worker_group: Any, output: Sequence[Any]
) -> Any:
    """The outputs of the ranks whose mask is set, as one batch."""
    kept = collect_nd_compute(collect_mask, worker_group, output)
    ranks = [rank for rank, collects in enumerate(collect_mask) if collects]
    return ByRows().collect(Plan(tuple(ranks)), kept)


def _mapped(dp_rank_mapping: Sequence[int], dp_size: int) -> Layout:
    return Layout(tuple(dp_rank_mapping), (True,) * len(dp_rank_mapping), dp_size)


def _lists(mode: Mode, layout: Layout, args: Args, kwargs: Kwargs) -> Lists:
    plan, calls = mode.dispatch(layout, args, kwargs)
    if plan.padding is not None and plan.padding.added:
        raise DispatchError(
            "a batch with padding enabled cannot go through a bare dispatch function, which has "
            "no way to remove the padding again: register the method with the mode itself"
        )
    made = [call or Call((None,) * len(args), dict.fromkeys(kwargs)) for call in calls]
    return (
        tuple([call.args[i] for call in made] for i in range(len(args))),
        {key: [call.kwargs[key] for call in made] for key in kwargs},
    )


def _dispatch(mode: Mode, worker_group: Any, *args: Any, **kwargs: Any) -> Lists:
    return _lists(mode, worker_group._layout(mode), args, kwargs)


def _collect(mode: Mode, worker_group: Any, output: Sequence[Any]) -> Any:
    if isinstance(mode, OneToAll | AllToAll):
        return output
    plan = mode.plan(worker_group._layout(mode))
    return mode.collect(plan, [output[rank] for rank in plan.answers])


dispatch_one_to_all = partial(_dispatch, OneToAll())
"""Every argument as a list that holds it once per rank."""

dispatch_all_to_all = partial(_dispatch, AllToAll())
"""Every argument as a list of one element per rank: itself, if all of them are lists of that
length, else each once per rank.
"""

collect_all_to_all = partial(_collect, AllToAll())
"""The outputs as they are."""

dispatch_dp_compute = partial(_dispatch, PerElement())
"""Lists with one element per rank, checked."""

collect_dp_compute = partial(_collect, PerElement())
"""The outputs, one per rank."""

dispatch_dp_compute_data_proto = partial(_dispatch, ByRows())
"""Batches split by rows: each argument as a list with one shard per rank."""

collect_dp_compute_data_proto = partial(_collect, ByRows())
"""The outputs, one per rank, as one batch."""

dispatch_dp_compute_data_proto_with_func = partial(_dispatch, ByRows(function_first=True))
"""The same behind a function, which every rank gets."""

dummy_direct_rollout_call = partial(_dispatch, Direct())
"""Raises NotImplementedError: the method is called on workers, not through a group."""


def _pair(dispatch_fn: Any, collect_fn: Any) -> Functions:
    return {"dispatch_fn": dispatch_fn, "collect_fn": collect_fn}


_BUILT_IN: dict[str, Mode] = {
    "RANK_ZERO": RankZero(),
    "ONE_TO_ALL": OneToAll(),
    "ALL_TO_ALL": AllToAll(),
    "DP_COMPUTE": PerElement(),
    "DP_COMPUTE_PROTO": ByRows(),
    "DP_COMPUTE_PROTO_WITH_FUNC": ByRows(function_first=True),
    "DP_COMPUTE_METRIC": ByRows(merge="list"),
    "DIRECT_ROLLOUT_METHOD": Direct(),
}

DISPATCH_MODE_FN_REGISTRY: dict[Dispatch, Functions] = {
    Dispatch.register(name): _pair(partial(_dispatch, mode), partial(_collect, mode))
    for name, mode in _BUILT_IN.items()
}


def register_dispatch_mode(
    dispatch_mode_name: str, dispatch_fn: Callable[..., Any], collect_fn: Callable[..., Any]
) -> None:
    """Add `Dispatch.<dispatch_mode_name>` with functions in veRL's shape (see `CustomMode`).

    Raises:
        RegistrationError: the name is taken, or a function cannot be called.
    """
    taken = getattr(Dispatch, dispatch_mode_name, None)
    if taken in DISPATCH_MODE_FN_REGISTRY or (taken and not isinstance(taken, Dispatch)):
        raise RegistrationError(
            f"dispatch_mode_name {dispatch_mode_name!r} is taken; update_dispatch_mode changes it"
        )
    update_dispatch_mode(Dispatch.register(dispatch_mode_name), dispatch_fn, collect_fn)


def update_dispatch_mode(
    dispatch_mode: Dispatch, dispatch_fn: Callable[..., Any], collect_fn: Callable[..., Any]
) -> None:
    """Give an existing mode other functions, for groups that are made from now on.

    Raises:
        RegistrationError: a function cannot be called.
    """
    functions = _pair(dispatch_fn, collect_fn)
    _check_dispatch_mode(functions)
    DISPATCH_MODE_FN_REGISTRY[dispatch_mode] = functions


def get_predefined_dispatch_fn(dispatch_mode: Dispatch) -> Functions:
    """`{"dispatch_fn": f, "collect_fn": g}` of a mode.

    Raises:
        RegistrationError: the mode has no functions in this process.
    """
    if dispatch_mode not in DISPATCH_MODE_FN_REGISTRY:
        known = ", ".join(mode.name for mode in DISPATCH_MODE_FN_REGISTRY)
        raise RegistrationError(
            f"{dispatch_mode!r} has no functions here; those that have: {known}"
        )
    return DISPATCH_MODE_FN_REGISTRY[dispatch_mode]


def get_predefined_execute_fn(execute_mode: Execute) -> dict[str, str]:
    """`{"execute_fn_name": …}`: the group's method that carries out an execute mode.

    Raises:
        RegistrationError: not an `Execute` member.
    """
    _check_execute_mode(execute_mode)
    return {"execute_fn_name": f"execute_{execute_mode.name.lower()}"}


def _check_execute_mode(execute_mode: Any) -> None:
    """Raise RegistrationError for what is no `Execute` member."""
    if not isinstance(execute_mode, Execute):
        raise RegistrationError(
            f"execute_mode must be Execute.ALL or Execute.RANK_ZERO; got {execute_mode!r}"
        )


def _check_dispatch_mode(dispatch_mode: Any) -> Mode:
    """The mode that `register` was given, by name or as a dict of functions.

    Raises:
        RegistrationError: it is neither, or the mode is unknown, or a function cannot be called.
    """
    if isinstance(dispatch_mode, Dispatch):
        dispatch_mode = get_predefined_dispatch_fn(dispatch_mode)
    given = dispatch_mode if isinstance(dispatch_mode, Mapping) else {}
    pair: list[Any] = [given.get("dispatch_fn"), given.get("collect_fn")]
    if not all(map(callable, pair)):
        raise RegistrationError(
            'dispatch_mode must be a Dispatch member, or a dict with callables under "dispatch_fn" '
            f'and "collect_fn"; got {dispatch_mode!r}'
        )
    spreads, merges = map(_mode_of, pair)
    if isinstance(spreads, OneToAll) and isinstance(merges, AllToAll):
        return spreads  # as veRL pairs its functions
    if spreads == ByRows() and isinstance(merges, PerElement):
        return ByRows(merge="list")
    return spreads if spreads is not None and spreads == merges else CustomMode(*pair)


def _mode_of(function: Any) -> Mode | None:
    """The mode that one of the functions above is of."""
    of = getattr(function, "func", None)
    if of in (dispatch_lazy_compute_data_proto, collect_lazy_compute_data_proto):
        return ByRows(mesh=function.args[0])
    return function.args[0] if of in (_dispatch, _collect) else None


@dataclass(frozen=True)
class MethodSpec:
    """What `register` was told about a method."""

    dispatch_mode: Dispatch | Mapping[str, Any] | Mode
    execute_mode: Execute
    blocking: bool
    materialize_futures: bool
    uneven: bool
    reads_only: bool
    timeout_s: float | None
    transport: Transport
    bucket_bytes: int | None

    def mode(self) -> Mode:
        """The mode that carries this method's calls, if it can do what the method asks of it."""
        _check_execute_mode(self.execute_mode)
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
        if isinstance(mode, CustomMode):
            raise RegistrationError(
                "Execute.RANK_ZERO gives rank 0 all arguments as they are, and has no use for "
                f"dispatch and collect functions of your own; got {self.dispatch_mode!r}"
            )
        return RankZero()


class GroupFuture(Protocol[G_co]):
    """The result of a call that was submitted."""

    def result(self, timeout: float | None = None) -> G_co: ...
    def done(self) -> bool: ...
    def cancel(self) -> bool: ...
    def __await__(self) -> Generator[Any, None, G_co]: ...


class GroupMethod(Protocol[P, G_co]):
    """A worker's method on a group. With `timeout_s`, type checkers cannot check what else `submit`
    is given; they can where it is `options(timeout_s=…).submit(…)`.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> G_co: ...
    @overload
    def submit(self, *args: P.args, **kwargs: P.kwargs) -> GroupFuture[G_co]: ...
    @overload
    def submit(self, *args: Any, timeout_s: float | None, **kwargs: Any) -> GroupFuture[G_co]: ...
    def options(
        self,
        *,
        timeout_s: float | None = None,
        ranks: Iterable[int] | None = None,
        bucket_bytes: int | None = None,
    ) -> GroupMethod[P, G_co]: ...


class GroupView:
    """Makes a worker class into the type of its groups, for completion and type checkers:

        class ActorGroup(GroupView, Actor): ...

        actor = ActorGroup.of(group)  # group itself
        actor.update(batch)  # the collected type, where `self.update` is one rank's

    It is never constructed, and nothing is checked when the program runs.
    """

    @classmethod
    def of(cls, group: Any) -> Self:
        """`group`, as a value of this type."""
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

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Any: ...
    @overload
    def __get__(self, instance: GroupView, owner: Any = None) -> M: ...
    @overload
    def __get__(self, instance: object, owner: Any = None) -> Callable[P, R]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        raise NotImplementedError  # no value has this type: it is a function's


_Marked: TypeAlias = Registered[P, R, GroupMethod[P, M]]


class _ToOne(Protocol):
    """Decorates methods of which a group returns what one rank does: its rows, or its output."""

    @overload
    def __call__(self, method: _Async[P, R], /) -> _Marked[P, _Awaited[R], R]: ...
    @overload
    def __call__(self, method: _Plain[P, R], /) -> _Marked[P, R, R]: ...


class _ToList(Protocol):
    """Decorates methods of which a group returns the list of outputs."""

    @overload
    def __call__(self, method: _Async[P, R], /) -> _Marked[P, _Awaited[R], list[R]]: ...
    @overload
    def __call__(self, method: _Plain[P, R], /) -> _Marked[P, R, list[R]]: ...


class _ToHandles(Protocol):
    """The same, where the group does not wait."""

    @overload
    def __call__(self, method: _Async[P, R], /) -> _Marked[P, _Awaited[R], list[Handle[R]]]: ...
    @overload
    def __call__(self, method: _Plain[P, R], /) -> _Marked[P, R, list[Handle[R]]]: ...


class _Options(TypedDict, total=False):
    """What `register` takes by name, which does not change types."""

    materialize_futures: bool
    uneven: bool
    reads_only: bool
    timeout_s: float | None
    transport: Transport
    bucket_bytes: int | None


@overload
def register(
    dispatch_mode: _Rows | _FirstRank | MeshFunctions,
    execute_mode: _OnAll = ...,
    blocking: Literal[True] = ...,
    **more: Unpack[_Options],
) -> _ToOne: ...
@overload
def register(
    dispatch_mode: _Rows | MeshFunctions,
    execute_mode: _OnAll = ...,
    *,
    blocking: Literal[False],
    **more: Unpack[_Options],
) -> Callable[[_Plain[P, R]], _Marked[P, R, DataProtoFuture]]: ...
@overload
def register(
    dispatch_mode: _Whole,
    execute_mode: _OnAll = ...,
    blocking: Literal[True] = ...,
    **more: Unpack[_Options],
) -> _ToList: ...
@overload
def register(
    dispatch_mode: _Whole,
    execute_mode: _OnAll = ...,
    *,
    blocking: Literal[False],
    **more: Unpack[_Options],
) -> _ToHandles: ...
@overload
def register(
    dispatch_mode: Dispatch | Mapping[str, Any] = ...,
    execute_mode: Execute = ...,
    blocking: bool = ...,
    **more: Unpack[_Options],
) -> Callable[[_Plain[P, R]], Registered[P, R, GroupMethod[..., Any]]]: ...
def register(
    dispatch_mode: Dispatch | Mapping[str, Any] = Dispatch.ALL_TO_ALL,
    execute_mode: Execute = Execute.ALL,
    blocking: bool = True,
    materialize_futures: bool = True,
    uneven: bool = False,
    reads_only: bool = False,
    timeout_s: float | None = None,
    transport: Transport = "host",
    bucket_bytes: int | None = None,
) -> Any:
    """Let groups call a worker's method. It does what it did, sync or `async def`; the function
    that was given is its `__wrapped__`.

    Args:
        dispatch_mode: a `Dispatch` member, what `make_nd_compute_dataproto_dispatch_fn` returns,
            or `{"dispatch_fn": f, "collect_fn": g}`.
        execute_mode: whether all ranks run the method, or only rank 0, with all arguments.
        blocking: whether a call waits for its result. Otherwise what the method returns stays with
            its worker, behind a `DataProtoFuture` (modes that join batches) or a `Handle` for each
            output.
        materialize_futures: whether the worker gets what a `DataProtoFuture` or a `Handle` stands
            for, or these themselves.
        uneven: let shards differ by one row, so that any batch fits any number of ranks.
        reads_only: the method never writes into the tensors and arrays that it gets, so they may
            be views of memory that others read too, without a copy, until it returns; of what
            comes in buckets, until it asks for the next. numpy refuses to write into
            them; a method that wrote into a tensor is found by `SINGLE_CONTROLLER_CHECK_READS=1`
            in the workers' environment.
        timeout_s: seconds that a call may take, unless it is called with others; None: what its
            group says.
        transport: how tensors on a device that a method without `blocking` returns get to workers
            in other processes: "host", by shared memory, to the CPU; "device", on the same node
            from device to device. To the driver they come on the CPU.
        bucket_bytes: for a method without `blocking` that yields pairs of a name and a tensor, and
            256 MB where it is a generator function: so many bytes are sent at a time, and two such
            buckets are alive at most. Who is passed the handle gets an iterator, once; the method
            goes on as its pairs are read.

    Raises:
        RegistrationError: an argument is none of these. ValueError: `timeout_s` is no time.
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
        bucket_bytes,
    )
    may_yield = not (spec.mode().batched or blocking)
    if bucket_bytes is not None and not (check_bytes(bucket_bytes) and may_yield):
        raise RegistrationError(
            "bucket_bytes needs blocking=False and a mode that gives one output per rank, as "
            f"ONE_TO_ALL; got blocking={blocking} and {dispatch_mode!r}"
        )
    check_seconds("timeout_s", timeout_s)
    if transport not in (("host",) if blocking else ("host", "device")):
        raise RegistrationError(
            f'transport must be "host", or with blocking=False "device"; got {transport!r}'
        )

    def mark(method: Any) -> Any:
        if not inspect.isfunction(method):
            raise RegistrationError(
                f"register decorates plain or async functions; got {type(method).__name__}. Under "
                "@staticmethod or @classmethod there is no worker to run on"
            )
        code, names, closure = method.__code__, method.__globals__, method.__closure__
        registered = types.FunctionType(code, names, method.__name__, method.__defaults__, closure)
        registered.__kwdefaults__ = method.__kwdefaults__
        functools.update_wrapper(registered, method)
        yields = may_yield and inspect.isgeneratorfunction(method)
        size = bucket_bytes or (BUCKET_BYTES if yields else None)
        setattr(registered, _SPEC, replace(spec, bucket_bytes=size))
        return registered

    return mark


def check_bytes(count: Any) -> int:
    """Raise ValueError where `bucket_bytes` is no number of bytes."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"bucket_bytes must be a whole number of bytes, at least 1; got {count!r}")
    return count


def registered_methods(cls: type) -> dict[str, tuple[Callable[..., Any], MethodSpec]]:
    """A worker class's registered methods, inherited ones included."""
    methods = {name: getattr(cls, name, None) for name in dir(cls)}
    marked = {n: m for n, m in methods.items() if inspect.isfunction(m) and hasattr(m, _SPEC)}
    return {name: (method, getattr(method, _SPEC)) for name, method in marked.items()}
