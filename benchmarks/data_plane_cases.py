"""What `data_plane.py` measures, for one library: bytes to workers and back, and calls without any.

Run as a program, with the name of a library, it measures when told to: it reads a contestant, the
name of a case and a number of calls per line, and answers with the seconds of each call (MiB for a
peak). With "verl" it imports nothing of ours, so that veRL's environment can run it.

"floor" are plain Ray actors that move numpy arrays of the same bytes with the copies that cannot be
spared: from the driver into shared memory, out of it into the worker's own, back into shared
memory, and into one array on the driver. To compare how ranks start, there are plain actors
without torch, and others that import torch and tensordict as those of a library do.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import tensordict
import torch

if "verl" in sys.argv:
    from verl import DataProto
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.single_controller.ray import (
        RayClassWithInitArgs,
        RayResourcePool,
        RayWorkerGroup,
        create_colocated_worker_cls,
    )

    READS: dict[str, Any] = {}
else:
    from protocol import DataProto
    from single_controller.base import Worker
    from single_controller.base.decorator import Dispatch, register
    from single_controller.ray import (
        RayClassWithInitArgs,
        RayResourcePool,
        RayWorkerGroup,
        create_colocated_worker_cls,
    )

    READS = {"reads_only": True}

MB = 1 << 20
STUCK_S = 45.0  # a request that takes longer shows where it is
Case = Callable[[], Any]


class Light(Worker):
    """Needs no torch."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def noop(self) -> None: ...


class Mover(Light):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def echo(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take(self, data: DataProto) -> None: ...

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def make(self, data: DataProto) -> DataProto:
        if not hasattr(self, "made"):
            self.made = torch.ones(len(data), 64 * MB // 4 // len(data))
        return DataProto.from_dict({"x": self.made})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def use(self, data: DataProto) -> int:
        return len(data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, **READS)
    def read(self, data: DataProto) -> int:
        return len(data)


class Plain:
    def noop(self) -> None: ...

    def echo(self, array: Any) -> Any:
        return array.copy()

    def take(self, array: Any) -> None:
        array.copy()


class PlainWithTorch(Plain):
    imported = (torch.Tensor, tensordict.TensorDict)


def batch(size: int, rows: int = 64) -> DataProto:
    return DataProto.from_dict({"x": torch.ones(rows, size // 4 // rows)})


def group(ranks: int, roles: int = 1, cls: Any = Mover) -> Any:
    pool = RayResourcePool([ranks], use_gpu=False)
    spec = RayClassWithInitArgs(ray.remote(cls))
    if roles == 1:
        return RayWorkerGroup(pool, spec)
    both = create_colocated_worker_cls({f"role{i}": spec for i in range(roles)})
    return RayWorkerGroup(pool, both).spawn({f"role{i}" for i in range(roles)})


def plain(ranks: int, cls: Any = Plain) -> list[Any]:
    actor = ray.remote(num_cpus=0.1)(cls)
    return [actor.remote() for _ in range(ranks)]


def end(workers: Any) -> None:
    for worker in workers:
        ray.kill(worker)


class Cases:
    """The cases of one library; groups start when first used, and end when others are needed."""

    def __init__(self) -> None:
        self._groups: dict[Any, Any] = {}
        self._future: Any = None

    def group(self, ranks: int, number: int = 0) -> Any:
        return self._made(("group", ranks, number), lambda: group(ranks))

    def roles(self, ranks: int) -> Any:
        return self._made(("roles", ranks), lambda: group(ranks, 2))

    def future(self, data: DataProto) -> Any:
        """What four ranks made before."""
        if self._future is None:
            self._future = self.roles(4)["role0"].make(data)
        return self._future

    def plain(self, ranks: int) -> Any:
        return self._made(("plain", ranks), lambda: plain(ranks))

    def _made(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._groups:
            self._groups[key] = make()
        return self._groups[key]

    def end(self) -> None:
        self._future = None
        for made in self._groups.values():
            for one in made.values() if isinstance(made, dict) else [made]:
                end(one if isinstance(one, list) else one.workers)
        self._groups.clear()

    def library(self) -> dict[str, Case]:
        """Through groups: ours, or veRL's."""
        strings = np.array([f"answer number {row}" for row in range(4096)], dtype=object)
        texts = DataProto.from_dict({"i": torch.arange(4096)}, {"text": strings})
        sizes = {size: batch(size * MB) for size in (64, 512)}
        small = batch(4 * 64, 4)

        def pass_on(ranks: Any, readers: Any) -> Any:
            return readers(ranks.make(small))

        return {
            "round trip 64 MB, 2 ranks": lambda: self.group(2).echo(sizes[64]),
            "round trip 512 MB, 2 ranks": lambda: self.group(2).echo(sizes[512]),
            "64 MB to 4 ranks": lambda: self.group(4).take(sizes[64]),
            "no-op, 2 ranks": lambda: self.group(2).noop(),
            "no-op, 4 ranks": lambda: self.group(4).noop(),
            "no-op, 8 ranks": lambda: self.group(8).noop(),
            "future 4 x 64 MB, group to group": lambda: pass_on(
                self.group(4), self.group(4, 1).use
            ),
            "role to role 4 x 64 MB, made before": lambda: self.roles(4)["role1"].read(
                self.future(small)
            ),
            "role to role 4 x 64 MB, reads_only": lambda: pass_on(
                self.roles(4)["role0"], self.roles(4)["role1"].read
            ),
            "role to role 4 x 64 MB, copied": lambda: pass_on(
                self.roles(4)["role0"], self.roles(4)["role1"].use
            ),
            "4096 strings, 2 ranks": lambda: self.group(2).echo(texts),
            "8 ranks to first call, no torch": lambda: start(lambda: group(8, cls=Light)),
            "8 ranks to first call, torch": lambda: start(lambda: group(8)),
            "peak MiB, 1 GB round trip": lambda: peak(self.group(2), batch(1024 * MB)),
        }

    def floor(self) -> dict[str, Case]:
        """Plain actors. Where a library needs to move nothing, they have nothing to compare."""
        sizes = {size: np.ones(size * MB // 4, np.float32) for size in (64, 512)}

        def round_trip(size: int) -> Any:
            halves = np.split(sizes[size], 2)
            actors = self.plain(2)
            refs = [a.echo.remote(half) for a, half in zip(actors, halves, strict=True)]
            return np.concatenate(ray.get(refs))

        def take() -> Any:
            ref = ray.put(sizes[64])
            return ray.get([actor.take.remote(ref) for actor in self.plain(4)])

        def noop(ranks: int) -> Any:
            return ray.get([actor.noop.remote() for actor in self.plain(ranks)])

        return {
            "round trip 64 MB, 2 ranks": lambda: round_trip(64),
            "round trip 512 MB, 2 ranks": lambda: round_trip(512),
            "64 MB to 4 ranks": take,
            "no-op, 2 ranks": lambda: noop(2),
            "no-op, 4 ranks": lambda: noop(4),
            "no-op, 8 ranks": lambda: noop(8),
            "8 ranks to first call, no torch": lambda: start(lambda: plain(8)),
            "8 ranks to first call, torch": lambda: start(lambda: plain(8, PlainWithTorch)),
        }


def start(make: Callable[[], Any]) -> float:
    """Seconds until the first call of a new group has returned."""
    began = time.perf_counter()
    made = make()
    if isinstance(made, list):
        ray.get([actor.noop.remote() for actor in made])
    else:
        made.noop()
    taken = time.perf_counter() - began
    end(made if isinstance(made, list) else made.workers)
    return taken


def peak(made: Any, data: DataProto) -> float:
    """MiB that the driver's own memory grew by, at most, during a round trip; shared memory, which
    the copies into it and out of it map, is not the driver's own.
    """
    made.echo(batch(2 * MB))
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = made.echo(data)
    finally:
        done.set()
        watcher.join()
    del result
    return (max(seen) - seen[0]) / 1024 + 1024  # and the batch itself


def anonymous() -> int:
    """KiB of this process's own memory."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0])


def measure(case: Case, calls: int) -> list[float]:
    """Seconds of each call, or what the case itself measured."""
    taken = []
    gc.collect()
    for _ in range(calls):
        began = time.perf_counter()
        result = case()
        seconds = time.perf_counter() - began
        taken.append(result if isinstance(result, float) else seconds)
        del result
    return taken


def serve(library: str) -> None:
    """Measure at the other end of a pipe."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    ray.init(
        address="local",
        num_cpus=10_000,  # logical: what ended groups reserve is not waited for
        num_gpus=0,
        include_dashboard=False,
        logging_level="ERROR",
        object_store_memory=6 << 30,
    )
    cases = Cases()
    sides = {library: cases.library()}
    if library == "ours":
        sides["floor"] = cases.floor()
    names = ("ray", "torch", "tensordict", "numpy")
    versions = {library: "", **{name: sys.modules[name].__version__ for name in names}}
    print(json.dumps([versions, {s: list(c) for s, c in sides.items()}]), file=answers, flush=True)
    for line in sys.stdin:
        side, case, calls = json.loads(line)
        faulthandler.dump_traceback_later(STUCK_S, repeat=True)
        if side == "end":
            cases.end()
            print(json.dumps([0.0]), file=answers, flush=True)
        else:
            print(json.dumps(measure(sides[side][case], calls)), file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()
    ray.shutdown()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.argv[1])
