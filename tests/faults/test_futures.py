"""Batches in the workers, when the processes that make or hold them end."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from protocol import DataProto, DataProtoFuture
from single_controller import GroupBrokenError, WorkerDiedError
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.faults.victim import Victim
from tests.waiting import eventually

pytestmark = pytest.mark.slow

ROWS = DataProto.from_dict({"x": torch.arange(4.0)})
HELD_UP = DataProto.from_dict({"x": torch.arange(4.0)}, meta_info={"held_up": True})


class Maker(Victim):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def make(self, data: DataProto) -> DataProto:
        if data.meta_info.get("held_up"):
            self._sleep()
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def hand_over(self, data: DataProto | int) -> dict[str, Any]:
        return {"all": data if isinstance(data, int) else self.make(data).batch["x"]}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take(self, found: dict[str, Any]) -> float:
        return float(sum(found["all"]))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def total(self, data: DataProto) -> float:
        return float(data.batch["x"].sum())


@pytest.fixture(scope="module")
def maker(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Maker)) as two:
        yield two


@pytest.fixture(scope="module")
def reader(pool: RayResourcePool) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(pool, RayClassWithInitArgs(Maker)) as two:
        yield two


def is_whole(group: RayWorkerGroup) -> bool:
    try:
        return bool(group.act("fine") == ["fine", "fine"])
    except GroupBrokenError:  # ranks are still in the call that failed
        return False


def test_futures_from_before_a_restart_say_so_however_far_they_had_come(
    maker: RayWorkerGroup, reader: RayWorkerGroup
) -> None:
    made, fetched, sent = (maker.make(ROWS) for _ in range(3))
    assert len(made) == 4
    assert fetched.get().batch["x"].tolist() == [0, 1, 2, 3]
    assert reader.total(sent) == [1, 5]
    handles = [*maker.hand_over(ROWS), *maker.hand_over(1)]
    assert [handle.get()["all"] for handle in handles[2:]] == [1, 1]
    assert reader.take(handles[0]) == [6, 6]
    running = maker.make(HELD_UP)
    queued = maker.make(ROWS)
    handles += maker.hand_over(ROWS)
    maker.restart()
    for former in (made, fetched, sent, running, queued):
        joined = DataProtoFuture.concat([maker.make(ROWS), former])
        uses = [former.get, joined.get, former.chunk(2)[1].get]
        uses += [partial(pickle.dumps, former), partial(maker.total, former)]
        uses += [partial(reader.total, former), partial(reader.total, joined)]
        for use in uses:
            with pytest.raises(GroupBrokenError, match="the group was restarted"):
                use()
    for handle in handles:
        for read in (handle.get, *(partial(group.take, handle) for group in (maker, reader))):
            with pytest.raises(GroupBrokenError, match="the group was restarted"):
                read()
    for group in (maker, reader):
        assert group.total(maker.make(ROWS)) == [1, 5]


def test_a_restart_ends_the_wait_for_a_future(maker: RayWorkerGroup) -> None:
    running = maker.make(HELD_UP)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            running.get()
        except Exception as error:
            caught.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert eventually(lambda: "in _sleep" in maker.stacks()[0])
    maker.restart()
    waiting.join(60)
    assert [type(error) for error in caught] == [GroupBrokenError]
    assert "the group was restarted" in str(caught[0])


@pytest.mark.parametrize("method", ["make", "hand_over"])
def test_the_death_of_a_maker_is_told_to_readers_whose_own_group_stays_whole(
    maker: RayWorkerGroup, reader: RayWorkerGroup, method: str
) -> None:
    pid = maker.look()[1][1]
    made = maker.hand_over(ROWS)
    assert eventually(made[1].done)
    running: Any = maker.hand_over(HELD_UP)[0] if method == "hand_over" else maker.make(HELD_UP)
    reading = (reader.take if method == "hand_over" else reader.total).submit(running)
    assert eventually(lambda: "in _sleep" in maker.stacks()[1])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError) as caught:
        reading.result(timeout=60)
    assert (caught.value.method, caught.value.rank, caught.value.pid) == (method, 1, pid)
    assert eventually(partial(is_whole, reader))
    for read in (partial(reader.take, made[1]), made[1].get):  # which was made, and lost with it
        with pytest.raises(WorkerDiedError, match=r"hand_over: rank 1 .* died"):
            read()
    with pytest.raises(WorkerDiedError, match=rf"{method}: rank 1 .* died"):
        running.get(timeout=60)
    with pytest.raises(GroupBrokenError, match="the group lost a rank"):
        maker.look()
    maker.restart()
    assert reader.total(maker.make(ROWS)) == [1, 5]
