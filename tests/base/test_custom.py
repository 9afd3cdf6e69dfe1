"""Functions in veRL's shape: users' own as modes, and the built-in modes as such functions."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from protocol import DataProto
from single_controller.base import decorator
from single_controller.base.custom import (
    BUILT_IN,
    CustomMode,
    collect_all_to_all,
    collect_dp_compute_data_proto,
    collect_lazy_compute_data_proto,
    collect_nd_compute,
    collect_nd_compute_dataproto,
    dispatch_dp_compute_data_proto,
    dispatch_dp_compute_data_proto_with_func,
    dispatch_lazy_compute_data_proto,
    dispatch_nd_compute,
    dispatch_nd_compute_dataproto,
    dummy_direct_rollout_call,
    make_nd_compute_dataproto_dispatch_fn,
    mode_from_functions,
)
from single_controller.base.decorator import Dispatch, get_predefined_dispatch_fn
from single_controller.base.dispatch import ByRows, Call, Layout, Mode, OneToAll
from single_controller.errors import DispatchError, RegistrationError

FLAT2 = Layout.flat(2)
MESH = Layout((0, 0, 1, 1), (True, False, True, False), 2)


class Group(SimpleNamespace):
    """What the functions need of a group."""

    def __init__(self) -> None:
        super().__init__(world_size=4, asked=[])

    def _layout(self, mode: Mode) -> Layout:
        self.asked.append(mode.mesh)
        return MESH if mode.mesh else Layout.flat(4)


def proto(*values: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"a": torch.tensor(values)}, **options)


def column(batch: DataProto) -> list[int]:
    assert batch.batch is not None
    return batch.batch["a"].tolist()  # type: ignore[no-any-return]


def scatter(group: Any, *args: Any, **kwargs: Any) -> Any:
    size = group.world_size
    return tuple([(i, a) for i in range(size)] for a in args), {
        k: [(i, v) for i in range(size)] for k, v in kwargs.items()
    }


def join(group: Any, output: Any) -> Any:
    return group.world_size, output


def custom(dispatch_fn: Any = scatter, **options: Any) -> CustomMode:
    return CustomMode(dispatch_fn, join, **options).for_group(SimpleNamespace(world_size=2))


def test_a_users_functions_get_the_group_and_decide_both_ways() -> None:
    mode = custom()
    plan, calls = mode.dispatch(FLAT2, ("x",), {"k": "y"})
    assert calls == [Call(((0, "x"),), {"k": (0, "y")}), Call(((1, "x"),), {"k": (1, "y")})]
    assert plan.answers == (0, 1)
    assert mode.collect(plan, ("o0", "o1")) == (2, ["o0", "o1"])
    assert mode.promise(plan, ["h0", "h1"]) == (2, ["h0", "h1"])


def test_arguments_of_a_custom_mode_need_not_match_the_methods_signature() -> None:
    assert (CustomMode(scatter, join).signature_kept, OneToAll().signature_kept) == (False, True)


def test_a_group_is_not_part_of_what_makes_two_custom_modes_equal() -> None:
    assert custom() == CustomMode(scatter, join)


def test_with_rank_zero_the_spread_goes_to_rank_0_as_it_is() -> None:
    mode = custom(rank_zero=True)
    plan, calls = mode.dispatch(FLAT2, ("x",), {})
    assert (plan.answers, calls) == ((0,), [Call(([(0, "x"), (1, "x")],)), None])
    assert mode.collect(plan, ["o0"]) == (2, "o0")


@pytest.mark.parametrize(
    ("spread", "named"),
    [
        (None, "NoneType"),
        ([1, 2], "list"),
        (([1, 2], [3]), "tuple"),
        ((([1, 2, 3],), {}), r"argument 0 must be a list .*2 ranks; got 3"),
        (((), {"k": [1]}), r"argument 'k' .*got 1"),
        (((5,), {}), "got int"),
    ],
)
def test_a_dispatch_function_that_returns_something_else_is_named(spread: Any, named: str) -> None:
    def mine(group: Any, *args: Any, **kwargs: Any) -> Any:
        return spread

    with pytest.raises(DispatchError, match=named) as caught:
        custom(mine).dispatch(FLAT2, (), {})
    assert "mine" in str(caught.value)


def test_a_callable_without_a_name_can_dispatch_and_fail_too() -> None:
    plan, _ = custom(partial(scatter)).dispatch(FLAT2, (), {})
    assert plan.answers == (0, 1)
    with pytest.raises(DispatchError, match="dispatch_fn must return"):
        custom(partial(lambda group: 3)).dispatch(FLAT2, (), {})


@pytest.mark.parametrize(
    ("functions", "named"),
    [
        ({}, "dispatch_fn"),
        ({"dispatch_fn": scatter}, "collect_fn"),
        ({"dispatch_fn": 3, "collect_fn": join}, "3"),
    ],
)
def test_a_mode_needs_both_functions(functions: Any, named: str) -> None:
    with pytest.raises(RegistrationError, match=named):
        mode_from_functions(functions)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_mode_as_functions_is_the_mode_again(name: str) -> None:
    assert (
        mode_from_functions(get_predefined_dispatch_fn(getattr(Dispatch, name)))
        == BUILT_IN[name][0]
    )


def test_functions_of_two_different_modes_are_a_custom_mode() -> None:
    mixed = {"dispatch_fn": dispatch_dp_compute_data_proto, "collect_fn": collect_all_to_all}
    assert isinstance(mode_from_functions(mixed), CustomMode)


FUNCTIONS = [  # veRL's name, its arguments, what rank 1 of 4 gets, what is made of four outputs
    ("one_to_all", ("x",), "x", "all_to_all", [0, 1, 2, 3]),
    ("all_to_all", ("x",), "x", "all_to_all", [0, 1, 2, 3]),
    ("all_to_all", ([5, 6, 7, 8],), 6, "all_to_all", [0, 1, 2, 3]),
    ("dp_compute", ([5, 6, 7, 8],), 6, "dp_compute", [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("name", "args", "second", "back", "made"), FUNCTIONS)
def test_a_function_of_a_built_in_mode_works_in_a_mode_of_ones_own(
    name: str, args: Any, second: Any, back: str, made: Any
) -> None:
    functions = {
        "dispatch_fn": lambda *a, **k: getattr(decorator, f"dispatch_{name}")(*a, **k),
        "collect_fn": lambda *a, **k: getattr(decorator, f"collect_{back}")(*a, **k),
    }
    mode = CustomMode(**functions).for_group(Group())
    plan, calls = mode.dispatch(Layout.flat(4), args, {})
    assert [call.args for call in calls if call][1] == (second,)
    assert mode.collect(plan, [0, 1, 2, 3]) == made


@pytest.mark.parametrize("function", [None, len])
def test_the_functions_that_split_batches_work_in_a_mode_of_ones_own(function: Any) -> None:
    dispatch = dispatch_dp_compute_data_proto
    args: tuple[Any, ...] = (proto(1, 2, 3, 4),)
    if function is not None:
        dispatch, args = dispatch_dp_compute_data_proto_with_func, (function, *args)
    spread, _ = dispatch(Group(), *args)
    assert [column(shard) for shard in spread[-1]] == [[1], [2], [3], [4]]
    assert list(spread[0]) == [function] * 4 or function is None
    assert column(collect_dp_compute_data_proto(Group(), list(spread[-1]))) == [1, 2, 3, 4]


def test_a_direct_rollout_method_has_a_function_that_refuses() -> None:
    with pytest.raises(NotImplementedError, match="forbidden"):
        dummy_direct_rollout_call(Group())


def test_make_nd_compute_is_the_mode_that_splits_over_the_named_mesh() -> None:
    functions = make_nd_compute_dataproto_dispatch_fn("actor")
    assert mode_from_functions(functions) == ByRows(mesh="actor")
    group = Group()
    (shards,), named = functions["dispatch_fn"](group, proto(1, 2), data=proto(3, 4))
    assert [column(shard) for shard in shards] == [[1], [1], [2], [2]]
    assert [column(shard) for shard in named["data"]] == [[3], [3], [4], [4]]
    assert column(functions["collect_fn"](group, [proto(5), None, proto(6), None])) == [5, 6]
    assert set(group.asked) == {"actor"}


def test_the_functions_that_ask_for_a_mesh_lazily_split_and_join_over_it() -> None:
    group = Group()
    (shards,), _ = dispatch_lazy_compute_data_proto("m", group, proto(1, 2))
    assert [column(shard) for shard in shards] == [[1], [1], [2], [2]]
    assert shards[0] is shards[1]
    assert column(collect_lazy_compute_data_proto("m", group, shards)) == [1, 2]


@pytest.mark.parametrize("form", [list, tuple])
def test_nd_compute_sends_element_dp_rank_of_every_list(form: type[Any]) -> None:
    args, kwargs = dispatch_nd_compute([0, 1, 0], 2, Group(), form("ab"), k=form("cd"))
    assert [list(values) for values in args] == [["a", "b", "a"]]
    assert {k: list(v) for k, v in kwargs.items()} == {"k": ["c", "d", "c"]}


def test_nd_compute_of_batches_sends_shard_dp_rank() -> None:
    (shards,), named = dispatch_nd_compute_dataproto([1, 0], 2, Group(), proto(1, 2), k=proto(3, 4))
    assert [column(shard) for shard in shards] == [[2], [1]]
    assert [column(shard) for shard in named["k"]] == [[4], [3]]


def test_collect_nd_compute_keeps_the_outputs_whose_mask_is_set() -> None:
    mask = [True, False, True]
    assert collect_nd_compute(mask, Group(), ["a", "b", "c"]) == ["a", "c"]
    assert column(collect_nd_compute_dataproto(mask, Group(), [proto(1), None, proto(2)])) == [1, 2]


@pytest.mark.parametrize("mapping", [[0, 2], [-1, 0]])
def test_a_mapping_outside_the_dp_ranks_is_refused(mapping: list[int]) -> None:
    with pytest.raises(DispatchError, match="0 to 1"):
        dispatch_nd_compute(mapping, 2, Group(), ["a", "b"])


def test_wrong_lists_masks_and_outputs_are_refused() -> None:
    with pytest.raises(DispatchError, match="length 3"):
        dispatch_nd_compute([0, 1], 2, Group(), [1, 2, 3])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        collect_nd_compute([True], Group(), [1, 2])
    with pytest.raises(DispatchError, match="DataProto or TensorDict"):
        collect_nd_compute_dataproto([True, True], Group(), [proto(1), 3])


def test_functions_built_on_a_built_in_mode_reach_it() -> None:
    built_in = get_predefined_dispatch_fn(Dispatch.DP_COMPUTE_PROTO)
    seen: list[Any] = []

    def dispatch_fn(group: Any, *args: Any) -> Any:
        seen.append(args)
        return built_in["dispatch_fn"](group, *args)

    mode = CustomMode(dispatch_fn, built_in["collect_fn"]).for_group(Group())
    plan, calls = mode.dispatch(Layout.flat(4), (proto(1, 2, 3, 4),), {})
    shards = [call.args[0] for call in calls if call]
    assert [column(shard) for shard in shards] == [[1], [2], [3], [4]]
    assert len(seen) == 1
    assert column(mode.collect(plan, shards)) == [1, 2, 3, 4]


def test_a_bare_dispatch_function_refuses_padding_that_nobody_would_remove() -> None:
    batch = proto(1, 2, 3, auto_padding=True)
    with pytest.raises(DispatchError, match="padding"):
        get_predefined_dispatch_fn(Dispatch.DP_COMPUTE_PROTO)["dispatch_fn"](Group(), batch)
    assert len(batch) == 3


def test_a_bare_rank_zero_function_gives_the_other_ranks_nothing() -> None:
    functions = get_predefined_dispatch_fn(Dispatch.RANK_ZERO)
    args, kwargs = functions["dispatch_fn"](Group(), "x", k=1)
    assert list(args[0]) == ["x", None, None, None]
    assert list(kwargs["k"]) == [1, None, None, None]
    assert functions["collect_fn"](Group(), ["o0", None, None, None]) == "o0"
