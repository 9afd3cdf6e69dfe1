"""Workers whose calls run one after another: with a method in every mode, in meshes, with what
trainers do, and with what goes wrong; and small batches for them."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from tensordict import TensorDict
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from protocol import DataProto
from protocol import tensordict_utils as tu
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)


def mesh(name: str) -> Any:
    return make_nd_compute_dataproto_dispatch_fn(name)


def deferred(method: Any, mode: Any, **how: Any) -> Any:
    return register(dispatch_mode=mode, blocking=False, **how)(method)


def at_once(method: Any, mode: Any, **how: Any) -> Any:
    return register(dispatch_mode=mode, **how)(method)


def unwrapped(method: Any) -> Any:
    """A decorator without functools.wraps."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return inner


def seen(self: Any, x: Any, y: Any = None) -> Any:
    self.calls += 1
    return self.rank, x, y


def itself(self: Worker, x: Any) -> Any:
    return x


def fetched(self: Worker, handle: Any) -> tuple[str, bool, Any]:
    return repr(handle), handle.done(), handle.get()


def add(self: Worker, data: Any) -> Any:
    if isinstance(data, DataProto):
        data.batch["a"] += self.rank
        if "s" in data.non_tensor_batch:
            data.non_tensor_batch["s"] = data.non_tensor_batch["s"] + f"@{self.rank}"
        data.meta_info["metrics"] = {"rank": self.rank}
    else:
        data["a"] = data["a"] + self.rank
    return data


def counted(self: Worker, data: DataProto) -> DataProto:
    data.meta_info["metrics"] = {"rows": len(data)}
    return data


def grown(self: Worker, data: DataProto) -> DataProto:
    return data.repeat(1 + self.rank)


def renamed(self: Worker, data: DataProto) -> DataProto:
    return data.rename("a", f"a{self.rank}")


def summed(self: Worker, data: DataProto) -> dict[str, float]:
    return {"sum": data.batch["a"].sum().item(), "rank": self.rank}


def second_of(self: Any, first: DataProto, second: DataProto) -> DataProto:
    self.calls += 1
    return second


def size(self: Worker, data: DataProto) -> int:
    return len(data)


def spread(worker_group: Any, x: int) -> Any:
    return ([x + rank for rank in range(worker_group.world_size)],), {}


def last(worker_group: Any, output: list[Any]) -> Any:
    return output[-1]


def seen_rows(self: Worker, data: DataProto) -> list[float]:
    return values(data)


def stamp(self: Worker, data: DataProto) -> DataProto:
    data.batch["a"] += 10 * self.rank
    return data


def stamp_by(self: Worker, func: Any, data: DataProto) -> DataProto:
    return func(self, data)  # type: ignore[no-any-return]


class Probe(Worker):
    """Every mode, with and without blocking, and what can be done with arguments."""

    def __init__(self, meshes: bool = True) -> None:
        super().__init__()
        self.calls = 0
        if meshes:
            self._register_dispatch_collect_info("tp", dp_rank=0, is_collect=self.rank == 1)
            self._register_dispatch_collect_info("dp", dp_rank=self.rank, is_collect=True)

    echo = at_once(seen, Dispatch.ONE_TO_ALL)
    scatter = at_once(seen, Dispatch.ALL_TO_ALL)
    each = at_once(seen, Dispatch.DP_COMPUTE)
    lead = at_once(seen, Dispatch.RANK_ZERO)
    lead_too = at_once(seen, Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    hidden = at_once(unwrapped(seen), Dispatch.ONE_TO_ALL)
    give = deferred(itself, Dispatch.ONE_TO_ALL)
    fetch = at_once(fetched, Dispatch.ONE_TO_ALL, materialize_futures=False)
    direct = at_once(seen, Dispatch.DIRECT_ROLLOUT_METHOD)
    add_rank = at_once(add, Dispatch.DP_COMPUTE_PROTO)
    add_rank_later = deferred(add, Dispatch.DP_COMPUTE_PROTO)
    replicated = at_once(add, mesh("tp"))
    meshed = at_once(add, mesh("dp"))
    lost = at_once(add, mesh("absent"))
    uneven_rows = at_once(counted, Dispatch.DP_COMPUTE_PROTO, uneven=True)
    grow = deferred(grown, Dispatch.DP_COMPUTE_PROTO, uneven=True)
    other_keys = deferred(renamed, Dispatch.DP_COMPUTE_PROTO)
    metric = at_once(summed, Dispatch.DP_COMPUTE_METRIC)
    second = at_once(second_of, Dispatch.DP_COMPUTE_PROTO)
    second_later = deferred(second_of, Dispatch.DP_COMPUTE_PROTO)
    no_batch = at_once(size, Dispatch.DP_COMPUTE_PROTO)
    rank_zero_later = deferred(seen, Dispatch.RANK_ZERO)
    on_rank_zero = deferred(seen, Dispatch.ALL_TO_ALL, execute_mode=Execute.RANK_ZERO)
    one_to_all = deferred(seen, Dispatch.ONE_TO_ALL)
    all_to_all = deferred(seen, Dispatch.ALL_TO_ALL)
    dp_compute = deferred(seen, Dispatch.DP_COMPUTE)
    custom = deferred(seen, {"dispatch_fn": spread, "collect_fn": last})
    rows = deferred(seen_rows, Dispatch.DP_COMPUTE_METRIC)
    rows_uneven = deferred(seen_rows, Dispatch.DP_COMPUTE_METRIC, uneven=True)
    proto = deferred(stamp, Dispatch.DP_COMPUTE_PROTO)
    proto_uneven = deferred(stamp, Dispatch.DP_COMPUTE_PROTO, uneven=True)
    func = deferred(stamp_by, Dispatch.DP_COMPUTE_PROTO_WITH_FUNC)
    func_uneven = deferred(stamp_by, Dispatch.DP_COMPUTE_PROTO_WITH_FUNC, uneven=True)
    in_mesh = deferred(stamp, mesh("dp"))
    in_mesh_uneven = deferred(stamp, mesh("dp"), uneven=True)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def count(self) -> int:
        return self.calls

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def process_title(self, x: Any = None) -> str:
        return Path("/proc/self/cmdline").read_text()

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

    def own_device(self) -> str:
        self.device = "mine"
        return self.device

    def unregistered(self, x: int) -> int:
        return self.rank * x


class Engine(Worker):
    """What veRL's trainers send and read besides batches with rows."""

    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info("train", dp_rank=self.rank, is_collect=True)

    @register(dispatch_mode=mesh("train"))
    def update(self, data: Any, settings: Any = None) -> TensorDict:
        """A TensorDict without rows, of this rank."""
        got = None if settings is None else tu.get_non_tensor_data(settings, "lr", None)
        return tu.get_tensordict({}, {"metrics": {"rank": self.rank, "rows": len(data), "lr": got}})

    @register(dispatch_mode=mesh("train"), blocking=False)
    def update_later(self, data: Any, settings: Any = None) -> TensorDict:
        return self.update(data, settings)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def read(self, found: TensorDict) -> TensorDict:
        return found

    @register(dispatch_mode=mesh("train"))
    def load(self, keys: Any) -> Any:
        return type(keys)([f"{name}@{self.rank}" for name in keys.names])

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def load_each(self, keys: Any) -> Any:
        return keys

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def places(self) -> tuple[int, int, int, int]:
        return self._rank, self._world_size, self._local_rank, self._local_world_size


STAGES = mesh("stages")
SQUARE = mesh("square")


class Member(Worker):
    """One of four ranks: rank = 2 pp + dp in "stages", 2 dp + tp in "square"."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        stages = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "dp", "tp"))
        self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        self.register_mesh(stages, mesh_name="stages")
        self.register_mesh(self.square, mesh_name="square")
        self.seen: list[Any] = []

    @register(dispatch_mode=STAGES)
    def stamp(self, data: DataProto) -> DataProto:
        """Who handled each row; what a rank that is not to answer says must not come back."""
        self.seen.append(data.batch["row"].tolist())
        data.batch["by"] = torch.full((len(data),), self.rank)
        data.meta_info["metrics"] = {"rank": self.rank}
        return data

    @register(dispatch_mode=SQUARE, uneven=True, blocking=False)
    def stamp_later(self, data: DataProto) -> DataProto:
        done = self.stamp(data)
        return done if self.rank % 2 == 0 else None  # type: ignore[return-value]  # which nobody asks

    @register(dispatch_mode=SQUARE)
    def sum_over_tp(self, data: DataProto) -> DataProto:
        """What each tp peer contributes is its own; only their sum is right."""
        share = data.batch["row"] * (1.0 if self.square.get_local_rank("tp") == 0 else 10.0)
        dist.all_reduce(share, group=self.square.get_group("tp"))
        return DataProto.from_dict({"sum": share})

    @register(dispatch_mode=SQUARE)
    def double(self, data: TensorDict) -> TensorDict:
        jagged = tu.nested_tensor_from_tensor_list([2 * row for row in data["jagged"].unbind()])
        by = [f"{text}@{self.rank}" for text in tu.get(data, "text")]
        return tu.get_tensordict({"jagged": jagged, "by": by})

    @register(dispatch_mode=SQUARE, blocking=False)
    def double_later(self, data: TensorDict) -> TensorDict:
        return self.double(data)

    @register(dispatch_mode=SQUARE, uneven=True)
    def size(self, data: TensorDict) -> TensorDict:
        rows = len(data)
        return tu.get_tensordict({"rows": torch.full((rows,), rows), "text": tu.get(data, "text")})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_seen(self) -> list[Any]:
        seen, self.seen = self.seen, []
        return seen


class OddError(Exception):
    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.hint = code, hint


class Fragile(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def act_later(self, what: str) -> Any:
        return self.act(what) if self.rank else what

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def act(self, what: str) -> Any:
        if what == "raise":
            return {}["missing"]
        if what == "chain":
            try:
                os.stat("/no/such/file")
            except OSError as error:
                raise RuntimeError("load failed") from error
        if what == "stop":
            raise StopIteration(5)
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "odd":
            raise OddError(7, hint="twist")
        if what == "die":
            os._exit(3)
        if what == "exit":
            sys.exit(3)
        if what == "generator":
            return (x for x in ())
        if what == "lock":
            return threading.Lock()
        if what.startswith("wait"):
            threading.Event().wait(float(what[4:]))
        return what


class Unreadable:
    """It pickles, and cannot be unpickled anywhere."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def batch(rows: int = 6, **options: Any) -> DataProto:
    strings = np.array([f"s{i}" for i in range(rows)], dtype=object)
    return DataProto.from_dict({"a": torch.arange(float(rows))}, {"s": strings}, **options)


def values(data: DataProto) -> list[float]:
    return data.batch["a"].tolist()
