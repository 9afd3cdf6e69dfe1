"""What a trace costs: calls of about 1 ms without one and under one, turn by turn.

`python benchmarks/trace.py`: the medians, and their ratio. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import ray

from single_controller import Worker, span, trace
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup


class Idle(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def nothing(self, seconds: float) -> int:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return 0


def microseconds(call: Callable[[], object], calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=100, help="per round")
    parser.add_argument("--work-ms", type=float, default=0.0, help="that the worker computes")
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")  # type: ignore[arg-type]
    times: dict[bool, list[float]] = {False: [], True: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        RayResourcePool([1], use_gpu=False) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Idle)) as group,
    ):

        def call() -> object:
            return group.nothing(options.work_ms / 1e3)

        microseconds(call, 300)
        for round_ in range(2 * options.rounds):
            on = round_ % 2 == 1
            with trace(Path(folder) / "trace.json") if on else nullcontext():
                microseconds(call, 5)
                times[on] += microseconds(call, options.calls)
    off_us, on_us = (statistics.median(times[on]) for on in (False, True))
    print(f"a call: {off_us:.0f} µs without a trace, {on_us:.0f} µs under one", end="; ")
    print(f"{on_us - off_us:+.1f} µs, {on_us / off_us - 1:+.1%}; of a 1 ms call", end=" ")
    print(f"{(on_us - off_us) / 1_000:+.1%}")
    spent = min(timeit.repeat(lambda: span("x").__enter__(), number=100_000, repeat=5)) / 100_000
    print(f"a span where no trace is on: {spent * 1e9:.0f} ns")


if __name__ == "__main__":
    main()
