"""Calls in every mode: what ranks get, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from protocol import DataProto, DataProtoConfig
from single_controller import Broadcast, DispatchError, UnknownMethodError, WorkerError
from single_controller.base import PerRank, Worker
from tests.conformance.conftest import Backend
from tests.conformance.probe import batch, values


def test_one_to_all_gives_every_rank_everything(group: Any) -> None:
    assert group.echo([1, 2], y="z") == [(0, [1, 2], "z"), (1, [1, 2], "z")]
    assert group.echo(PerRank("ab")) == [(0, "a", None), (1, "b", None)]


def test_all_to_all_scatters_lists_of_one_element_per_rank(group: Any) -> None:
    assert group.scatter([1, 2], y=[3, 4]) == [(0, 1, 3), (1, 2, 4)]
    assert group.scatter(1) == [(0, 1, None), (1, 1, None)]
    with pytest.raises(DispatchError, match=r"Probe.scatter.*list of length 3.*2 ranks"):
        group.scatter([1, 2, 3])


def test_rank_zero_modes_call_rank_zero_alone(group: Any) -> None:
    assert group.lead([1, 2]) == (0, [1, 2])
    assert group.lead_too([1, 2]) == (0, [1, 2])


def test_a_direct_method_is_refused_on_the_group(group: Any) -> None:
    with pytest.raises(NotImplementedError, match="Direct rollout call is forbidden"):
        group.direct()


def test_a_batch_is_split_computed_on_and_merged(group: Any) -> None:
    out = group.add_rank(batch(meta_info={"step": 3}))
    assert values(out) == [0, 1, 2, 4, 5, 6]
    assert out.non_tensor_batch["s"].tolist() == ["s0@0", "s1@0", "s2@0", "s3@1", "s4@1", "s5@1"]
    assert out.meta_info == {"step": 3, "metrics": {"rank": [0, 1]}}


def test_a_tensordict_is_split_and_merged_too(group: Any) -> None:
    jagged = torch.nested.as_nested_tensor(
        [torch.ones(n) * n for n in (1, 2, 3, 1)], layout=torch.jagged
    )
    sent = TensorDict({"a": torch.zeros(4), "j": jagged}, batch_size=[4])
    out = group.add_rank(data=sent)
    assert out["a"].tolist() == [0, 0, 1, 1]
    assert [part.tolist() for part in out["j"].unbind()] == [[1], [2, 2], [3, 3, 3], [1]]


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


def test_rows_that_do_not_divide_are_refused_with_both_ways_out(group: Any) -> None:
    with pytest.raises(
        DispatchError, match=r"(?s)only support equal chunk.*7.*2.*uneven=True.*auto_padding=True"
    ):
        group.add_rank(batch(7))
    with pytest.raises(AssertionError):
        group.add_rank(batch(7))


def by_hand() -> DataProto:
    data = batch(4)
    data.non_tensor_batch["q"] = np.zeros(9)
    return data


@pytest.mark.parametrize(
    ("method", "make"),
    [
        *((m, lambda data: data) for m in ("add_rank", "add_rank_later", "uneven_rows", "metric")),
        *((m, lambda data: data) for m in ("replicated", "meshed", "echo", "scatter", "lead")),
        ("scatter", lambda data: [batch(1), data]),
        ("add_rank", Broadcast),
        ("echo", lambda data: PerRank([data, batch(1)])),
        ("each", lambda data: [data, data]),
    ],
)
def test_a_batch_that_was_made_inconsistent_by_hand_is_refused_before_it_is_sent(
    group: Any, method: str, make: Callable[[DataProto], Any]
) -> None:
    wrong = r"argument 0.*: key q length 9 is not equal to batch size 4"
    with pytest.raises(DispatchError, match=wrong):
        getattr(group, method)(make(by_hand()))


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


def test_padding_of_one_of_several_batches_never_reaches_the_caller(group: Any) -> None:
    plain, padded = batch(3), batch(3, auto_padding=True)
    for first, second in ((plain, padded), (padded, plain)):
        assert values(group.second(first, second)) == [0, 1, 2]
        assert values(group.second_later(first, second=second).get()) == [0, 1, 2]


def test_batches_that_differ_in_rows_are_refused_before_anything_is_sent(group: Any) -> None:
    before = group.count()
    with pytest.raises(
        DispatchError, match=r"second.*argument 0 has 4, argument 'second' has 3.*Broadcast"
    ):
        group.second(batch(4), second=batch(3, auto_padding=True))
    assert group.count() == before
    assert values(group.second(Broadcast(batch(5)), batch(4))) == [0, 1, 2, 3]


def test_outputs_that_are_no_batch_are_refused_with_advice(group: Any) -> None:
    with pytest.raises(DispatchError, match=r"rank 0 returned int.*DP_COMPUTE_METRIC"):
        group.no_batch(batch())


def test_arguments_that_are_no_batch_are_refused_by_name(group: Any) -> None:
    with pytest.raises(DispatchError, match=r"add_rank.*argument 0 must be a DataProto.*got int"):
        group.add_rank(3)


def test_ranks_of_one_dp_group_get_the_same_shard_and_one_of_them_answers(
    group: Any,
) -> None:
    assert values(group.replicated(data=batch(3))) == [1, 2, 3]
    assert values(group.meshed(batch(4))) == [0, 1, 3, 4]


def test_a_mesh_that_no_worker_registered_is_named_with_the_known_ones(
    group: Any,
) -> None:
    with pytest.raises(WorkerError, match=r"mesh 'absent' is not registered.*\['dp', 'tp'\]"):
        group.lost(batch())


def test_a_worker_may_write_into_what_it_received(group: Any) -> None:
    shared = DataProto.from_dict({"a": torch.zeros(4, 1000)})
    before = shared.batch["a"].clone()
    group.replicated(shared)
    assert torch.equal(shared.batch["a"], before)


def test_arguments_outside_of_batches_are_private_and_writable_too(group: Any) -> None:
    shared = {"a": np.zeros(100_000), "t": torch.zeros(100_000)}
    assert group.write(shared) == [2.0, 2.0]
    assert shared["a"].sum() == 0


def test_a_method_that_only_reads_gets_views_of_what_its_sender_cannot_write(group: Any) -> None:
    given = {"a": np.zeros(100_000), "t": torch.zeros(100_000)}
    assert group.look(given) == [(False, 0.0)] * 2
    given["t"] += 1
    assert group.look(given) == [(False, 0.0)] * 2


def test_a_method_under_a_decorator_that_hides_its_signature_can_be_called(
    group: Any,
) -> None:
    assert group.hidden(1, y=2) == [(0, 1, 2), (1, 1, 2)]


def test_attributes_of_workers_may_have_the_names_of_ours(group: Any) -> None:
    assert group.execute_all_sync("own_device") == ["mine"] * 2


def test_wrong_arguments_are_a_type_error_before_anything_is_sent(group: Any) -> None:
    before = group.count()
    with pytest.raises(TypeError, match=r"Probe.echo\(x: .*\).*: missing a required argument: 'x'"):
        group.echo()
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        group.echo(1, z=2)
    assert group.count() == before


def test_an_unregistered_method_is_answered_with_the_nearest_one(group: Any) -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'add_rank'"):
        group.add_ranks(batch())
    with pytest.raises(AttributeError, match=r"unregistered is not registered.*@register"):
        group.unregistered(1)


def test_execute_all_and_rank_zero_run_unregistered_methods_too(
    backend: Backend, group: Any
) -> None:
    assert group.execute_all_sync("unregistered", 5) == [0, 5]
    assert backend.get(group.execute_all_async("unregistered", x=5)) == [0, 5]
    assert backend.get(group.execute_all("unregistered", 5)) == [0, 5]
    assert group.execute_rank_zero_sync("unregistered", 5) == 0
    assert backend.get(group.execute_rank_zero("unregistered", 5)) == 0
    assert group.execute_all_sync("echo", [1, 2]) == [(0, [1, 2], None), (1, [1, 2], None)]
    with pytest.raises(UnknownMethodError, match="did you mean"):
        group.execute_all_sync("ecko")


def test_functions_run_on_workers(group: Any) -> None:
    def scaled(worker: Worker, data: DataProto, by: DataProto) -> DataProto:
        data.batch["a"] = data.batch["a"] * 10 + worker.rank + by.batch["a"]
        return data

    out = group.execute_with_func_generator(scaled, batch(2), by=batch(2))
    assert values(out) == [0, 12]
    assert group.execute_func_rank_zero(lambda x: x + 1, 1) == 2
