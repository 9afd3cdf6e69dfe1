"""What a call in the driver's own process costs, and how long such a group takes to start.

Run it with: python benchmarks/inline.py. Microseconds, medians of five runs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from protocol import DataProto
from single_controller import ClassWithInitArgs, ResourcePool, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import InlineWorkerGroup

START = """
import time
started = time.perf_counter()
import torch
from single_controller import ResourcePool, ClassWithInitArgs, Worker
from single_controller.inline import InlineWorkerGroup
imported = time.perf_counter()
InlineWorkerGroup(ResourcePool([4]), ClassWithInitArgs(Worker))
print(imported - started, time.perf_counter() - imported)
"""


class Echo(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def echo(self, x: Any) -> Any:
        return x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto) -> DataProto:
        data.batch["a"] += self.rank
        return data


def microseconds(call: Callable[[], Any], times: int = 1000) -> float:
    runs = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(times):
            call()
        runs.append((time.perf_counter() - started) / times * 1e6)
    return median(runs)


def main() -> None:
    data = DataProto.from_dict({"a": torch.zeros(8)})
    print(f"{'ranks':>5} {'echo(3)':>10} {'add(8 rows)':>12}   µs per call")
    for ranks in (1, 2, 4):
        with InlineWorkerGroup(ResourcePool([ranks]), ClassWithInitArgs(Echo)) as group:
            echo = microseconds(lambda: group.echo(3))
            add = microseconds(lambda: group.add(data), 200)
        print(f"{ranks:>5} {echo:>10.1f} {add:>12.1f}")
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
    imports, start = (float(seconds) * 1000 for seconds in done.stdout.split())
    print(f"start of 4 ranks: {start:.1f} ms, after {imports:.0f} ms of imports")


if __name__ == "__main__":
    main()
