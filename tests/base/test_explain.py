"""What `explain` tells of a call, mode by mode, on groups that run in this process."""

from __future__ import annotations

import threading

import pytest
import torch

from single_controller.base.plan import Broadcast, PerRank
from single_controller.errors import DispatchError, UnknownMethodError
from tests.base.test_worker_group import Actor, LocalGroup, proto


@pytest.fixture
def group() -> LocalGroup:
    return LocalGroup(Actor, 4)


def test_each_ranks_rows_keys_and_bytes_are_told_and_nothing_is_sent(group: LocalGroup) -> None:
    told = group.explain("tag", proto(6))
    assert [(a.rank, a.name, a.type, a.rows, a.keys) for a in told.arguments] == [
        (rank, "data", "DataProto", rows, ("a",)) for rank, rows in enumerate([2, 2, 1, 1])
    ]
    large, small = told.arguments[0].bytes, told.arguments[2].bytes
    assert large is not None
    assert small is not None
    assert large - small == 8  # one int64
    assert (told.ranks, told.answers) == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert group.sent == []


def test_padding_and_shards_that_peers_share_are_told(group: LocalGroup) -> None:
    told = group.explain("mesh_tag", data=proto(3, auto_padding=True))
    assert [(a.rows, a.padding, a.shared_with) for a in told.arguments] == [
        (2, 0, (1,)),
        (2, 0, (0,)),
        (2, 1, (3,)),
        (2, 1, (2,)),
    ]
    assert told.answers == (0, 2)
    assert str(told).splitlines() == [
        "actor.mesh_tag(data: DataProto) -> DataProto [mesh 'm']",
        "rank  argument         rows           keys  bytes  travels",
        *(
            f"{rank}     data: DataProto  {rows:13}  a     {a.bytes}    by value, "
            f"shared with rank {peer}"
            for rank, rows, peer, a in zip(
                range(4),
                ["2", "2", "1 + 1 padding", "1 + 1 padding"],
                [1, 0, 3, 2],
                told.arguments,
                strict=True,
            )
        ),
        "calls ranks 0 … 3; returns one batch, the rows of ranks 0, 2, less the padding",
    ]
    assert set(group.methods) == {"_query_dispatch_info", "_query_collect_info"}


@pytest.mark.parametrize(
    ("method", "args", "last"),
    [
        ("where", ("x",), "calls ranks 0 … 3; returns the list of outputs of ranks 0 … 3"),
        ("head", ("x",), "calls rank 0; returns the output of rank 0"),
        ("first", ([1, 2],), "calls rank 0; returns the output of rank 0"),
        ("refs", (), "returns at once, references to the list of outputs of ranks 0 … 3"),
        ("later", (proto(4),), "returns a DataProtoFuture of ranks 0 … 3"),
        ("custom", (2,), "returns what <lambda> makes of the outputs of ranks 0 … 3"),
    ],
)
def test_what_comes_back_is_told_for_every_mode(
    group: LocalGroup, method: str, args: tuple[object, ...], last: str
) -> None:
    assert str(group.explain(method, *args)).endswith(last)
    assert group.sent == []


def test_a_users_dispatch_function_is_asked_for_the_ranks_arguments(group: LocalGroup) -> None:
    told = group.explain("custom", 2)
    assert [(a.rank, a.name) for a in told.arguments] == [(r, "argument[0]") for r in range(4)]
    assert told.mode == "<lambda>"


def test_rows_that_are_still_in_the_workers_are_not_waited_for(group: LocalGroup) -> None:
    future = group.later(proto(4, auto_padding=True))
    told = group.explain("tag", future)
    assert {(a.rows, a.keys, a.bytes, a.travels) for a in told.arguments} == {
        (None, None, None, "fetched by the rank")
    }


def test_arguments_keep_their_names_and_values_that_cannot_be_measured_their_place(
    group: LocalGroup,
) -> None:
    told = group.explain("execute_with_func_generator", max, proto(4), by=proto(4))
    assert [a.name for a in told.arguments[:3]] == ["func", "args[0]", "by"]
    told = group.where.explain(PerRank([threading.Lock(), 1, None, "x"]), y=Broadcast(proto(0)))
    assert told.arguments[0].bytes is None
    assert told.arguments[1].rows == 0


def test_some_ranks_are_explained_as_if_they_were_the_whole_group(group: LocalGroup) -> None:
    told = group.tag.options(ranks=[3, 1]).explain(proto(3))
    assert [(a.rank, a.rows) for a in told.arguments] == [(3, 2), (1, 1)]
    assert (told.ranks, told.answers) == ((3, 1), (3, 1))
    shared = group.where.options(ranks=[2, 1]).explain(torch.zeros(4))
    assert [a.shared_with for a in shared.arguments] == [(1,), (2,)]


def test_what_a_call_would_refuse_explain_refuses(group: LocalGroup) -> None:
    with pytest.raises(DispatchError, match="only support equal chunk"):
        group.explain("later", proto(3))
    with pytest.raises(TypeError, match=r"actor\.where"):
        group.explain("where")
    for name in ("wher", "close", "world_size"):
        with pytest.raises(UnknownMethodError, match="actor has no method"):
            group.explain(name)
