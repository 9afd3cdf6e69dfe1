"""What `register` keeps and refuses, the open enumerations, and functions in veRL's shape: users'
own as modes, and the built-in modes as such functions."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from protocol import DataProto
from single_controller.base import decorator
from single_controller.base.decorator import (
    DISPATCH_MODE_FN_REGISTRY,
    Dispatch,
    Execute,
    _check_dispatch_mode,
    get_predefined_dispatch_fn,
    get_predefined_execute_fn,
    make_nd_compute_dataproto_dispatch_fn,
    register,
    register_dispatch_mode,
    registered_methods,
    update_dispatch_mode,
)
from single_controller.base.dispatch import (
    AllToAll,
    ByRows,
    CustomMode,
    Direct,
    Mode,
    OneToAll,
    RankZero,
)
from single_controller.base.plan import Call, Layout
from single_controller.base.worker import Worker
from single_controller.errors import DispatchError, RegistrationError

FLAT2, FLAT4 = Layout.flat(2), Layout.flat(4)
MESH = Layout((0, 0, 1, 1), (True, False, True, False), 2)


class Group(SimpleNamespace):
    """What the functions need of a group."""

    def __init__(self) -> None:
        super().__init__(world_size=4, asked=[])

    def _layout(self, mode: Mode) -> Layout:
        self.asked.append(mode.mesh)
        return MESH if mode.mesh else FLAT4


def proto(*values: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"a": torch.tensor(values)}, **options)


def column(batch: DataProto) -> list[int]:
    assert batch.batch is not None
    return batch.batch["a"].tolist()  # type: ignore[no-any-return]


def columns(batches: Any) -> list[list[int]]:
    return [column(batch) for batch in batches]


def scatter(group: Any, *args: Any, **kwargs: Any) -> Any:
    size = group.world_size
    return tuple([(i, a) for i in range(size)] for a in args), {
        k: [(i, v) for i in range(size)] for k, v in kwargs.items()
    }


def join(group: Any, output: Any) -> Any:
    return group.world_size, output


def custom(dispatch_fn: Any = scatter) -> CustomMode:
    return CustomMode(dispatch_fn, join, group=SimpleNamespace(world_size=2))


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts the modes back as they were."""
    with mock.patch.dict(DISPATCH_MODE_FN_REGISTRY):
        yield
    for name in {"MINE", "OTHER", "STRANGER"} & {*vars(Dispatch)}:
        delattr(Dispatch, name)


def mode_of(**options: Any) -> Mode:
    cls = type("Probe", (Worker,), {"method": register(**options)(lambda self: None)})
    return registered_methods(cls)["method"][1].mode()


def test_a_registered_method_is_a_plain_function_that_has_the_workers_own() -> None:
    def method(self: Any, x: int = 3) -> int:
        """Doc."""
        return x

    @register()
    async def waiting(self: Any) -> None: ...

    marked = register(dispatch_mode=Dispatch.ONE_TO_ALL)(method)
    assert inspect.isfunction(marked)
    assert marked.__wrapped__ is method
    assert (marked(None), marked.__doc__) == (3, "Doc.")
    assert inspect.signature(marked) == inspect.signature(method)
    assert inspect.iscoroutinefunction(waiting)


FUNCTIONS = {"dispatch_fn": scatter, "collect_fn": join}


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, AllToAll()),
        ({"dispatch_mode": Dispatch.ONE_TO_ALL}, OneToAll()),
        ({"dispatch_mode": Dispatch.RANK_ZERO}, RankZero()),
        ({"execute_mode": Execute.RANK_ZERO}, RankZero()),
        ({"dispatch_mode": Dispatch.DP_COMPUTE_PROTO, "uneven": True}, ByRows(uneven=True)),
        (
            {"dispatch_mode": Dispatch.DP_COMPUTE_METRIC, "uneven": True},
            ByRows(uneven=True, merge="list"),
        ),
        (
            {"dispatch_mode": make_nd_compute_dataproto_dispatch_fn("m"), "uneven": True},
            ByRows(mesh="m", uneven=True),
        ),
        ({"dispatch_mode": FUNCTIONS}, CustomMode(scatter, join)),
        (
            {"dispatch_mode": Dispatch.DIRECT_ROLLOUT_METHOD, "execute_mode": Execute.RANK_ZERO},
            Direct(),
        ),
    ],
)
def test_options_of_register_choose_the_mode(options: dict[str, Any], mode: Mode) -> None:
    assert mode_of(**options) == mode


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dispatch_mode": "ONE_TO_ALL"}, "dispatch_mode.*'ONE_TO_ALL'"),
        ({"dispatch_mode": None}, "dispatch_mode.*None"),
        ({"dispatch_mode": {}}, "dispatch_fn"),
        ({"dispatch_mode": {"dispatch_fn": scatter}}, "collect_fn"),
        ({"dispatch_mode": {"dispatch_fn": 3, "collect_fn": join}}, "3"),
        ({"dispatch_mode": Execute.ALL}, "dispatch_mode"),
        ({"execute_mode": "ALL"}, "Execute.ALL or Execute.RANK_ZERO; got 'ALL'"),
        ({"execute_mode": Dispatch.ALL_TO_ALL}, "execute_mode"),
        ({"transport": "wire"}, "transport must be .*; got 'wire'"),
        ({"transport": "device"}, 'with blocking=False "device"; got .device'),
        ({"dispatch_mode": Dispatch.ONE_TO_ALL, "uneven": True}, "uneven=True.*ONE_TO_ALL"),
        ({"dispatch_mode": FUNCTIONS, "uneven": True}, "uneven"),
        ({"dispatch_mode": FUNCTIONS, "execute_mode": Execute.RANK_ZERO}, "of your own"),
        ({"dispatch_mode": lambda self: None}, "dispatch_mode must be .*; got <function"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: Any, named: str) -> None:
    with pytest.raises(RegistrationError, match=named) as caught:
        register(**options)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("wrapped", [staticmethod(len), classmethod(len), property(len), int, 3])
def test_what_is_no_function_cannot_be_registered(wrapped: Any) -> None:
    with pytest.raises(RegistrationError, match=type(wrapped).__name__):
        register()(wrapped)


def test_registered_methods_include_inherited_and_leave_out_overridden_plain_ones() -> None:
    class Base(Worker):
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def kept(self) -> None: ...

        @register()
        def hidden(self) -> None: ...

        def plain(self) -> None: ...

    class Derived(Base):
        def hidden(self) -> None: ...

        @register()
        def added(self) -> None: ...

    assert set(registered_methods(Derived)) - set(registered_methods(Worker)) == {"kept", "added"}
    assert registered_methods(Derived)["kept"][0] is Base.kept


@pytest.mark.parametrize("member", [*DISPATCH_MODE_FN_REGISTRY, *Execute], ids=repr)
def test_a_member_stays_itself_across_pickle_and_copy(member: Any) -> None:
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert getattr(type(member), member.name) is member
    assert f"{type(member).__name__}.{member.name}" in repr(member)


@pytest.mark.usefixtures("registry")
def test_a_mode_that_was_registered_or_updated_is_one_that_register_takes() -> None:
    register_dispatch_mode("MINE", scatter, join)
    mine = Dispatch.MINE  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(mine)) is mine
    assert get_predefined_dispatch_fn(mine) == FUNCTIONS
    assert mode_of(dispatch_mode=mine) == CustomMode(scatter, join)
    for name in ("MINE", "ONE_TO_ALL", "register"):
        with pytest.raises(RegistrationError, match=f"'{name}' is taken"):
            register_dispatch_mode(name, join, scatter)
    assert get_predefined_dispatch_fn(mine)["dispatch_fn"] is scatter
    with pytest.raises(RegistrationError, match="collect_fn"):
        register_dispatch_mode("OTHER", scatter, None)  # type: ignore[arg-type]
    update_dispatch_mode(Dispatch.ONE_TO_ALL, scatter, join)
    assert mode_of(dispatch_mode=Dispatch.ONE_TO_ALL) == CustomMode(scatter, join)


@pytest.mark.usefixtures("registry")
def test_a_mode_without_functions_in_this_process_cannot_be_used() -> None:
    stranger = Dispatch.register("STRANGER")
    for use in (
        lambda: register(dispatch_mode=stranger),
        lambda: get_predefined_dispatch_fn(stranger),
    ):
        with pytest.raises(RegistrationError, match=r"Dispatch\.STRANGER.*ONE_TO_ALL"):
            use()
    register_dispatch_mode("STRANGER", scatter, join)  # as the process did that it came from
    assert mode_of(dispatch_mode=stranger) == CustomMode(scatter, join)


def test_a_worker_process_registers_methods_without_torch() -> None:
    program = (
        "import sys, single_controller.ray.host, single_controller.base.decorator\n"
        "print([name for name in ('torch', 'tensordict', 'protocol') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_users_functions_get_the_group_and_decide_both_ways() -> None:
    mode = custom()
    plan, calls = mode.dispatch(FLAT2, ("x",), {"k": "y"})
    assert calls == [Call(((0, "x"),), {"k": (0, "y")}), Call(((1, "x"),), {"k": (1, "y")})]
    assert plan.answers == (0, 1)
    assert mode.collect(plan, ("o0", "o1")) == (2, ["o0", "o1"])
    assert mode.promise(plan, ["h0", "h1"]) == (2, ["h0", "h1"])
    assert (mode.signature_kept, OneToAll().signature_kept) == (False, True)
    assert custom() == CustomMode(scatter, join), "whatever its group"


@pytest.mark.parametrize(
    ("spread", "named"),
    [
        (None, "mine must return .*NoneType"),
        (([1, 2], [3]), "mine must return .*tuple"),
        ((([1, 2, 3],), {}), "argument 0 needs one value for each of 2 ranks; got 3"),
        (((), {"k": [1]}), r"argument 'k' .*got 1"),
        (((5,), {}), "a list is needed, .*; got 5"),
    ],
)
def test_a_dispatch_function_that_returns_something_else_is_refused(
    spread: Any, named: str
) -> None:
    def mine(group: Any, *args: Any, **kwargs: Any) -> Any:
        return spread

    with pytest.raises(DispatchError, match=named):
        custom(mine).dispatch(FLAT2, (), {})


@pytest.mark.parametrize("member", DISPATCH_MODE_FN_REGISTRY, ids=repr)
def test_a_built_in_mode_as_functions_is_the_mode_again(member: Dispatch) -> None:
    functions = get_predefined_dispatch_fn(member)
    assert _check_dispatch_mode(functions) == _check_dispatch_mode(member)
    mixed = {**functions, "collect_fn": join}
    assert _check_dispatch_mode(mixed) == CustomMode(functions["dispatch_fn"], join)


def test_functions_that_verl_pairs_are_the_mode_that_they_are_of_there() -> None:
    split, each = decorator.dispatch_dp_compute_data_proto, decorator.collect_dp_compute
    for send, collect, mode in (
        (decorator.dispatch_one_to_all, decorator.collect_all_to_all, Dispatch.ONE_TO_ALL),
        (split, each, Dispatch.DP_COMPUTE_METRIC),
    ):
        pair = {"dispatch_fn": send, "collect_fn": collect}
        assert _check_dispatch_mode(pair) == _check_dispatch_mode(mode)


def test_the_functions_of_the_built_in_modes_give_lists_of_what_ranks_get() -> None:
    group, values, batch = Group(), [5, 6, 7, 8], proto(1, 2, 3, 4)
    for send, value, sent in (
        (decorator.dispatch_one_to_all, "x", ["x"] * 4),
        (decorator.dispatch_all_to_all, "x", ["x"] * 4),
        (decorator.dispatch_all_to_all, values, values),
        (decorator.dispatch_dp_compute, values, values),
    ):
        assert send(group, value, k=value) == ((sent,), {"k": sent})
    for outputs in (values, values[:1]):
        assert decorator.collect_all_to_all(group, outputs) == outputs
    assert decorator.collect_dp_compute(group, values) == values
    (shards,), _ = decorator.dispatch_dp_compute_data_proto(group, batch)
    (sent, same), _ = decorator.dispatch_dp_compute_data_proto_with_func(group, len, batch)
    assert columns(shards) == columns(same) == [[1], [2], [3], [4]]
    assert sent == [len] * 4
    assert column(decorator.collect_dp_compute_data_proto(group, shards)) == [1, 2, 3, 4]
    with pytest.raises(NotImplementedError, match="forbidden"):
        decorator.dummy_direct_rollout_call(group)
    head = get_predefined_dispatch_fn(Dispatch.RANK_ZERO)
    assert head["dispatch_fn"](group, "x") == ((["x", None, None, None],), {})
    assert head["collect_fn"](group, ["o0", None, None, None]) == "o0"
    assert get_predefined_execute_fn(Execute.RANK_ZERO) == {"execute_fn_name": "execute_rank_zero"}


def test_the_functions_of_a_mesh_split_and_join_over_it() -> None:
    functions = make_nd_compute_dataproto_dispatch_fn("actor")
    assert _check_dispatch_mode(functions) == ByRows(mesh="actor")
    group = Group()
    (shards,), named = functions["dispatch_fn"](group, proto(1, 2), data=proto(3, 4))
    assert columns(shards) == [[1], [1], [2], [2]]
    assert shards[0] is shards[1]
    assert columns(named["data"]) == [[3], [3], [4], [4]]
    assert column(functions["collect_fn"](group, [proto(5), None, proto(6), None])) == [5, 6]
    assert set(group.asked) == {"actor"}


def test_nd_compute_sends_what_the_mapping_says_and_keeps_what_the_mask_says() -> None:
    group, mask = Group(), [True, False, True]
    for form in (list, tuple):
        args = decorator.dispatch_nd_compute([0, 1, 0], 2, group, form("ab"), k=form("cd"))
        assert args == ((["a", "b", "a"],), {"k": ["c", "d", "c"]})
    assert decorator.collect_nd_compute(mask, group, ["a", "b", "c"]) == ["a", "c"]
    split, join = decorator.dispatch_nd_compute_dataproto, decorator.collect_nd_compute_dataproto
    (shards,), named = split([1, 0], 2, group, proto(1, 2), k=proto(3, 4))
    assert (columns(shards), columns(named["k"])) == ([[2], [1]], [[4], [3]])
    assert column(join(mask, group, [proto(1), None, proto(2)])) == [1, 2]
    with pytest.raises(DispatchError, match="length 3"):
        decorator.dispatch_nd_compute([0, 1], 2, group, [1, 2, 3])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        decorator.collect_nd_compute([True], group, [1, 2])
    with pytest.raises(DispatchError, match="DataProto or TensorDict"):
        join([True, True], group, [proto(1), 3])


def test_a_bare_dispatch_function_refuses_padding_that_nobody_would_remove() -> None:
    batch = proto(1, 2, 3, auto_padding=True)
    with pytest.raises(DispatchError, match="padding"):
        get_predefined_dispatch_fn(Dispatch.DP_COMPUTE_PROTO)["dispatch_fn"](Group(), batch)
    assert len(batch) == 3
