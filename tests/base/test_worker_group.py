"""The one pipeline of a call, from the user's arguments to the merged result, and what `explain`
tells of it beforehand, on groups in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from protocol import DataProto
from single_controller import (
    Broadcast,
    ClassWithInitArgs,
    DispatchError,
    PerRank,
    RegistrationError,
    UnknownMethodError,
    Worker,
)
from single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.base.worker_group import check_workers_alive
from single_controller.inline import InlineWorkerGroup
from single_controller.testing import InlineGroups

sent: list[tuple[str, int]] = []  # what ran on which rank


class Actor(Worker):
    def __init__(self) -> None:
        self.register_mesh(Mesh(self.rank), collect={"tp": 0}, mesh_name="m")  # type: ignore[arg-type]

    def _query_dispatch_info(self, mesh_name: str) -> int:
        sent.append(("mesh", self.rank))
        return super()._query_dispatch_info(mesh_name)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def where(self, x: Any, *, y: int = 0) -> Any:
        """Says where it is."""
        sent.append(("where", self.rank))
        return self.rank, x, y

    @register()
    def each(self, x: Any) -> Any:
        sent.append(("each", self.rank))
        return self.rank, x

    @register(execute_mode=Execute.RANK_ZERO)
    def first(self, x: Any) -> Any:
        sent.append(("first", self.rank))
        return self.rank, x

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def head(self, x: Any) -> Any:
        sent.append(("head", self.rank))
        return self.rank, x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    def tag(self, data: DataProto) -> DataProto:
        sent.append(("tag", self.rank))
        return DataProto.from_dict({"at": torch.full((len(data),), self.rank)})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def later(self, data: DataProto) -> DataProto:
        sent.append(("later", self.rank))
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, materialize_futures=False)
    def kind(self, data: Any) -> str:
        return type(data).__name__

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def refs(self) -> int:
        return self.rank

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("m"))
    def mesh_tag(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"at": torch.full((len(data),), self.rank)})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("nowhere"))
    def lost(self, data: DataProto) -> DataProto:
        return data

    @register(
        dispatch_mode={
            "dispatch_fn": lambda group, n: (([n * rank for rank in range(group.world_size)],), {}),
            "collect_fn": lambda group, output: (group.role, sum(output)),
        }
    )
    def custom(self, n: int) -> int:
        return n

    def plain(self, x: int = 0) -> int:
        return self.rank + x


@dataclass
class Mesh:
    """A mesh of dp × tp with two tp ranks, as seen from one rank."""

    rank: int
    mesh_dim_names: ClassVar = ("dp", "tp")
    shape: ClassVar = (2, 2)

    def get_coordinate(self) -> list[int]:
        return [self.rank // 2, self.rank % 2]


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with InlineGroups() as groups:
        yield groups(Actor, ranks=4)


@pytest.fixture
def group(started: Any) -> Any:
    sent.clear()
    return started


def proto(rows: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"a": torch.arange(rows)}, **options)


def at(batch: Any) -> list[int]:
    return batch.batch["at"].tolist()  # type: ignore[no-any-return]


def test_the_mesh_is_asked_for_once_and_only_collecting_ranks_answer(
    inline_group: InlineGroups,
) -> None:
    group: Any = inline_group(Actor, ranks=4)
    sent.clear()
    assert at(group.mesh_tag(proto(4))) == at(group.mesh_tag(data=proto(4))) == [0, 0, 2, 2]
    assert sent == [("mesh", rank) for rank in range(4)]
    group._collect_info["m"] = [False, True, False, True]  # as veRL's programs may
    assert at(group.mesh_tag(proto(4))) == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="nowhere"):
        group.lost(proto(4))


def test_a_method_that_wants_a_future_gets_it_and_submit_waits_for_the_batch(group: Any) -> None:
    batch = proto(6, auto_padding=True, meta_info={"step": 1})
    future = group.later(batch)
    assert group.kind(future) == ["DataProtoFuture"] * 4
    assert batch.equal(proto(6, auto_padding=True, meta_info={"step": 1}))
    assert isinstance(group.later.submit(proto(4)).result(), DataProto)


@pytest.mark.parametrize(
    ("method", "args", "error"),
    [
        ("where", (), TypeError),
        ("where", (1, 2), TypeError),
        ("each", ([1, 2, 3],), DispatchError),
        ("later", (proto(3),), DispatchError),
    ],
)
def test_what_cannot_be_a_call_sends_nothing_however_it_is_made(
    group: Any, method: str, args: tuple[Any, ...], error: type[Exception]
) -> None:
    bound = getattr(group, method)
    for call in (bound, bound.submit, bound.options(ranks=[0, 1])):
        with pytest.raises(error, match=rf"Actor\.{method}\("):
            call(*args)
    assert sent == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("wher", ["Actor has no method 'wher'; it has", "each, execute_func_rank_zero", "where"]),
        ("plain", ["Actor.plain is not registered", "@register(...)", "execute_all('plain'"]),
    ],
)
def test_a_method_that_is_not_bound_is_explained(group: Any, name: str, parts: list[str]) -> None:
    assert "Actor.where(x" in repr(group.where)
    uses = [lambda: getattr(group, name), lambda: group.explain(name)]
    if name != "plain":
        uses += [lambda: group.execute_all_sync(name), lambda: group.execute_rank_zero(name)]
    for use in uses:
        with pytest.raises(AttributeError) as caught:
            use()
        assert isinstance(caught.value, UnknownMethodError)
        assert all(part in str(caught.value) for part in parts)
    assert not hasattr(group, name)


def test_some_ranks_are_called_as_if_they_were_the_whole_group(group: Any) -> None:
    assert group.where.options(ranks=[2, 1])("x") == [(2, "x", 0), (1, "x", 0)]
    assert group.each.options(ranks=(3, 0))(["a", "b"]) == [(3, "a"), (0, "b")]
    assert group.head.options(ranks=[2])("x") == (2, "x")
    assert at(group.tag.options(ranks=[3, 1])(proto(3))) == [3, 3, 1]
    assert at(group.mesh_tag.options(ranks=[2, 3])(proto(3))) == [2, 2, 2]
    assert sorted(call for call in sent if call[0] == "tag") == [("tag", 1), ("tag", 3)]
    with pytest.raises(DispatchError, match="collects"):
        group.mesh_tag.options(ranks=[1])(proto(2))
    sent.clear()
    assert group.where.options(ranks=[1]).options(timeout_s=2)("x") == [(1, "x", 0)]
    group.where("x")
    assert sent == [("where", rank) for rank in (1, 0, 1, 2, 3)]


@pytest.mark.parametrize("ranks", [[4], [-1], [], [0, 9], [0, 0], "01"])
def test_ranks_that_the_group_does_not_have_once_are_refused(group: Any, ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"ranks must be some of 0 … 3, each once, .* got "):
        group.where.options(ranks=ranks)


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "soon"])
def test_a_timeout_that_is_no_time_is_refused(group: Any, timeout_s: Any) -> None:
    for use in (group.where.options, group.where.submit):
        with pytest.raises(ValueError, match="timeout_s must be seconds, at least 0"):
            use(timeout_s=timeout_s)
    assert sent == []
    with pytest.raises(ValueError, match="timeout must be seconds, at least 0, or None; got "):
        group.where.submit("x").result(timeout_s)


@pytest.mark.parametrize("name", ["world_size", "execute_all", "role", "_submit"])
def test_a_method_cannot_have_the_name_of_what_every_group_has(name: str) -> None:
    cls = type("Clash", (Worker,), {name: register()(lambda self: None)})
    with pytest.raises(RegistrationError, match=rf"Clash\.{name}.*rename"):
        InlineWorkerGroup(None, ClassWithInitArgs(cls))


def test_a_class_with_arguments_is_constructed_when_it_is_called() -> None:
    spec = ClassWithInitArgs(dict, [("a", 1)], b=2)
    assert (spec.cls, spec.args, spec.kwargs) == (dict, ([("a", 1)],), {"b": 2})
    assert (spec(), repr(spec)) == ({"a": 1, "b": 2}, "ClassWithInitArgs(dict)")
    for cls in (dict, 3, None):
        with pytest.raises(RegistrationError, match=r"role .* needs a subclass of .*Worker"):
            ClassWithInitArgs(cls).roles()  # type: ignore[arg-type]


def test_the_aliveness_check_returns_when_a_worker_has_died() -> None:
    answers = iter([True, True, True, False])
    check_workers_alive(["a", "b"], lambda _: next(answers), gap_time=0.001)
    assert list(answers) == []


def test_what_ranks_would_get_and_who_answers_is_told_and_nothing_is_sent(group: Any) -> None:
    told = group.explain("tag", proto(6))
    assert [(a.ranks, a.name, a.type, a.rows, a.keys) for a in told.arguments] == [
        ((rank,), "data", "DataProto", rows, ("a",)) for rank, rows in enumerate([2, 2, 1, 1])
    ]
    assert told.arguments[0].bytes - told.arguments[2].bytes == 8  # one int64
    assert told.ranks == told.answers == (0, 1, 2, 3)
    assert str(group.explain("first", [1, 2])).endswith("\nranks called: 0")
    assert str(group.explain("refs")).endswith("bytes\nranks called: 0 … 3")
    assert sent == []


def test_ranks_that_get_the_same_shard_are_told_together_and_it_prints_as_a_table(
    group: Any,
) -> None:
    told = str(group.explain("mesh_tag", data=proto(3, auto_padding=True))).splitlines()
    assert [line.split()[:4] for line in told[1:4]] == [
        ["ranks", "argument", "rows", "keys"],
        ["0,", "1", "data:", "DataProto"],
        ["2,", "3", "data:", "DataProto"],
    ]
    assert told[0] == "Actor.mesh_tag(data: DataProto) -> DataProto [mesh 'm']"
    assert told[4] == "ranks called: 0 … 3; answers of: 0, 2"
    assert set(sent) <= {("mesh", rank) for rank in range(4)}


def test_arguments_are_told_under_the_workers_names_whatever_is_known_of_them(group: Any) -> None:
    told = group.explain("custom", 2)
    assert [(a.ranks, a.name) for a in told.arguments] == [((r,), "n") for r in range(4)]
    assert told.title.endswith("[<lambda>]")
    told = group.explain("where", PerRank([threading.Lock(), 1, None, "x"]), y=Broadcast(proto(0)))
    assert [(a.ranks, a.rows) for a in told.arguments if a.name == "y"] == [((0, 1, 2, 3), 0)]
    assert told.arguments[0].bytes is None
    future = group.later(proto(4, auto_padding=True))  # whose rows are not waited for
    told = group.explain("tag", future)
    assert {(a.rows, a.keys, a.bytes) for a in told.arguments} == {(None, None, None)}
