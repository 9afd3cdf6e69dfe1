"""Calls through Ray: what travels, what comes back, in which of the forms a call has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tensordict import TensorDict

from protocol import DataProto, DataProtoFuture
from single_controller import CallTimeoutError, DispatchError, UnknownMethodError, WorkerError
from single_controller.base import PerRank, Worker
from single_controller.base.custom import make_nd_compute_dataproto_dispatch_fn
from single_controller.base.decorator import Dispatch, Execute, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from single_controller.ray import calls as calls_module


class Probe(Worker):
    def __init__(self, meshes: bool = True) -> None:
        super().__init__()
        self.calls = 0
        if meshes:
            self._register_dispatch_collect_info("tp", dp_rank=0, is_collect=self.rank == 1)
            self._register_dispatch_collect_info("dp", dp_rank=self.rank, is_collect=True)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def count(self) -> int:
        return self.calls

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def echo(self, x: Any, y: Any = None) -> Any:
        self.calls += 1
        return self.rank, x, y

    @register()
    def scatter(self, x: Any, y: Any = None) -> Any:
        return self.rank, x, y

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def lead(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def lead_too(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def later(self, x: Any) -> Any:
        return self.rank, x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add_rank(self, data: Any) -> Any:
        if isinstance(data, DataProto):
            data.batch["a"] += self.rank
            data.non_tensor_batch["s"] = data.non_tensor_batch["s"] + f"@{self.rank}"
            data.meta_info["metrics"] = {"rank": self.rank}
        else:
            data["a"] = data["a"] + self.rank
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def add_rank_later(self, data: DataProto) -> DataProto:
        return self.add_rank(data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True, blocking=False)
    def grow(self, data: DataProto) -> DataProto:
        return data.repeat(1 + self.rank)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    def uneven_rows(self, data: DataProto) -> DataProto:
        data.meta_info["metrics"] = {"rows": len(data)}
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def metric(self, data: DataProto) -> dict[str, float]:
        return {"sum": data.batch["a"].sum().item(), "rank": self.rank}

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def no_batch(self, data: DataProto) -> int:
        return 3

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("tp"))
    def replicated(self, data: DataProto) -> DataProto:
        data.batch["a"] += self.rank
        return data

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("dp"))
    def meshed(self, data: DataProto) -> DataProto:
        return self.add_rank(data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("absent"))
    def lost(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=Dispatch.DIRECT_ROLLOUT_METHOD)
    def direct(self) -> None: ...

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def block(self, seconds: float) -> None:
        import threading

        threading.Event().wait(seconds)

    def unregistered(self, x: int) -> int:
        return self.rank * x


@pytest.fixture(scope="module")
def group(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Probe)) as two:
        yield two


@pytest.fixture(scope="module")
def three(cluster: None) -> Iterator[RayWorkerGroup]:
    with (
        RayResourcePool([3], cpus_per_process=0.5) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Probe, meshes=False)) as group,
    ):
        yield group


def batch(rows: int = 6, **options: Any) -> DataProto:
    strings = np.array([f"s{i}" for i in range(rows)], dtype=object)
    return DataProto.from_dict({"a": torch.arange(float(rows))}, {"s": strings}, **options)


def values(data: DataProto) -> list[float]:
    return data.batch["a"].tolist()


def test_one_to_all_gives_every_rank_everything(group: RayWorkerGroup) -> None:
    assert group.echo([1, 2], y="z") == [(0, [1, 2], "z"), (1, [1, 2], "z")]
    assert group.echo(PerRank("ab")) == [(0, "a", None), (1, "b", None)]


def test_all_to_all_scatters_lists_of_one_element_per_rank(group: RayWorkerGroup) -> None:
    assert group.scatter([1, 2], y=[3, 4]) == [(0, 1, 3), (1, 2, 4)]
    assert group.scatter(1) == [(0, 1, None), (1, 1, None)]
    with pytest.raises(DispatchError, match=r"Probe.scatter.*list of length 3.*2 ranks"):
        group.scatter([1, 2, 3])


def test_rank_zero_modes_call_rank_zero_alone(group: RayWorkerGroup) -> None:
    assert group.lead([1, 2]) == (0, [1, 2])
    assert group.lead_too([1, 2]) == (0, [1, 2])


def test_a_direct_method_is_refused_on_the_group(group: RayWorkerGroup) -> None:
    with pytest.raises(NotImplementedError, match="Direct rollout call is forbidden"):
        group.direct()


def test_without_blocking_references_come_in_the_shape_of_the_result(
    group: RayWorkerGroup,
) -> None:
    assert ray.get(group.later("x")) == [(0, "x"), (1, "x")]


def test_a_batch_is_split_computed_on_and_merged(group: RayWorkerGroup) -> None:
    out = group.add_rank(batch(meta_info={"step": 3}))
    assert values(out) == [0, 1, 2, 4, 5, 6]
    assert out.non_tensor_batch["s"].tolist() == ["s0@0", "s1@0", "s2@0", "s3@1", "s4@1", "s5@1"]
    assert out.meta_info == {"step": 3, "metrics": {"rank": [0, 1]}}


def test_a_tensordict_is_split_and_merged_too(group: RayWorkerGroup) -> None:
    jagged = torch.nested.as_nested_tensor(
        [torch.ones(n) * n for n in (1, 2, 3, 1)], layout=torch.jagged
    )
    sent = TensorDict({"a": torch.zeros(4), "j": jagged}, batch_size=[4])
    out = group.add_rank(data=sent)
    assert out["a"].tolist() == [0, 0, 1, 1]
    assert [part.tolist() for part in out["j"].unbind()] == [[1], [2, 2], [3, 3, 3], [1]]


def test_rows_that_do_not_divide_are_refused_with_both_ways_out(group: RayWorkerGroup) -> None:
    with pytest.raises(
        DispatchError, match=r"(?s)only support equal chunk.*7.*2.*uneven=True.*auto_padding=True"
    ):
        group.add_rank(batch(7))
    with pytest.raises(AssertionError):
        group.add_rank(batch(7))


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_uneven_rows_come_back_in_order(group: RayWorkerGroup, rows: int) -> None:
    out = group.uneven_rows(batch(rows))
    assert values(out) == list(range(rows))
    assert out.meta_info["metrics"] == {"rows": [rows - rows // 2, rows // 2]}


def test_padding_never_reaches_the_caller(group: RayWorkerGroup) -> None:
    data = batch(5, auto_padding=True)
    assert values(group.add_rank(data)) == [0, 1, 2, 4, 5]
    assert values(group.add_rank_later(data).get()) == [0, 1, 2, 4, 5]
    assert group.metric(data) == [{"sum": 3.0, "rank": 0}, {"sum": 11.0, "rank": 1}]
    assert len(data) == 5


def test_outputs_that_are_no_batch_are_refused_with_advice(group: RayWorkerGroup) -> None:
    with pytest.raises(DispatchError, match=r"rank 0 returned int.*DP_COMPUTE_METRIC"):
        group.no_batch(batch())


def test_arguments_that_are_no_batch_are_refused_by_name(group: RayWorkerGroup) -> None:
    with pytest.raises(DispatchError, match=r"add_rank.*argument 0 must be a DataProto.*got int"):
        group.add_rank(3)


def test_ranks_of_one_dp_group_get_the_same_shard_and_one_of_them_answers(
    group: RayWorkerGroup,
) -> None:
    assert values(group.replicated(data=batch(3))) == [1, 2, 3]
    assert values(group.meshed(batch(4))) == [0, 1, 3, 4]


def test_ranks_that_collect_ignores_return_nothing(group: RayWorkerGroup) -> None:
    pending = group.replicated.submit(batch(3))._pending
    silent, answering = ray.get(pending._refs)
    assert silent is None
    assert values(answering) == [1, 2, 3]


def test_a_mesh_that_no_worker_registered_is_named_with_the_known_ones(
    group: RayWorkerGroup,
) -> None:
    with pytest.raises(WorkerError, match=r"mesh 'absent' is not registered.*\['dp', 'tp'\]"):
        group.lost(batch())


def test_an_argument_that_several_ranks_get_is_stored_once(
    group: RayWorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[Any] = []
    put = ray.put
    monkeypatch.setattr(
        calls_module.ray, "put", lambda value: (stored.append(value), put(value))[1]
    )
    big = torch.zeros(1000)
    group.echo(big, y=big)
    assert [parcel._value for parcel in stored] == [big]
    group.replicated(batch(4))
    assert len(stored) == 2
    group.echo(1, y="short")
    group.add_rank(batch(4))
    assert len(stored) == 2


def test_a_worker_may_write_into_what_it_received(group: RayWorkerGroup) -> None:
    shared = DataProto.from_dict({"a": torch.zeros(4, 1000)})
    before = shared.batch["a"].clone()
    group.replicated(shared)
    assert torch.equal(shared.batch["a"], before)


def test_a_future_goes_to_a_group_of_another_size_by_rows(
    group: RayWorkerGroup, three: RayWorkerGroup
) -> None:
    future = group.grow(batch(5))
    assert isinstance(future, DataProtoFuture)
    assert len(future) == 7
    assert values(three.uneven_rows(future)) == [0, 1, 2, 3, 3, 4, 4]
    chained = group.add_rank_later(three.grow(batch(3)))
    assert values(chained.get()) == [0, 1, 1, 3, 3, 3]


def test_a_future_that_does_not_divide_is_refused_where_its_rows_are_known(
    group: RayWorkerGroup,
) -> None:
    with pytest.raises(AssertionError, match="only support equal chunk"):
        group.add_rank(group.grow(batch(5)))


def test_what_failed_in_a_producer_reaches_the_consumer_as_first_cause(
    group: RayWorkerGroup, three: RayWorkerGroup
) -> None:
    broken = DataProto.from_dict({"b": torch.zeros(4)})
    with pytest.raises(KeyError) as caught:
        three.uneven_rows(group.add_rank_later(broken))
    assert isinstance(caught.value, WorkerError)
    assert caught.value.method == "add_rank_later"


def test_submit_returns_at_once_and_await_works(group: RayWorkerGroup) -> None:
    future = group.add_rank.submit(batch())
    assert values(future.result(timeout=60)) == [0, 1, 2, 4, 5, 6]
    assert future.done()

    async def main() -> list[Any]:
        return await asyncio.gather(*(group.echo.submit(i) for i in range(3)))

    assert asyncio.run(main()) == [[(r, i, None) for r in (0, 1)] for i in range(3)]


def test_a_host_without_a_loop_says_that_it_cannot_drop_a_call(group: RayWorkerGroup) -> None:
    before = group.count()
    blocking = group.block.submit(0.5)
    sent = group.echo.submit("once")
    assert not sent.cancel()
    assert sent.result(timeout=30) == [(0, "once", None), (1, "once", None)]
    blocking.result()
    assert group.count() == [count + 1 for count in before]


def test_options_choose_ranks_and_a_deadline(group: RayWorkerGroup) -> None:
    assert group.echo.options(ranks=[1])("x") == [(1, "x", None)]
    assert values(group.add_rank.options(ranks=[1, 0])(batch(2))) == [1, 1]
    with pytest.raises(CallTimeoutError, match=r"block: ranks \[0, 1\] of 2") as caught:
        group.block.options(timeout_s=0.2)(1.5)
    assert caught.value.pending_ranks == (0, 1)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] are still in a call"):
        group.count()
    group._hosts.settle(60)
    assert len(group.count()) == 2


def test_wrong_arguments_are_a_type_error_before_anything_is_sent(group: RayWorkerGroup) -> None:
    before = group.count()
    with pytest.raises(TypeError, match=r"Probe.echo\(x: .*\).*: missing a required argument: 'x'"):
        group.echo()
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        group.echo(1, z=2)
    assert group.count() == before


def test_an_unregistered_method_is_answered_with_the_nearest_one(group: RayWorkerGroup) -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'add_rank'"):
        group.add_ranks(batch())
    with pytest.raises(AttributeError, match=r"unregistered is not registered.*@register"):
        group.unregistered(1)


def test_execute_all_and_rank_zero_run_unregistered_methods_too(group: RayWorkerGroup) -> None:
    assert group.execute_all_sync("unregistered", 5) == [0, 5]
    assert ray.get(group.execute_all_async("unregistered", x=5)) == [0, 5]
    assert ray.get(group.execute_all("unregistered", 5)) == [0, 5]
    assert group.execute_rank_zero_sync("unregistered", 5) == 0
    assert ray.get(group.execute_rank_zero("unregistered", 5)) == 0
    assert group.execute_all_sync("echo", [1, 2]) == [(0, [1, 2], None), (1, [1, 2], None)]
    with pytest.raises(UnknownMethodError, match="did you mean"):
        group.execute_all_sync("ecko")


def test_functions_run_on_workers(group: RayWorkerGroup) -> None:
    def scaled(worker: Worker, data: DataProto, by: DataProto) -> DataProto:
        data.batch["a"] = data.batch["a"] * 10 + worker.rank + by.batch["a"]
        return data

    out = group.execute_with_func_generator(scaled, batch(2), by=batch(2))
    assert values(out) == [0, 12]
    assert group.execute_func_rank_zero(lambda x: x + 1, 1) == 2
