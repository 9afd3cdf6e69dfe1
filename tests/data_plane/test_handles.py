"""Values of any kind stay where they were made: who gets them, until when, and what Ray says."""

from __future__ import annotations

import asyncio
import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

from single_controller import CallTimeoutError, PerRank, SharedMemoryWriteError, trace
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    Colocated,
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
)
from single_controller.ray.failure import StaysError
from tests.data_plane.stage import batch, moved
from tests.slices import slices
from tests.waiting import eventually, once_taken

SUM = 4 * 2 + 1 + 2  # of four numbers, of the batch and of the layer


def summed(handle: Any) -> float:
    return float(handle.get()["state"].w.detach().sum())


def test_a_role_that_reads_only_gets_what_another_made_and_no_byte_moves(both: Colocated) -> None:
    handles = both.one.state()
    before = moved(both.one, both.two)
    found = both.two.borrowed(PerRank(handles))
    assert both.one.borrowed(PerRank(handles)) == found
    assert [(writeable, total) for _, writeable, total in found] == [(False, SUM)] * 2
    later = both.two.borrowed.submit(PerRank(both.one.state()))  # while it is being made
    assert [total for *_, total in later.result()] == [SUM] * 2
    for _ in range(2):
        owned = both.two.own(PerRank(handles))
        assert [(writeable, total) for _, writeable, total in owned] == [(True, SUM)] * 2
        assert all(own[0][0] != lent[0][0] for own, lent in zip(owned, found, strict=True))
    assert moved(both.one, both.two) - before < 5_000  # of calls, and what these returned
    between = both.one.stats()["state"].bytes_between
    assert both.two.own(handles[0])[1][2] == SUM  # which lies with the other rank
    assert eventually(lambda: both.one.stats()["state"].bytes_between > between)


def test_a_value_goes_from_group_to_group_once_and_past_the_driver(
    both: Colocated, three: RayWorkerGroup
) -> None:
    handles = both.one.state(100_000)
    driver = [group.stats().driver_bytes for group in (both.one, three)]
    between = both.one.stats()["state"].bytes_between
    for _ in range(2):
        assert [total for *_, total in three.borrowed(handles[1])] == [200_003] * 3
    assert [total for *_, total in three.own.options(ranks=[0, 1])(PerRank(handles))] == [
        200_003
    ] * 2
    after = [group.stats().driver_bytes for group in (both.one, three)]
    assert sum(after) - sum(driver) < 10_000
    assert eventually(lambda: both.one.stats()["state"].bytes_between - between >= 800_000)
    assert both.one.stats()["state"].bytes_between - between < 900_000
    sent = three.stats().driver_bytes
    three.own({"state": handles[0].get()["state"], "too": handles[1]})  # 400 KB beside a handle
    assert 400_000 <= three.stats().driver_bytes - sent < 450_000
    large = np.ones(100_000, np.float32)
    sent = three.stats().driver_bytes
    each = PerRank([1, 2, 3])
    assert three.give(each, {"large": large}, [handles[0]]) == [1, 2, 3]  # one in another value
    assert 400_000 <= three.stats().driver_bytes - sent < 450_000
    between = both.one.stats()["state"].bytes_between
    both.one._hosts.now.read_elsewhere.clear()
    for _ in range(2):  # the second time it is published ahead: of one rank, as it was read
        assert [total for *_, total in three.borrowed(both.one.state(100_000)[1])] == [200_003] * 3
    assert eventually(lambda: both.one.stats()["state"].bytes_between - between >= 800_000)
    assert both.one.stats()["state"].bytes_between - between < 900_000
    came = both.one.stats()["state"].bytes_in
    assert summed(handles[0]) == 200_000
    assert 400_000 <= both.one.stats()["state"].bytes_in - came < 450_000


def test_ray_waits_for_handles_has_small_values_and_says_who_has_others(both: Colocated) -> None:
    handles = both.one.state()
    assert ray.wait(handles, num_returns=2, timeout=60) == (handles, [])
    assert all(handle.done() for handle in handles)
    assert ray.get(both.one.text(3)) == ["xxx"] * 2
    with pytest.raises(ValueError, match="timeout must be seconds"):
        handles[0].get(timeout="5")
    for kept in (handles, handles[0], both.one.text(100_000)):
        with pytest.raises(StaysError, match=r"one\.\w+ returned stays.*handle.get\(\) fetches it"):
            ray.get(kept)
    read = ray.remote(lambda found: summed(found[0]))
    with pytest.raises(StaysError, match=r"passed \[handle\], within a list, can get\(\) it"):
        ray.get(read.remote(handles[0]))
    elsewhere = read.remote(handles), ray.put([handles[1]]), pickle.dumps(handles[1])
    del handles, kept
    gc.collect()
    assert ray.get(elsewhere[0]) == 8
    for found in (ray.get(elsewhere[1])[0], pickle.loads(elsewhere[2])):
        assert summed(found) == 8


def test_a_small_value_is_here_though_a_later_call_keeps_its_rank(
    both: Colocated, gate: Path
) -> None:
    async def wait(handle: Any) -> Any:
        return await handle

    first, second = both.one.text(3), both.one.text(4)
    busy = both.one.hold.submit(gate)
    assert asyncio.run(asyncio.wait_for(wait(first[0]), 60)) == "xxx"
    assert second[1].get(timeout=60) == "xxxx"
    late = both.one.state.options(timeout_s=0.2)()
    with pytest.raises(
        CallTimeoutError, match=r"one.state.* had not finished after 0.2 s"
    ) as caught:
        late[0].get()
    assert "in hold" in caught.value.stacks[0]
    assert not busy.done()
    gate.touch()
    busy.result()
    assert once_taken(lambda: summed(both.one.state()[0])) == 8


@pytest.mark.parametrize("part", range(3))
def test_a_worker_that_writes_into_a_value_it_returned_is_found_out(
    both: Colocated, part: int
) -> None:
    handles = both.one.state()
    assert both.two.own(PerRank(handles))[0][2] == SUM
    both.one.write_state(part)
    for read in (lambda: both.two.own(PerRank(handles)), handles[1].get):
        with pytest.raises(SharedMemoryWriteError, match=r"one.state returned tensors.*clone"):
            read()


@pytest.mark.parametrize("part", range(3))
def test_a_method_that_writes_into_a_value_it_reads_only_is_found_out(
    both: Colocated, three: RayWorkerGroup, part: int
) -> None:
    handles = both.one.state()
    for given in (handles[0], handles[1].get()):
        with pytest.raises(SharedMemoryWriteError, match="has written into argument 0, which"):
            three.spoil_state(given, part)


def test_who_is_called_first_reads_what_was_there_before_the_next_call_writes(
    both: Colocated, three: RayWorkerGroup
) -> None:
    floats = 1 << 24
    expected = 2 * floats + SUM - 8
    for read, ranks in ((three.borrowed, 3), (both.two.own, 2)) * 3:
        handles = both.one.state(floats)
        found = read.submit(PerRank([handles[0], handles[1], handles[0]][:ranks]))
        both.one.write_state.submit(0)
        assert [total for *_, total in found.result()] == [expected] * ranks


def test_later_calls_reach_a_process_where_one_waits_for_what_another_makes(
    async_roles: Colocated,
) -> None:
    handles = async_roles.one.when_told()
    read = async_roles.one.merge(PerRank([[handle] for handle in handles]))
    async_roles.one.tell.options(timeout_s=60)()
    assert [handle.get()["x"].tolist() for handle in read] == [[1.0]] * 2


class Trained(Worker):
    """A model and its optimizer."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def build(self, sharded: bool = False, **how: bool) -> None:
        self.model = torch.nn.Linear(4, 4)
        if sharded:
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            fully_shard(self.model, mesh=init_device_mesh("cpu", (1,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **how)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def weights(self, whole: bool) -> dict[str, torch.Tensor]:
        named = [(name, p.detach()) for name, p in self.model.named_parameters()]
        return {n: p if whole else getattr(p, "to_local", p.detach)() for n, p in named}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def untouched(self) -> list[torch.Tensor]:
        return [torch.empty(0), torch.ones(1)]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def step_others(self) -> None:
        """Of parameters without memory, or of a class that hides it."""
        for tensor in (torch.empty(0), TwoTensor(torch.ones(2), torch.ones(2))):
            parameter = torch.nn.Parameter(tensor)
            parameter.grad = torch.ones_like(tensor)
            torch.optim.SGD([parameter], 0.1).step()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def train(self) -> None:
        self.model(torch.ones(1, 4)).sum().backward()
        self.optimizer.step()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def free(self) -> None:
        for parameter in self.model.parameters():
            getattr(parameter, "to_local", parameter.detach)().untyped_storage().resize_(0)


def test_steps_of_optimizers_and_memory_that_was_freed_are_found_out(cluster: None) -> None:
    kinds = ({"fused": True}, {"sharded": True, "fused": True}, {"sharded": True, "foreach": True})
    with RayResourcePool([1], cpus_per_process=0.1) as pool:
        group: Any = RayWorkerGroup(pool, RayClassWithInitArgs(Trained))
        for how in kinds:
            group.build(**how)
            [others] = group.untouched()
            group.step_others()
            for write, whole in ((group.train, False), (group.train, True), (group.free, False)):
                group._hosts.now.read_elsewhere.clear()  # or it would be copied as it is returned
                [handle] = group.weights(whole)
                write()
                with pytest.raises(SharedMemoryWriteError, match="have been written to since"):
                    handle.get()
            assert [len(tensor) for tensor in others.get()] == [0, 1]


def test_a_value_is_let_go_of_when_nobody_holds_its_handle(both: Colocated) -> None:
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [0, 0])
    handles = both.one.state()
    merged = both.two.merge([{"x": [1.0]}])
    del merged[0]
    both.two.own(PerRank(handles))
    assert summed(handles.pop()) == 8
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [2, 2])  # a call's values go together
    for _ in range(20):
        both.one.text(3), both.one.box(batch(2)), both.one.fail(batch(2))  # dropped unread
    del handles, merged
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [0, 0])


def test_it_can_be_seen_what_a_handle_is_and_what_was_published(
    both: Colocated, three: RayWorkerGroup, tmp_path: Path
) -> None:
    with trace(tmp_path / "t.json") as recorded:
        handle, made = both.one.state(1_000)[1], both.one.step(batch(4))
        told = three.explain("borrowed", handle)
        for call in (told, three.explain("give", {"w": [handle]})):
            assert [(a.ranks, a.bytes) for a in call.arguments] == [((0, 1, 2), None)]
        assert "<handle of one.state, rank 1>  -" in str(told)
        assert handle.get() is not None
        assert len(made.get()) == 4
    found = [(e["pid"], e["args"]) for e in slices(recorded, "user") if e["name"] == "publish"]
    whose = [(pid, args["method"]) for pid, args in found]
    assert sorted(whose) == [(1, "one.step"), (2, "one.state"), (2, "one.step")]
    moved(both.one)  # so that all is counted
    between = sum(both.one.stats()[method].bytes_between for method in ("state", "step"))
    sizes = sum(args["bytes"] for _, args in found)
    assert 4_000 < sizes <= between
