"""A worker for tests of how batches get from one to the next."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from protocol import DataProto
from protocol.batches import shared_values
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayWorkerGroup
from single_controller.ray.host import AsyncHost, Host
from tests.waiting import eventually

ONE = {"dispatch_mode": Dispatch.ONE_TO_ALL}
ROWS = {"dispatch_mode": Dispatch.DP_COMPUTE_PROTO, "uneven": True}
LIST = {"dispatch_mode": Dispatch.DP_COMPUTE_METRIC, "uneven": True}


@dataclass
class State:
    """A value that is no batch, of what stays and what must not be shared."""

    w: torch.Tensor
    arrays: np.ndarray
    batch: DataProto
    layer: torch.nn.Parameter

    def tensors(self) -> list[torch.Tensor]:
        return [self.w, self.batch.batch["x"], self.layer]


Seen: TypeAlias = tuple[list[int], bool, float]  # addresses, whether arrays are writeable, a sum


def seen(tensors: list[torch.Tensor], array: np.ndarray) -> Seen:
    total = sum(float(tensor.detach().sum()) for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors], array.flags.writeable, total


class Stage(Worker):
    """Methods without blocking, and some that look at what arrived."""

    @register(**ONE, blocking=False)
    def state(self, floats: int = 4) -> dict[str, State]:
        layer = torch.nn.Parameter(torch.ones(2))
        self.handed = State(layer.sum() * torch.ones(floats), np.arange(4), batch(2), layer)
        return {"state": self.handed}

    @register(**ONE)
    def write_state(self, part: int) -> None:
        with torch.no_grad():
            self.handed.tensors()[part].add_(1)

    @register(**ONE, reads_only=True)
    def borrowed(self, found: dict[str, State]) -> Seen:
        state = found.pop("state")
        tensors = state.tensors()
        state.batch.pop(["x"])
        state.w.requires_grad_(False)
        return seen(tensors, state.arrays)

    @register(**ONE, reads_only=True)
    def spoil_state(self, found: dict[str, State], part: int) -> None:
        with torch.no_grad():
            found["state"].tensors()[part].add_(1)

    @register(**ONE)
    def own(self, found: dict[str, State]) -> Seen:
        state = found["state"]
        before = seen(state.tensors(), state.arrays)
        for tensor in state.tensors():
            tensor.data += 100
        state.arrays += 100
        return before

    @register(**ONE, blocking=False)
    def text(self, characters: int) -> str:
        return "x" * characters

    @register(**LIST, blocking=False)
    def box(self, data: DataProto) -> Any:
        """Odd rows come along with the answer, even ones stay."""
        x = data.batch["x"]
        return {"x": x if len(x) % 2 == 0 else x.tolist()}

    @register(**ONE, blocking=False)
    def merge(self, boxes: list[Any]) -> Any:
        return {"x": torch.cat([torch.as_tensor(box["x"]) for box in boxes])}

    @register(**ROWS, blocking=False)
    def shift(self, data: DataProto, boxes: Any) -> DataProto:
        by = sum(float(sum(box["x"])) for box in boxes)
        return DataProto.from_dict({"x": data.batch["x"] + by}, data.non_tensor_batch)

    @register(**ROWS, blocking=False)
    def step(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"x": data.batch["x"] * 2 + 1}, data.non_tensor_batch)

    @register(**ROWS, blocking=False)
    def slow(self, data: DataProto) -> DataProto:
        threading.Event().wait(1)
        return data

    @register(**ROWS, blocking=False)
    def double(self, data: DataProto) -> DataProto:
        return data.repeat(2)

    @register(**ROWS, blocking=False)
    def thin(self, data: DataProto) -> DataProto:
        return data.slice(0, max(len(data) - (self.rank == 1), 0))

    @register(**ROWS, blocking=False)
    def widen(self, data: DataProto) -> DataProto:
        hidden = torch.zeros(len(data), 200_000)
        return data.union(DataProto.from_dict({"hidden": hidden}))

    @register(**ROWS, blocking=False)
    def fail(self, data: DataProto) -> DataProto:
        raise KeyError("no such thing")

    @register(**ROWS, blocking=False)
    def hand_out_buffer(self, data: DataProto) -> DataProto:
        self.buffer = torch.zeros(len(data))
        return DataProto.from_dict({"x": self.buffer})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def hold(self, until: Path) -> None:
        while not until.exists():
            threading.Event().wait(0.01)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_buffer(self) -> None:
        self.buffer += 1

    @register(**LIST)
    def addresses(self, data: DataProto) -> int:
        self.seen = data.batch["x"].data_ptr()
        return self.seen

    @register(**LIST, reads_only=True)
    def borrowed_addresses(self, data: DataProto) -> int:
        return data.batch["x"].data_ptr()

    @register(**LIST)
    def spoil(self, data: DataProto) -> float:
        data.batch["x"] += 100
        data.non_tensor_batch["s"][0].fill(7)
        return float(data.batch["x"].sum())

    @register(**LIST, reads_only=True)
    def spoil_borrowed(self, data: DataProto) -> None:
        data.batch["x"] += 100

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, reads_only=True)
    def write_array(self, x: dict[str, Any]) -> None:
        x["a"][0] = 1

    @register(**LIST, materialize_futures=False)
    def keep(self, future: Any) -> None:
        self.kept = future

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def kept_sum(self) -> float:
        return float(self.kept.get().batch["x"].sum())

    @register(**LIST)
    def total(self, *data: DataProto) -> float:
        return float(sum(d.batch["x"].sum() for d in data))

    @register(**LIST)
    def shared(self, *data: DataProto) -> tuple[list[str], float, bool]:
        found = [shared_values(one) for one in data]
        values = found[0]["big"]
        values += self.rank  # which no other rank sees
        return list(found[0]), float(values[0]), all(one["big"] is values for one in found)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def give(self, x: Any, *more: Any) -> Any:
        return x

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def results_kept(self) -> int:
        return sum(len(o._shelf) for o in gc.get_objects() if isinstance(o, AsyncHost | Host))


class AsyncStage(Stage):
    """The same on an event loop."""

    @register(**ONE, blocking=False)
    async def merge(self, boxes: list[Any]) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return {"x": torch.cat([torch.as_tensor(box["x"]) for box in boxes])}

    @register(**ONE, blocking=False)
    async def when_told(self) -> Any:
        self.told = asyncio.Event()
        await self.told.wait()
        return {"x": torch.ones(1)}

    @register(**ONE)
    async def tell(self) -> None:
        self.told.set()

    @register(**ONE)
    async def own(self, found: dict[str, State]) -> Seen:  # type: ignore[override]
        return Stage.own.__wrapped__(self, found)  # type: ignore[attr-defined, no-any-return]

    @register(**ROWS, blocking=False)
    async def step(self, data: DataProto) -> DataProto:  # type: ignore[override]
        return DataProto.from_dict({"x": data.batch["x"] * 2 + 1}, data.non_tensor_batch)


def moved(*groups: RayWorkerGroup) -> int:
    """Bytes between workers are counted a moment after they moved: this waits for a look that finds
    what the last one found.
    """
    seen = [-1]

    def still() -> bool:
        seen.append(sum(group.stats().moved_bytes for group in groups))
        return seen[-1] == seen[-2]

    assert eventually(still)
    return seen[-1]


def batch(rows: int) -> DataProto:
    arrays = np.empty(rows, dtype=object)
    for i in range(rows):
        arrays[i] = np.full(3, i)
    return DataProto.from_dict({"x": torch.arange(float(rows))}, {"s": arrays})


def xs(data: DataProto) -> list[float]:
    return data.batch["x"].tolist()  # type: ignore[no-any-return]
