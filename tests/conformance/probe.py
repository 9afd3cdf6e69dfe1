"""A worker with a method in every mode, and small batches for it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)


def unwrapped(method: Any) -> Any:
    """A decorator without functools.wraps."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return inner


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

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def process_title(self, x: Any = None) -> str:
        return Path("/proc/self/cmdline").read_text()

    @register()
    def scatter(self, x: Any, y: Any = None) -> Any:
        return self.rank, x, y

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def each(self, x: Any) -> Any:
        return self.rank, x

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

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def other_keys(self, data: DataProto) -> DataProto:
        return data.rename("a", f"a{self.rank}")

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
    def second(self, first: DataProto, second: DataProto) -> DataProto:
        self.calls += 1
        return second

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def second_later(self, first: DataProto, second: DataProto) -> DataProto:
        return second

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
        threading.Event().wait(seconds)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def keep(self, x: Any) -> None:
        self.kept = x

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def kept_sum(self) -> float:
        return float(ray.get(self.kept[0]).sum())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write(self, x: Any) -> float:
        x["a"][0] += 1
        x["t"][0] += 1
        return float(x["a"].sum() + x["t"].sum())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, reads_only=True)
    def look(self, x: Any) -> tuple[bool, float]:
        self.seen = getattr(self, "seen", x)
        return x["a"].flags.writeable, float(self.seen["t"].sum())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    @unwrapped
    def hidden(self, x: Any, y: Any = None) -> Any:
        return self.rank, x, y

    def own_device(self) -> str:
        self.device = "mine"
        return self.device

    def unregistered(self, x: int) -> int:
        return self.rank * x


def batch(rows: int = 6, **options: Any) -> DataProto:
    strings = np.array([f"s{i}" for i in range(rows)], dtype=object)
    return DataProto.from_dict({"a": torch.arange(float(rows))}, {"s": strings}, **options)


def values(data: DataProto) -> list[float]:
    return data.batch["a"].tolist()
