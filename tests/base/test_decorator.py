"""What `register` keeps, what it refuses, and the open enumerations."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from protocol import DataProto
from single_controller.base.custom import CustomMode, make_nd_compute_dataproto_dispatch_fn
from single_controller.base.decorator import (
    DISPATCH_MODE_FN_REGISTRY,
    Dispatch,
    Execute,
    get_predefined_dispatch_fn,
    get_predefined_execute_fn,
    method_spec,
    register,
    register_dispatch_mode,
    registered_methods,
    update_dispatch_mode,
)
from single_controller.base.dispatch import (
    AllToAll,
    ByRows,
    Direct,
    Layout,
    Mode,
    OneToAll,
    RankZero,
)
from single_controller.base.worker import Worker
from single_controller.errors import RegistrationError

DISPATCH = [
    "RANK_ZERO",
    "ONE_TO_ALL",
    "ALL_TO_ALL",
    "DP_COMPUTE",
    "DP_COMPUTE_PROTO",
    "DP_COMPUTE_PROTO_WITH_FUNC",
    "DP_COMPUTE_METRIC",
    "DIRECT_ROLLOUT_METHOD",
]


def scatter(group: Any, *args: Any) -> Any:
    return args, {}


def join(group: Any, output: Any) -> Any:
    return output


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts the modes back as they were."""
    functions, members = dict(DISPATCH_MODE_FN_REGISTRY), dict(Dispatch._members)
    own = {name: value for name, value in vars(Dispatch).items() if not name.startswith("__")}
    yield
    for name in [name for name in vars(Dispatch) if not name.startswith("__") and name not in own]:
        delattr(Dispatch, name)
    for store, before in ((DISPATCH_MODE_FN_REGISTRY, functions), (Dispatch._members, members)):
        store.clear()
        store.update(before)


def mode_of(**options: Any) -> Mode:
    spec = method_spec(register(**options)(lambda self: None))
    assert spec is not None
    return spec.mode()


def test_a_registered_method_is_a_plain_function_that_has_the_workers_own() -> None:
    def method(self: Any, x: int = 3) -> int:
        """Doc."""
        return x

    marked = register(dispatch_mode=Dispatch.ONE_TO_ALL)(method)
    assert inspect.isfunction(marked)
    assert marked.__wrapped__ is method  # type: ignore[attr-defined]
    assert (marked(None), marked.__doc__, str(inspect.signature(marked))) == (
        3,
        "Doc.",
        "(self: 'Any', x: 'int' = 3) -> 'int'",
    )


def test_an_async_method_stays_async() -> None:
    @register()
    async def method(self: Any) -> None: ...

    assert inspect.iscoroutinefunction(method)


def test_register_without_arguments_is_all_to_all_on_all_ranks_blocking() -> None:
    spec = method_spec(register()(lambda self: None))
    assert spec is not None
    assert (spec.dispatch_mode, spec.execute_mode) == (Dispatch.ALL_TO_ALL, Execute.ALL)
    assert (spec.blocking, spec.materialize_futures, spec.uneven) == (True, True, False)
    assert spec.mode() == AllToAll()


def test_the_parameters_of_register_begin_with_verls_in_its_order() -> None:
    names = ["dispatch_mode", "execute_mode", "blocking", "materialize_futures"]
    assert list(inspect.signature(register).parameters)[:4] == names


@pytest.mark.parametrize(
    ("options", "mode"),
    [
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
        (
            {"dispatch_mode": {"dispatch_fn": scatter, "collect_fn": join}},
            CustomMode(scatter, join),
        ),
        (
            {
                "dispatch_mode": {"dispatch_fn": scatter, "collect_fn": join},
                "execute_mode": Execute.RANK_ZERO,
            },
            CustomMode(scatter, join, rank_zero=True),
        ),
        (
            {
                "dispatch_mode": Dispatch.DIRECT_ROLLOUT_METHOD,
                "execute_mode": Execute.RANK_ZERO,
            },
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
        ({"dispatch_mode": {"dispatch_fn": scatter}}, "collect_fn"),
        ({"dispatch_mode": Execute.ALL}, "dispatch_mode"),
        ({"execute_mode": "ALL"}, "Execute.ALL or Execute.RANK_ZERO; got 'ALL'"),
        ({"execute_mode": Dispatch.ALL_TO_ALL}, "execute_mode"),
        ({"blocking": "no"}, "blocking must be True or False; got 'no'"),
        ({"materialize_futures": 0}, "materialize_futures must be True or False; got 0"),
        ({"reads_only": "no"}, "reads_only must be True or False; got 'no'"),
        ({"uneven": "no"}, "uneven must be True or False; got 'no'"),
        ({"timeout_s": "x"}, "timeout_s must be seconds, at least 0, or None; got 'x'"),
        ({"dispatch_mode": Dispatch.ONE_TO_ALL, "uneven": True}, "uneven=True.*ONE_TO_ALL"),
        ({"dispatch_mode": {"dispatch_fn": scatter, "collect_fn": join}, "uneven": True}, "uneven"),
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


def test_dispatch_and_execute_have_verls_members() -> None:
    assert [mode.name for mode in Dispatch.members()][:8] == DISPATCH
    assert [mode.name for mode in Execute.members()] == ["ALL", "RANK_ZERO"]
    assert [get_predefined_execute_fn(m)["execute_fn_name"] for m in Execute.members()] == [
        "execute_all",
        "execute_rank_zero",
    ]


@pytest.mark.parametrize("name", DISPATCH[:-1])
def test_every_dispatch_member_can_dispatch_and_collect(name: str) -> None:
    args = {"DP_COMPUTE": ([1, 2],), "DP_COMPUTE_PROTO_WITH_FUNC": (len,)}.get(name, ())
    mode = mode_of(dispatch_mode=getattr(Dispatch, name))
    plan, calls = mode.dispatch(Layout.flat(2), args, {})
    assert len(calls) == 2
    assert mode.collect(plan, [DataProto() for _ in plan.answers]) is not None


@pytest.mark.parametrize("member", [*Dispatch.members(), *Execute.members()], ids=repr)
def test_a_member_stays_itself_across_pickle_and_copy(member: Any) -> None:
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert getattr(type(member), member.name) is member
    assert repr(member) == f"{type(member).__name__}.{member.name}"


@pytest.mark.usefixtures("registry")
def test_a_registered_dispatch_mode_is_a_member_that_register_takes() -> None:
    register_dispatch_mode("MINE", scatter, join)
    mine = Dispatch.MINE  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(mine)) is mine
    assert get_predefined_dispatch_fn(mine) == {"dispatch_fn": scatter, "collect_fn": join}
    assert mode_of(dispatch_mode=mine) == CustomMode(scatter, join)


@pytest.mark.usefixtures("registry")
def test_a_members_name_is_taken_once() -> None:
    register_dispatch_mode("MINE", scatter, join)
    for name in ("MINE", "ONE_TO_ALL"):
        with pytest.raises(RegistrationError, match=f"'{name}' is taken"):
            register_dispatch_mode(name, join, scatter)
    assert get_predefined_dispatch_fn(Dispatch.MINE)["dispatch_fn"] is scatter  # type: ignore[attr-defined]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", ["register", "members"])
def test_a_member_cannot_take_the_name_of_what_dispatch_itself_has(name: str) -> None:
    with pytest.raises(RegistrationError, match=name):
        register_dispatch_mode(name, scatter, join)


@pytest.mark.usefixtures("registry")
def test_functions_that_cannot_be_called_add_no_member() -> None:
    with pytest.raises(RegistrationError, match="collect_fn"):
        register_dispatch_mode("MINE", scatter, None)  # type: ignore[arg-type]
    assert not hasattr(Dispatch, "MINE")


@pytest.mark.usefixtures("registry")
def test_an_updated_mode_uses_the_new_functions() -> None:
    update_dispatch_mode(Dispatch.ONE_TO_ALL, scatter, join)
    assert mode_of(dispatch_mode=Dispatch.ONE_TO_ALL) == CustomMode(scatter, join)


@pytest.mark.usefixtures("registry")
def test_a_mode_without_functions_in_this_process_can_be_neither_used_nor_updated() -> None:
    stranger = Dispatch.register("STRANGER")
    for use in (
        lambda: register(dispatch_mode=stranger),
        lambda: update_dispatch_mode(stranger, scatter, join),
        lambda: get_predefined_dispatch_fn(stranger),
    ):
        with pytest.raises(RegistrationError, match=r"ONE_TO_ALL.*Dispatch\.STRANGER"):
            use()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("single_controller.base.decorator", ["make_nd_compute_dataproto_dispatch_fn"]),
        ("single_controller.base.decorator", ["dispatch_nd_compute", "collect_nd_compute"]),
        (
            "single_controller.base.decorator",
            ["dispatch_nd_compute_dataproto", "collect_nd_compute_dataproto"],
        ),
        (
            "single_controller.base.decorator",
            ["dispatch_lazy_compute_data_proto", "collect_lazy_compute_data_proto"],
        ),
        ("single_controller.base.worker_group", ["ResourcePool", "check_workers_alive"]),
        ("single_controller.base", ["ClassWithInitArgs", "ResourcePool", "Worker", "WorkerGroup"]),
        ("single_controller", ["ClassWithInitArgs", "ResourcePool", "Worker", "WorkerGroup"]),
    ],
)
def test_names_are_where_verls_programs_import_them_from(module: str, names: list[str]) -> None:
    assert [n for n in names if not hasattr(importlib.import_module(module), n)] == []


def test_a_worker_process_registers_methods_without_torch() -> None:
    program = (
        "import sys, single_controller.ray.host, single_controller.base.decorator\n"
        "print([name for name in ('torch', 'tensordict', 'protocol') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_register_without_parentheses_is_named() -> None:
    with pytest.raises(RegistrationError, match=r"parentheses: @register\(\) above act"):

        class Hasty(Worker):
            @register  # type: ignore[arg-type]  # what is refused
            def act(self) -> None: ...
