"""Dispatch functions in veRL's shape, `f(worker_group, *args)` and `g(worker_group, output)`:
users' own as modes, and the built-in modes as such functions. The modes are in `dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from single_controller.base.dispatch import (
    AllToAll,
    ByRows,
    Direct,
    Mode,
    OneToAll,
    PerElement,
    RankZero,
)
from single_controller.base.plan import Call, Layout, Plan
from single_controller.errors import DispatchError, RegistrationError

__all__ = [
    "BUILT_IN",
    "CustomMode",
    "MeshFunctions",
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
    "make_nd_compute_dataproto_dispatch_fn",
    "mode_from_functions",
]

Functions: TypeAlias = dict[str, Callable[..., Any]]


class MeshFunctions(Functions):
    """The functions of a mesh. A type of its own, as its methods return one batch."""


@dataclass(frozen=True)
class CustomMode(Mode):
    """A user's pair of functions.

    `dispatch_fn(worker_group, *args, **kwargs)` returns the arguments and keyword arguments as
    lists with one element per rank; `collect_fn(worker_group, output)` gets the list of all
    ranks' outputs (references to them where the call does not block). With `rank_zero`, what
    `dispatch_fn` returns goes to rank 0 as it is, and `collect_fn` gets its output alone.
    """

    dispatch_fn: Callable[..., Any]
    collect_fn: Callable[..., Any]
    rank_zero: bool = False
    group: Any = field(default=None, compare=False)

    signature_kept = False

    def for_group(self, group: Any) -> CustomMode:
        return replace(self, group=group)

    def dispatch(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, list[Call | None]]:
        spread = self.dispatch_fn(self.group, *args, **kwargs)
        if not (isinstance(spread, tuple) and len(spread) == 2 and isinstance(spread[1], Mapping)):
            raise DispatchError(
                f"{self.name} must return (args, kwargs), each value in them a list with one "
                f"element per rank; got {type(spread).__name__}"
            )
        lists, named = spread
        if self.rank_zero:
            return Plan((0,)), [Call(tuple(lists), dict(named)), *[None] * (layout.world_size - 1)]
        for name, values in [*enumerate(lists), *named.items()]:
            if not isinstance(values, Sequence) or len(values) != layout.world_size:
                came = len(values) if isinstance(values, Sequence) else type(values).__name__
                raise DispatchError(
                    f"{self.name}: argument {name!r} must be a list with one element for each of "
                    f"{layout.world_size} ranks; got {came}"
                )
        ranks = tuple(range(layout.world_size))
        return Plan(ranks), [
            Call(tuple(values[r] for values in lists), {k: v[r] for k, v in named.items()})
            for r in ranks
        ]

    @property
    def name(self) -> str:
        return getattr(self.dispatch_fn, "__name__", "dispatch_fn")

    @property
    def returns(self) -> str:  # type: ignore[override]
        function = getattr(self.collect_fn, "__name__", "collect_fn")
        return f"what {function} makes of the output{'' if self.rank_zero else 's'}"

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        return self.collect_fn(self.group, outputs[0] if self.rank_zero else list(outputs))


def mode_from_functions(functions: Mapping[str, Any]) -> Mode:
    """The mode for `{"dispatch_fn": f, "collect_fn": g}`.

    Raises:
        RegistrationError: a function is missing or cannot be called.
    """
    for key in ("dispatch_fn", "collect_fn"):
        if not callable(functions.get(key)):
            raise RegistrationError(
                'a dispatch_mode given as dict needs callables under "dispatch_fn" and '
                f'"collect_fn"; {key!r} is {functions.get(key)!r}'
            )
    dispatch_fn, collect_fn = functions["dispatch_fn"], functions["collect_fn"]
    for mode, known in BUILT_IN.values():
        if functions == known:
            return mode
    if (
        isinstance(dispatch_fn, partial)
        and isinstance(collect_fn, partial)
        and dispatch_fn.func is dispatch_lazy_compute_data_proto
        and collect_fn.func is collect_lazy_compute_data_proto
        and dispatch_fn.args == collect_fn.args
    ):
        return ByRows(mesh=dispatch_fn.args[0])
    return CustomMode(dispatch_fn, collect_fn)


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
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Batches split over the mesh's dp ranks: each argument as a list with one shard per rank."""
    return _dispatch_with(ByRows(mesh=mesh_name), worker_group, *args, **kwargs)


def collect_lazy_compute_data_proto(
    mesh_name: str, worker_group: Any, output: Sequence[Any]
) -> Any:
    """The collecting ranks' outputs as one batch; `output` has one element per rank."""
    return _collect_with(ByRows(mesh=mesh_name), worker_group, output)


def dispatch_nd_compute(
    dp_rank_mapping: Sequence[int], dp_size: int, worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lists of `dp_size` elements: rank i gets element `dp_rank_mapping[i]` of each."""
    return _lists(PerElement(), _mapped(dp_rank_mapping, dp_size), args, kwargs)


def dispatch_nd_compute_dataproto(
    dp_rank_mapping: Sequence[int], dp_size: int, worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
    ranks = tuple(rank for rank, collects in enumerate(collect_mask) if collects)
    return ByRows().collect(Plan(ranks, tuple(range(len(ranks)))), kept)


def dispatch_one_to_all(
    worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every argument as a list that holds it once per rank."""
    return _dispatch_with(OneToAll(), worker_group, *args, **kwargs)


def dispatch_all_to_all(
    worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every argument as a list of one element per rank: itself, if all of them are lists of that
    length, else each once per rank.
    """
    return _dispatch_with(AllToAll(), worker_group, *args, **kwargs)


def dispatch_dp_compute(
    worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lists with one element per rank, checked."""
    return _dispatch_with(PerElement(), worker_group, *args, **kwargs)


def dispatch_dp_compute_data_proto(
    worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Batches split by rows: each argument as a list with one shard per rank."""
    return _dispatch_with(ByRows(), worker_group, *args, **kwargs)


def dispatch_dp_compute_data_proto_with_func(
    worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same behind a function, which every rank gets."""
    return _dispatch_with(ByRows(function_first=True), worker_group, *args, **kwargs)


def collect_all_to_all(worker_group: Any, output: Any) -> Any:
    """The outputs as they are."""
    return output


def collect_dp_compute(worker_group: Any, output: Sequence[Any]) -> Any:
    """The outputs, one per rank."""
    return _collect_with(PerElement(), worker_group, output)


def collect_dp_compute_data_proto(worker_group: Any, output: Sequence[Any]) -> Any:
    """The outputs, one per rank, as one batch."""
    return _collect_with(ByRows(), worker_group, output)


def dummy_direct_rollout_call(worker_group: Any, *args: Any, **kwargs: Any) -> Any:
    """Raise NotImplementedError: the method is called on workers, not through a group."""
    return _dispatch_with(Direct(), worker_group, *args, **kwargs)


def _mapped(dp_rank_mapping: Sequence[int], dp_size: int) -> Layout:
    if any(not 0 <= dp_rank < dp_size for dp_rank in dp_rank_mapping):
        raise DispatchError(
            f"dp_rank_mapping must hold numbers from 0 to {dp_size - 1}; got {dp_rank_mapping}"
        )
    return Layout(tuple(dp_rank_mapping), (True,) * len(dp_rank_mapping), dp_size)


def _lists(
    mode: Mode, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plan, calls = mode.dispatch(layout, args, kwargs)
    if plan.padding is not None and plan.padding().added:
        raise DispatchError(
            "a batch with padding enabled cannot go through a bare dispatch function, which has "
            "no way to remove the padding again: register the method with the mode itself"
        )
    made = [call or Call((None,) * len(args), dict.fromkeys(kwargs)) for call in calls]
    return (
        tuple([call.args[i] for call in made] for i in range(len(args))),
        {key: [call.kwargs[key] for call in made] for key in kwargs},
    )


def _dispatch_with(
    mode: Mode, worker_group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _lists(mode, worker_group._layout(mode), args, kwargs)


def _collect_with(mode: Mode, worker_group: Any, output: Sequence[Any]) -> Any:
    plan = mode.plan(worker_group._layout(mode))
    return mode.collect(plan, [output[rank] for rank in plan.answers])


def _pair(dispatch_fn: Callable[..., Any], collect_fn: Callable[..., Any]) -> Functions:
    return {"dispatch_fn": dispatch_fn, "collect_fn": collect_fn}


_to_one = _pair(partial(_dispatch_with, RankZero()), partial(_collect_with, RankZero()))
_split = dispatch_dp_compute_data_proto

BUILT_IN: dict[str, tuple[Mode, Functions]] = {
    "RANK_ZERO": (RankZero(), _to_one),
    "ONE_TO_ALL": (OneToAll(), _pair(dispatch_one_to_all, collect_all_to_all)),
    "ALL_TO_ALL": (AllToAll(), _pair(dispatch_all_to_all, collect_all_to_all)),
    "DP_COMPUTE": (PerElement(), _pair(dispatch_dp_compute, collect_dp_compute)),
    "DP_COMPUTE_PROTO": (ByRows(), _pair(_split, collect_dp_compute_data_proto)),
    "DP_COMPUTE_PROTO_WITH_FUNC": (
        ByRows(function_first=True),
        _pair(dispatch_dp_compute_data_proto_with_func, collect_dp_compute_data_proto),
    ),
    "DP_COMPUTE_METRIC": (ByRows(merge="list"), _pair(_split, collect_dp_compute)),
    "DIRECT_ROLLOUT_METHOD": (
        Direct(),
        _pair(dummy_direct_rollout_call, dummy_direct_rollout_call),
    ),
}
"""The built-in modes by the names of `Dispatch`, each with its functions in veRL's shape."""
