"""Calls in every mode: what ranks get, what comes back, and what cannot be sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from protocol import DataProto, DataProtoConfig
from single_controller import Broadcast, DispatchError, SendError, WorkerError
from single_controller.base import PerRank, Worker
from tests.conformance.conftest import Backend
from tests.conformance.probe import batch, values

UNEQUAL = "only support equal chunk"


def test_each_mode_gives_ranks_their_arguments_and_returns_in_its_shape(group: Any) -> None:
    assert group.echo([1, 2], y="z") == [(0, [1, 2], "z"), (1, [1, 2], "z")]
    assert group.echo(PerRank("ab")) == [(0, "a", None), (1, "b", None)]
    assert group.scatter([1, 2], y=[3, 4]) == [(0, 1, 3), (1, 2, 4)]
    assert group.scatter(1) == [(0, 1, None), (1, 1, None)]
    assert group.lead([1, 2]) == group.lead_too([1, 2]) == (0, [1, 2], None)
    assert group.hidden(1, y=2) == [(0, 1, 2), (1, 1, 2)]
    assert group.execute_all_sync("own_device") == ["mine"] * 2


def test_a_batch_is_split_computed_on_and_merged(group: Any) -> None:
    out = group.add_rank(batch(meta_info={"step": 3}))
    assert values(out) == [0, 1, 2, 4, 5, 6]
    assert out.non_tensor_batch["s"].tolist() == ["s0@0", "s1@0", "s2@0", "s3@1", "s4@1", "s5@1"]
    assert out.meta_info == {"step": 3, "metrics": {"rank": [0, 1]}}
    jagged = torch.nested.as_nested_tensor(
        [torch.ones(n) * n for n in (1, 2, 3, 1)], layout=torch.jagged
    )
    table = group.add_rank(data=TensorDict({"a": torch.zeros(4), "j": jagged}, batch_size=[4]))
    assert table["a"].tolist() == [0, 0, 1, 1]
    assert [part.tolist() for part in table["j"].unbind()] == [[1], [2, 2], [3, 3, 3], [1]]
    assert values(group.replicated(data=batch(3))) == [1, 2, 3]  # one dp rank; rank 1 answers
    assert values(group.meshed(batch(4))) == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda g: g.scatter([1, 2, 3]), DispatchError, "Probe.scatter.*of length 3.*2 ranks"),
        (lambda g: g.direct(1), NotImplementedError, "Direct rollout call is forbidden"),
        (
            lambda g: g.add_rank(batch(7)),
            AssertionError,
            f"(?s){UNEQUAL}.*7.*2.*uneven=.*padding=T",
        ),
        (
            lambda g: g.second(batch(4), second=batch(3, auto_padding=True)),
            DispatchError,
            r"second.*argument 0 has 4, argument 'second' has 3.*Broadcast",
        ),
        (lambda g: g.add_rank(3), DispatchError, "add_rank.*argument 0 must be a Data.*got int"),
        (lambda g: g.lost(batch()), WorkerError, r"mesh 'absent' is not reg.*\['dp', 'tp'\]"),
        (lambda g: g.echo(), TypeError, r"Probe.echo\(x: .*\).*: missing a req.* argument: 'x'"),
    ],
)
def test_what_cannot_be_a_call_is_refused_and_no_rank_is_called(
    group: Any, call: Callable[[Any], Any], error: type[Exception], match: str
) -> None:
    before = group.count()
    with pytest.raises(error, match=match):
        call(group)
    assert group.count() == before


def test_outputs_that_are_no_batch_are_refused_with_advice(group: Any) -> None:
    with pytest.raises(DispatchError, match=r"rank 0 returned int.*DP_COMPUTE_METRIC"):
        group.no_batch(batch())


def test_a_batch_that_was_made_inconsistent_by_hand_is_refused_before_it_is_sent(
    group: Any,
) -> None:
    data = batch(4)
    data.non_tensor_batch["q"] = np.zeros(9)
    plain = "add_rank", "add_rank_later", "uneven_rows", "metric", "replicated", "meshed"
    for method, given in (
        *((method, data) for method in (*plain, "echo", "scatter", "lead")),
        ("add_rank", Broadcast(data)),
    ):
        wrong = f"{method}.*argument 0.*: key q length 9 is not equal to batch size 4"
        with pytest.raises(DispatchError, match=wrong):
            getattr(group, method)(given)
    with pytest.raises(ValueError, match="key q length 9 is not equal to batch size 4"):
        group.each([data, data])  # where it arrives


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_uneven_rows_come_back_in_order(group: Any, rows: int) -> None:
    out = group.uneven_rows(batch(rows))
    assert values(out) == list(range(rows))
    assert out.meta_info["metrics"] == {"rows": [rows - rows // 2, rows // 2]}


def test_padding_never_reaches_the_caller(group: Any) -> None:
    data = batch(5, auto_padding=True)
    assert values(group.add_rank(data)) == [0, 1, 2, 4, 5]
    assert values(group.add_rank_later(data).get()) == [0, 1, 2, 4, 5]
    assert group.metric(data) == [{"sum": 3.0, "rank": 0}, {"sum": 11.0, "rank": 1}]
    assert len(data) == 5
    plain, padded = batch(3), batch(3, auto_padding=True)
    for first, second in ((plain, padded), (padded, plain)):
        assert values(group.second(first, second)) == [0, 1, 2]
        assert values(group.second_later(first, second=second).get()) == [0, 1, 2]
    assert values(group.second(Broadcast(batch(5)), batch(4))) == [0, 1, 2, 3]


def pads() -> bool:
    return DataProtoConfig.auto_padding


def test_padding_that_the_driver_sets_holds_in_the_workers_until_it_is_unset(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    try:
        for setting in (None, True, False, None):
            DataProtoConfig.auto_padding = setting
            found.append(group.execute_func_rank_zero(pads))
    finally:
        DataProtoConfig.auto_padding = None
    monkeypatch.setenv("VERL_AUTO_PADDING", "true")
    found.append(group.execute_func_rank_zero(pads))
    monkeypatch.delenv("VERL_AUTO_PADDING")
    found.append(group.execute_func_rank_zero(pads))
    assert found == [False, True, False, False, True, False]


def test_a_worker_may_write_into_what_it_received(group: Any) -> None:
    data = DataProto.from_dict({"a": torch.zeros(4, 1000)})
    group.replicated(data)
    assert not data.batch["a"].any()
    shared = {"a": np.zeros(100_000), "t": torch.zeros(100_000)}
    assert group.write(shared) == [2.0, 2.0]
    assert shared["a"].sum() == 0


def test_a_method_that_only_reads_gets_views_of_what_its_sender_cannot_write(group: Any) -> None:
    given = {"a": np.zeros(100_000), "t": torch.zeros(100_000)}
    assert group.look(given) == [(False, 0.0)] * 2
    given["t"] += 1
    assert group.look(given) == [(False, 0.0)] * 2


def test_execute_all_and_rank_zero_run_unregistered_methods_too(
    backend: Backend, group: Any
) -> None:
    assert group.execute_all_sync("unregistered", 5) == [0, 5]
    assert backend.get(group.execute_all_async("unregistered", x=5)) == [0, 5]
    assert backend.get(group.execute_all("unregistered", 5)) == [0, 5]
    assert group.execute_rank_zero_sync("unregistered", 5) == 0
    assert backend.get(group.execute_rank_zero("unregistered", 5)) == 0
    assert group.execute_all_sync("echo", [1, 2]) == [(0, [1, 2], None), (1, [1, 2], None)]


def test_functions_run_on_workers(group: Any) -> None:
    def scaled(worker: Worker, data: DataProto, by: DataProto) -> DataProto:
        data.batch["a"] = data.batch["a"] * 10 + worker.rank + by.batch["a"]
        return data

    out = group.execute_with_func_generator(scaled, batch(2), by=batch(2))
    assert values(out) == [0, 12]
    assert group.execute_func_rank_zero(lambda x: x + 1, 1) == 2


LOCK = threading.Lock()


def with_lock() -> DataProto:
    data = batch(4)
    data.non_tensor_batch["o"] = np.array([None, None, None, {"lock": LOCK}], dtype=object)
    return data


def circle() -> list[Any]:
    found: list[Any] = [LOCK]
    found.insert(0, found)
    return found


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "argument": (lambda g: g.lead(LOCK), "0"),
    "in containers": (lambda g: g.echo({"a": [1, (LOCK,)]}), "0"),
    "in a value that holds itself": (lambda g: g.echo(circle()), "0"),
    "for one rank": (lambda g: g.scatter(PerRank([1, LOCK])), "0"),
    "in a row": (lambda g: g.add_rank(with_lock()), "0"),
    "submitted": (lambda g: g.add_rank.submit(data=with_lock()), "'data'"),
    "in meta_info": (lambda g: g.add_rank(batch(4, meta_info={"l": LOCK})), "0"),
    "in a TensorDict": (lambda g: g.echo(TensorDict({"o": NonTensorData(LOCK)}, [4])), "0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_pickled_is_named_and_no_rank_is_called(group: Any, case: str) -> None:
    call, where = CASES[case]
    before = group.count()
    error = rf"^Probe\.\w+.*: argument {where}.* cannot be sent: cannot pickle '_thread\.lock'"
    with pytest.raises(SendError, match=error) as caught:
        call(group)
    assert isinstance(caught.value, TypeError)
    assert group.count() == before
    assert group.echo(1) == [(0, 1, None), (1, 1, None)]
