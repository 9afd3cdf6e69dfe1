"""The one pipeline of a call, on a group whose ranks are plain objects in this process."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from protocol import DataProto, DataProtoFuture
from protocol.batches import batch_rows, slice_batch
from single_controller.base import ClassWithInitArgs, Worker, WorkerGroup
from single_controller.base.custom import make_nd_compute_dataproto_dispatch_fn
from single_controller.base.decorator import Dispatch, Execute, register
from single_controller.base.method import CallFuture, CallOptions, Pending
from single_controller.base.plan import Broadcast, Call, PerRank
from single_controller.base.recorder import CallRecord
from single_controller.base.worker import WorkerContext, building
from single_controller.base.worker_group import check_workers_alive, worker_class
from single_controller.errors import DispatchError, RegistrationError, UnknownMethodError


@dataclass(frozen=True)
class Rows:
    batch: Any

    def rows(self, timeout: float | None) -> int:
        return batch_rows(self.batch)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Any:
        return slice_batch(self.batch, start, stop)


class Done(Pending):
    """A call that ran at once."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs, self.waited, self.cancelled = outputs, [], False  # type: ignore[var-annotated]

    def wait(self, timeout_s: float | None) -> list[Any]:
        self.waited.append(timeout_s)
        return self.outputs

    async def arrive(self) -> bool:
        return True

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        self.cancelled = True
        return True

    def handles(self, batched: bool) -> list[Any]:
        return [Rows(x) if batched else ("ref", x) for x in self.outputs]


class LocalGroup(WorkerGroup):
    """Runs every call at once and remembers what was sent."""

    role = "actor"

    def __init__(self, cls: type[Worker], size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workers: list[Any] = []
        self.sent: list[tuple[str, list[int], CallOptions, bool, bool]] = []
        for rank in range(size):
            with building(WorkerContext(rank=rank, world_size=size)):
                self.workers.append(cls())
        self._bind(cls)

    @property
    def world_size(self) -> int:
        return len(self.workers)

    def _submit(
        self,
        hosts: Any,
        method: str,
        calls: Sequence[Call | None],
        answers: Sequence[int],
        options: CallOptions,
        *,
        record: CallRecord,
        materialize: bool = True,
        reads_only: bool = False,
        transport: str = "host",
        deferred: bool = False,
        awaited: bool = False,
    ) -> Pending:
        ranks = [rank for rank, call in enumerate(calls) if call]
        self.sent.append((method, ranks, options, materialize, deferred))
        outputs = {
            rank: getattr(self.workers[rank], method)(*call.args, **call.kwargs)
            for rank, call in enumerate(calls)
            if call is not None
        }
        return Done([outputs[rank] for rank in answers])

    def _pickles(self, value: Any) -> object:
        return pickle.dumps(value)

    @property
    def methods(self) -> list[str]:
        return [sent[0] for sent in self.sent]


class Actor(Worker):
    def __init__(self) -> None:
        self.register_mesh(Mesh(self.rank), collect={"tp": 0}, mesh_name="m")  # type: ignore[arg-type]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def where(self, x: Any, *, y: int = 0) -> Any:
        """Says where it is."""
        return self.rank, x, y

    @register()
    def each(self, x: Any) -> Any:
        return self.rank, x

    @register(execute_mode=Execute.RANK_ZERO)
    def first(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def head(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    def tag(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"at": torch.full((len(data),), self.rank)})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False, materialize_futures=False)
    def later(self, data: DataProto) -> DataProto:
        return data

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
    mesh_dim_names = ("dp", "tp")
    shape = (2, 2)

    def get_coordinate(self) -> list[int]:
        return [self.rank // 2, self.rank % 2]


@pytest.fixture
def group() -> LocalGroup:
    return LocalGroup(Actor, 4)


def proto(rows: int, **options: Any) -> DataProto:
    return DataProto.from_dict({"a": torch.arange(rows)}, **options)


def at(batch: Any) -> list[int]:
    return batch.batch["at"].tolist()  # type: ignore[no-any-return]


def test_a_registered_method_is_bound_with_its_name_doc_and_signature(group: LocalGroup) -> None:
    assert (group.where.__name__, group.where.__doc__) == ("where", "Says where it is.")
    assert str(inspect.signature(group.where)) == "(x: 'Any', *, y: 'int' = 0) -> 'Any'"
    assert "actor.where(x" in repr(group.where)


def test_calls_go_through_their_mode(group: LocalGroup) -> None:
    assert group.where("x", y=2) == [(rank, "x", 2) for rank in range(4)]
    assert group.each([5, 6, 7, 8]) == [(0, 5), (1, 6), (2, 7), (3, 8)]
    assert group.each(PerRank("abcd"))[3] == (3, "d")
    assert group.each(Broadcast([1]))[3] == (3, [1])
    assert group.first([1, 2]) == (0, [1, 2])
    assert group.head("x") == (0, "x")
    assert at(group.tag(proto(6))) == [0, 0, 1, 1, 2, 3]
    assert group.custom(2) == ("actor", 12)
    assert [ranks for name, ranks, *_ in group.sent if name in ("first", "head")] == [[0], [0]]


def test_the_mesh_is_asked_for_once_and_only_collecting_ranks_answer(group: LocalGroup) -> None:
    assert at(group.mesh_tag(proto(4))) == at(group.mesh_tag(data=proto(4))) == [0, 0, 2, 2]
    assert sorted(set(group.methods)) == ["_query_collect_info", "_query_dispatch_info", "mesh_tag"]
    assert len(group.methods) == 4


def test_a_mesh_that_no_worker_registered_is_named(group: LocalGroup) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        group.lost(proto(4))


def test_a_function_runs_on_every_rank_or_on_rank_zero(group: LocalGroup) -> None:
    def double(worker: Actor, data: DataProto) -> DataProto:
        return DataProto.from_dict({"at": torch.full((2 * len(data),), worker.rank)})

    assert at(group.execute_with_func_generator(double, proto(4))) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert group.execute_func_rank_zero(max, [3, 4]) == 4


def test_without_blocking_a_batch_is_a_future_and_other_results_are_references(
    group: LocalGroup,
) -> None:
    future = group.later(proto(6, auto_padding=True))
    assert isinstance(future, DataProtoFuture)
    assert future.get().batch["a"].tolist() == list(range(6))
    assert group.refs() == [("ref", rank) for rank in range(4)]
    assert [(name, *flags) for name, _, _, *flags in group.sent] == [
        ("later", False, True),
        ("refs", True, False),
    ]


def test_a_submitted_call_can_be_awaited_asked_and_cancelled(group: LocalGroup) -> None:
    future = group.where.submit("x", timeout_s=3)
    assert isinstance(future, CallFuture)
    assert future.done()
    assert future.result(timeout=7) == [(rank, "x", 0) for rank in range(4)]
    assert future._pending.waited == [7]  # type: ignore[attr-defined]
    assert group.sent[-1][2] == CallOptions(timeout_s=3)

    async def ask() -> Any:
        return await group.tag.submit(proto(4))

    assert at(asyncio.run(ask())) == [0, 1, 2, 3]
    future.cancel()
    assert future._pending.cancelled  # type: ignore[attr-defined]


def test_submit_returns_at_once_and_merges_whatever_blocking_says(group: LocalGroup) -> None:
    future = group.later.submit(proto(4))
    assert isinstance(future, CallFuture)
    assert isinstance(future.result(), DataProto)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2), {}), ((1,), {"z": 3}), ((1,), {"x": 1})]
)
def test_wrong_arguments_are_a_type_error_before_anything_is_sent(
    group: LocalGroup, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    for call in (group.where, group.where.submit, group.where.options(ranks=[0])):
        with pytest.raises(TypeError, match=r"actor\.where\(x.*y.*\)"):
            call(*args, **kwargs)
    assert group.sent == []


def test_arguments_that_cannot_be_spread_send_nothing(group: LocalGroup) -> None:
    with pytest.raises(DispatchError, match="length 3"):
        group.each([1, 2, 3])
    with pytest.raises(DispatchError, match="only support equal chunk"):
        group.later(proto(3))
    assert group.sent == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("wher", ["did you mean 'where'?", "actor", "each, execute_func_rank_zero"]),
        ("zzz", ["actor has no method 'zzz'", "each"]),
        ("plain", ["Actor.plain is not registered", "@register(...)", "execute_all('plain'"]),
    ],
)
def test_a_method_that_is_not_bound_is_explained(
    group: LocalGroup, name: str, parts: list[str]
) -> None:
    for known in (UnknownMethodError, AttributeError):
        with pytest.raises(known) as caught:
            getattr(group, name)
        assert all(part in str(caught.value) for part in parts)
    assert ("did you mean" in str(caught.value)) is (name == "wher")
    assert not hasattr(group, name)


def test_a_method_that_the_worker_does_not_have_cannot_be_executed(group: LocalGroup) -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'where'"):
        group.execute_all_sync("wher")
    assert group.sent == []


def test_any_method_can_be_executed_registered_or_not(group: LocalGroup) -> None:
    refs = [("ref", rank + 1) for rank in range(4)]
    assert group.execute_all_sync("plain", x=1) == [1, 2, 3, 4]
    assert group.execute_all_sync("plain", PerRank([4, 3, 2, 1])) == [4] * 4
    assert group.execute_all("plain", 1) == group.execute_all_async("plain", 1) == refs
    assert group.execute_rank_zero_sync("plain", 5) == 5
    assert group.execute_rank_zero("plain", 5) == ("ref", 5)
    assert group.execute_rank_zero_async("plain", 5) == ("ref", 5)
    assert [ranks for _, ranks, *_ in group.sent][-3:] == [[0]] * 3
    assert group.execute_all_sync("where", "x", y=1)[2] == (2, "x", 1)


def test_some_ranks_are_called_as_if_they_were_the_whole_group(group: LocalGroup) -> None:
    assert group.where.options(ranks=[2, 1])("x") == [(2, "x", 0), (1, "x", 0)]
    assert group.each.options(ranks=(3, 0))(["a", "b"]) == [(3, "a"), (0, "b")]
    assert group.head.options(ranks=[2])("x") == (2, "x")
    assert at(group.tag.options(ranks=[1, 3])(proto(3))) == [1, 1, 3]
    assert at(group.tag.options(ranks=[3, 1])(proto(3))) == [3, 3, 1]
    assert at(group.mesh_tag.options(ranks=[2, 3])(proto(3))) == [2, 2, 2]
    assert [ranks for name, ranks, *_ in group.sent if name == "tag"] == [[1, 3], [1, 3]]
    with pytest.raises(DispatchError, match="collects"):
        group.mesh_tag.options(ranks=[1])(proto(2))


@pytest.mark.parametrize("ranks", [[4], [-1], [], [0, 9], [0, 0], 1, "01", [[0]]])
def test_ranks_that_the_group_does_not_have_once_are_refused(group: LocalGroup, ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"ranks must be some of 0 … 3, each once, .* got "):
        group.where.options(ranks=ranks)


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "soon"])
def test_a_timeout_that_is_no_time_is_refused_before_anything_is_sent(
    group: LocalGroup, timeout_s: Any
) -> None:
    for use in (
        lambda: group.where.options(timeout_s=timeout_s),
        lambda: group.where.submit("x", timeout_s=timeout_s),
    ):
        with pytest.raises(ValueError, match="timeout_s must be seconds, at least 0"):
            use()
    assert group.sent == []
    with pytest.raises(ValueError, match="timeout must be seconds, at least 0, or None; got "):
        group.where.submit("x").result(timeout_s)


def test_options_add_up_and_leave_the_method_as_it_was(group: LocalGroup) -> None:
    group.where.options(ranks=[1]).options(timeout_s=2)("x")
    group.where.options(timeout_s=2).options(ranks=[1], timeout_s=3)("x")
    group.where("x")
    assert [options for _, _, options, *_ in group.sent] == [
        CallOptions(2, (1,)),
        CallOptions(3, (1,)),
        CallOptions(),
    ]


def test_a_batch_is_not_changed_by_a_call(group: LocalGroup) -> None:
    batch = proto(3, auto_padding=True, meta_info={"step": 1})
    group.later(batch).get()
    assert batch.equal(proto(3, auto_padding=True, meta_info={"step": 1}))


@pytest.mark.parametrize("name", ["world_size", "execute_all", "role", "_submit"])
def test_a_method_cannot_have_the_name_of_what_every_group_has(name: str) -> None:
    cls = type("Clash", (Worker,), {name: register()(lambda self: None)})
    with pytest.raises(RegistrationError, match=rf"Clash\.{name}.*rename"):
        LocalGroup(cls, 1)


@pytest.mark.parametrize("cls", [object, 3, None, Actor()])
def test_only_subclasses_of_worker_can_be_roles(cls: Any) -> None:
    assert worker_class(Actor, "actor") is Actor
    with pytest.raises(RegistrationError, match=r"role 'actor'.*Worker"):
        worker_class(cls, "actor")


def test_a_class_with_arguments_is_constructed_when_it_is_called() -> None:
    spec = ClassWithInitArgs(dict, [("a", 1)], b=2)
    assert (spec.cls, spec.args, spec.kwargs) == (dict, ([("a", 1)],), {"b": 2})
    assert spec() == {"a": 1, "b": 2}
    assert repr(spec) == "ClassWithInitArgs(dict)"


def test_the_aliveness_check_returns_when_a_worker_has_died() -> None:
    answers = iter([True, True, True, False])
    check_workers_alive(["a", "b"], lambda _: next(answers), gap_time=0.001)
    assert list(answers) == []
