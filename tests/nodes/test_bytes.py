"""What goes to another node goes there once, however many ranks read it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.nodes.conftest import HEAD, Driver, Nodes
from tests.nodes.traffic import counts, received
from tests.waiting import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not counts, reason="this Ray does not say what a node has received"),
]

LEFT, RIGHT = "127.0.0.9", "127.0.0.10"
MB = 1_000_000
MESH = make_nd_compute_dataproto_dispatch_fn("mesh")  # two shards, each for two ranks


class Reader(Worker):
    """One of four ranks, whose calls run until the driver has looked."""

    def __init__(self, folder: str = "") -> None:
        self.folder = Path(folder)
        self._register_dispatch_collect_info("mesh", self.rank // 2, self.rank % 2 == 0)

    def hold(self, value: Any) -> Any:
        (self.folder / f"has{self.rank}").touch()
        assert eventually((self.folder / "go").exists, 60)
        return value

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def same(self, value: Any) -> float:
        return float(self.hold(value).sum())

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def rows(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"sum": self.hold(data).batch["x"].sum(1)})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load(self, pairs: Any) -> list[tuple[str, float]]:
        return [(name, float(tensor.mean())) for name, tensor in pairs]

    @register(dispatch_mode=MESH)
    def shard(self, data: DataProto) -> DataProto:
        return self.rows(data)


class Maker(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def make(self, data: DataProto) -> DataProto:
        return table(len(data))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def widen(self, data: DataProto) -> DataProto:
        hidden = DataProto.from_dict({"hidden": torch.ones(len(data), 8 * MB // 4)})
        return hidden.union(DataProto.from_dict({"x": torch.ones(len(data), 1_000)}))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def pieces(self, count: int) -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(count):
            yield f"w{i}", torch.full((MB // 4,), i + 100.0 * self.rank)


def table(rows: int, **meta_info: Any) -> DataProto:
    """Of 1 MB per row."""
    return DataProto.from_dict({"x": torch.ones(rows, MB // 4)}, meta_info=meta_info)


GROUPS: dict[str, RayWorkerGroup] = {}  # of the driver's process


def start(folder: Path) -> None:
    left = RayResourcePool([2], resources_per_process={"left": 1})
    right = RayResourcePool([4], resources_per_process={"right": 1})
    GROUPS["makers"] = RayWorkerGroup(left, RayClassWithInitArgs(Maker))
    GROUPS["readers"] = RayWorkerGroup(right, RayClassWithInitArgs(Reader, str(folder)))


def moved(folder: Path, method: str, value: Callable[[], Any]) -> dict[str, float]:
    """MB that each node has from others while all four ranks run the call, and none before."""
    for file in folder.iterdir():
        file.unlink()
    sent = value()
    assert eventually(lambda: not any(received().values()))
    call = getattr(GROUPS["readers"], method).submit(sent)
    assert eventually(lambda: len(list(folder.glob("has*"))) == 4, 60)
    found = received()
    (folder / "go").touch()
    call.result(timeout=60)
    return {node: size / MB for node, size in found.items()}


def array() -> np.ndarray[Any, Any]:
    return np.ones(MB)  # of 8 bytes each


def columns() -> DataProto:
    return table(8)


def with_a_large_value_for_all_rows() -> DataProto:
    return table(4, weights=np.ones(MB))


def made_elsewhere() -> Any:
    made = GROUPS["makers"].make(DataProto.from_dict({"seed": torch.zeros(8)}))
    assert len(made) == 8
    return made


def one_column_of_a_batch_of_64_megabytes() -> Any:
    wide = GROUPS["makers"].widen(DataProto.from_dict({"seed": torch.zeros(8)}))
    assert len(wide) == 8
    return wide.select(["x"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held")


@pytest.fixture(scope="module")
def driver(nodes: Nodes, folder: Path) -> Iterator[Driver]:
    nodes.add(left=LEFT)
    nodes.add(4, right=RIGHT)
    driver = Driver(nodes)
    driver(start, folder)
    yield driver
    driver.close()


@pytest.mark.parametrize(
    ("method", "value", "megabytes"),
    [
        ("same", array, 8),
        ("rows", with_a_large_value_for_all_rows, 12),
        ("shard", columns, 8),
        ("rows", made_elsewhere, 8),
        ("shard", made_elsewhere, 8),
        ("rows", one_column_of_a_batch_of_64_megabytes, 0),
    ],
)
def test_what_ranks_of_another_node_share_comes_to_it_once_and_to_no_other_node(
    driver: Driver, folder: Path, method: str, value: Callable[[], Any], megabytes: int
) -> None:
    found = driver(moved, folder, method, value)
    assert megabytes <= found.pop(RIGHT) < megabytes + 0.1
    assert found == {HEAD: 0, LEFT: 0}


def in_buckets(rank: int) -> Any:
    handles = GROUPS["makers"].pieces.options(bucket_bytes=3 * MB)(8)
    return GROUPS["readers"].load(handles[rank])


@pytest.mark.parametrize("rank", range(2))
def test_what_is_yielded_goes_from_node_to_node(driver: Driver, rank: int) -> None:
    assert driver(in_buckets, rank) == [[(f"w{i}", i + 100.0 * rank) for i in range(8)]] * 4
