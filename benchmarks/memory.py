"""The driver's memory over many steps whose results, made without blocking, are read.

    python benchmarks/memory.py            # ours, then bare Ray, each in a process of its own
    python benchmarks/memory.py --steps 200 --megabytes 4

Every hundred steps it prints the resident memory of the driver. It is to stay as it is after the
first hundreds, as that of bare Ray does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

RANKS = 2


class Maker(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def make(self, data: DataProto) -> DataProto:
        return data


class BareMaker:
    def make(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1_024


def ours(rows: torch.Tensor) -> Callable[[], object]:
    pool = RayResourcePool([RANKS], use_gpu=False)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(Maker))
    data = DataProto.from_dict({"rows": rows})
    return lambda: group.make(data).get()


def bare(rows: torch.Tensor) -> Callable[[], object]:
    actor = ray.remote(BareMaker)
    actors = [actor.remote() for _ in range(RANKS)]
    shards = rows.chunk(RANKS)

    def step() -> object:
        refs = [a.make.remote({"rows": s}) for a, s in zip(actors, shards, strict=True)]
        return torch.cat([part["rows"] for part in ray.get(refs)])

    return step


def measure(which: str, steps: int, megabytes: float) -> None:
    ray.init(
        "local",
        num_cpus=RANKS,
        object_store_memory=200_000_000,
        include_dashboard=False,
        logging_level="ERROR",
    )
    rows = torch.zeros(round(megabytes * 1_024), 256)
    step = {"ours": ours, "bare": bare}[which](rows)
    for number in range(steps + 1):
        step()
        if number % 100 == 0:
            print(f"{which}: {number:5d} steps, {resident_mb():7.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--megabytes", type=float, default=1)
    parser.add_argument("--which", choices=["ours", "bare"])
    given = parser.parse_args()
    if given.which:
        measure(given.which, given.steps, given.megabytes)
        return
    for which in ("ours", "bare"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--which", which], check=True)


if __name__ == "__main__":
    main()
