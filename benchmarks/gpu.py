"""Times tensors on CUDA devices to workers and back, beside the ways that others take.

    python benchmarks/gpu.py --json figures.json        # one card; more cases with two

In one run: 512 MB from process to process by the device path, by bare CUDA IPC and as numpy; from
role to role of one host; through the host path and its floor, which is the same bytes in numpy
arrays through plain Ray actors. With two cards, also from card to card, beside a bare
torch.distributed send and recv, and once more with 4 GB. Medians of `--rounds`, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
)

BYTES = 512 << 20
LARGE = 8 * BYTES
COLUMNS = 8

BY_DEVICE: dict[str, Any] = {
    "dispatch_mode": Dispatch.DP_COMPUTE_PROTO,
    "blocking": False,
    "transport": "device",
}
METRIC: dict[str, Any] = {"dispatch_mode": Dispatch.DP_COMPUTE_METRIC}


def columns(size: int) -> dict[str, torch.Tensor]:
    """That many bytes."""
    shape = (1, size // COLUMNS // 4)
    numbers = torch.randint(0, 1 << 30, shape, dtype=torch.int32, device="cuda")
    return {f"c{i}": numbers + i for i in range(COLUMNS)}


class Maker(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = columns(BYTES)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def hold(self, size: int) -> None:
        self.tensors = columns(size)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def noop(self) -> None: ...

    @register(**BY_DEVICE)
    def by_device(self, data: DataProto) -> DataProto:
        return DataProto.from_dict(self.tensors)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def by_host(self, data: DataProto) -> DataProto:
        return DataProto.from_dict(self.tensors)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def to_driver(self, data: DataProto) -> DataProto:
        return DataProto.from_dict(self.tensors)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def read_own(self) -> int:
        return look(self.tensors)

    @register(**METRIC)
    def read(self, data: DataProto) -> int:
        return look(data.batch)

    @register(**METRIC, reads_only=True)
    def read_there(self, data: DataProto) -> int:
        return look(data.to(self.device).batch)

    @register(**METRIC, reads_only=True)
    def read_only(self, data: DataProto) -> int:
        return look(data.batch)


def look(columns: Any) -> int:
    """A number of each column, summed, with one wait for the device."""
    return int(torch.stack([column[0, 0] for column in columns.values()]).sum())


@ray.remote
class Plain:
    """The other ways, by hand."""

    def __init__(self) -> None:
        self.tensors = columns(BYTES)
        self.arrays = {key: t.cpu().numpy() for key, t in self.tensors.items()}

    def as_numpy(self) -> dict[str, np.ndarray[Any, Any]]:
        return {key: t.cpu().numpy() for key, t in self.tensors.items()}

    def from_numpy(self, data: dict[str, np.ndarray[Any, Any]]) -> int:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return look({key: torch.from_numpy(a).cuda() for key, a in data.items()})

    def host(self) -> dict[str, np.ndarray[Any, Any]]:
        return self.arrays

    def copied(self, data: dict[str, np.ndarray[Any, Any]]) -> int:
        return sum(int(a.copy()[0, 0]) for a in data.values())

    def handles(self) -> list[Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        return [reduce_tensor(t) for t in self.tensors.values()]

    def mapped(self, handles: list[Any]) -> int:
        return look({str(i): f(*args).clone() for i, (f, args) in enumerate(handles)})

    def hold(self, size: int) -> None:
        self.tensors = columns(size)

    def join(self, port: int, rank: int) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
        torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=2)

    def send(self, times: int) -> None:
        for _ in range(times):
            for tensor in self.tensors.values():
                torch.distributed.send(tensor, 1)
        torch.cuda.synchronize()

    def receive(self, times: int) -> list[float]:
        took = []
        for _ in range(times):
            began = time.perf_counter()
            for tensor in self.tensors.values():
                torch.distributed.recv(tensor, 0)
            torch.cuda.synchronize()
            took.append((time.perf_counter() - began) * 1e3)
        return took


def timed(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of cases that take turns."""
    print("; ".join(cases), end=" … ", flush=True)
    took: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 2):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if turn > 1:  # the first two open handles and fill caches
                took[name].append((time.perf_counter() - began) * 1e3)
    found = {name: median(times) for name, times in took.items()}
    print(", ".join(f"{value:.2f} ms" for value in found.values()))
    return found


def taken(make: Any, take: Any) -> Any:
    """What an actor's method makes, taken by another's."""
    return ray.get(take.remote(make.remote()), timeout=60)


def copies(arrays: dict[str, Any]) -> dict[str, Any]:
    return {key: array.copy() for key, array in arrays.items()}


def one_card(rounds: int) -> dict[str, float]:
    data = DataProto.from_dict({"x": torch.zeros(1)})
    found: dict[str, float] = {}
    with (
        RayResourcePool([1], gpus_per_process=0.4) as pool,
        colocate(pool, maker=Maker, other=Maker) as team,
        RayWorkerGroup(pool, RayClassWithInitArgs(Maker)) as reader,
    ):
        maker: Any = team.maker
        made = maker.by_device(data)
        len(made)
        in_host = {
            "no-op call": maker.noop,
            "a call that reads its own role's tensors": maker.read_own,
            "role to role, reads_only": lambda: team.other.read_only(made),
            "role to role, own copy": lambda: team.other.read(made),
        }
        found |= timed(in_host, 10 * rounds)
        between: dict[str, Callable[[], Any]] = {
            "one card, device path, already made": lambda: reader.read(made),
            "one card, device path, made and read": lambda: reader.read(maker.by_device(data)),
            "host path, made and read": lambda: reader.read(maker.by_host(data)),
            "host path, made, read (reads_only) on the device": lambda: reader.read_there(
                maker.by_host(data)
            ),
            "to the driver": lambda: maker.to_driver(data),
        }
        share = {"num_gpus": 0.2, "num_cpus": 0}
        a, b = (Plain.options(**share).remote() for _ in range(2))
        between |= {
            "bare CUDA IPC": lambda: taken(a.handles, b.mapped),
            "numpy through plain actors, device to device": lambda: taken(a.as_numpy, b.from_numpy),
            "numpy through plain actors, host to host": lambda: taken(a.host, b.copied),
            "numpy of a plain actor, host to the driver": lambda: copies(ray.get(a.host.remote())),
        }
        found |= timed(between, rounds)
        for actor in (a, b):
            ray.kill(actor)
    return found


def two_cards(rounds: int) -> dict[str, float]:
    data = DataProto.from_dict({"x": torch.zeros(1)})
    found: dict[str, float] = {}
    with (
        RayResourcePool([1]) as first,
        RayResourcePool([1]) as second,
        RayWorkerGroup(first, RayClassWithInitArgs(Maker)) as maker,
        RayWorkerGroup(second, RayClassWithInitArgs(Maker)) as reader,
    ):
        print(maker.describe(), reader.describe(), sep="\n")
        made = maker.by_device(data)
        len(made)
        cases: dict[str, Callable[[], Any]] = {
            "card to card, already made": lambda: reader.read(made),
            "card to card, made and read": lambda: reader.read(maker.by_device(data)),
        }
        for name, case in cases.items():
            found |= timed({name: case}, rounds)
        maker.hold(LARGE)
        large = maker.by_device(data)
        len(large)
        found |= timed({"card to card, 4 GB, already made": lambda: reader.read(large)}, rounds)
    a, b = (Plain.options(num_gpus=1).remote() for _ in range(2))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ray.get([a.join.remote(store.port, 0), b.join.remote(store.port, 1)])
    for name, size in (("card to card", BYTES), ("card to card, 4 GB", LARGE)):
        ray.get([a.hold.remote(size), b.hold.remote(size)])
        sent = a.send.remote(rounds + 2)
        took = ray.get(b.receive.remote(rounds + 2))[2:]
        found[f"bare send and recv, {name}"] = median(took)
        ray.get(sent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    cards = torch.cuda.device_count()
    ray.init(num_cpus=16, num_gpus=cards, include_dashboard=False, logging_level="ERROR")
    found = one_card(options.rounds)
    if cards > 1:
        found |= two_cards(options.rounds)
    print(f"{cards} × {torch.cuda.get_device_name()}, torch {torch.__version__}, 512 MB")
    for name, value in found.items():
        print(f"{name:46} {value:10.2f} ms")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
