"""What `scale.py` measures: the work of a driver for many ranks, with stand-ins for their actors.

A stand-in pickles what it is sent, as Ray does before a task leaves, and answers with a reference
that was made before. So the driver does all that it does for real ranks, and there is no process
but two, which made the answers. A clock at each door of Ray (submitting, `ray.get`, `ray.wait`,
`ray.put`, `ray.kill`, the cluster's tables) tells Ray's time from the driver's own. What stand-ins
leave out of submitting a task is what `Bare` takes for one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray
import torch
from ray._private.state import state
from ray.core.generated import gcs_pb2

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.base.plan import Broadcast
from single_controller.errors import WorkerDiedError, WorkerError
from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from single_controller.ray.host import Host, HostInfo
from single_controller.ray.hosts import later
from single_controller.ray.message import packed_value
from single_controller.ray.process import ProcessInfo

ROWS, WIDTH = 8, 32  # per rank, and of each of the six columns
MESHES = {8: (2, 2), 16: (2, 4), 64: (4, 4), 256: (4, 16), 1024: (8, 16), 4096: (8, 64)}
RETURNS = 512  # references that one task makes
NO_PID = 10_000_000  # above what a kernel gives: nobody is asked for a stack, and nobody killed


class Member(Worker):
    """What the ranks are said to hold."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take(self, value: Any = None) -> None: ...

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("mesh"))
    def update_mesh(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def make(self, rows: Any) -> DataProto:
        return batch(rows)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def use(self, data: DataProto) -> int:
        return len(data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def use_later(self, data: DataProto) -> DataProto:
        return data


def batch(rows: int, texts: bool = False) -> DataProto:
    """Six columns of numbers, and if asked for one of strings."""
    numbers: dict[str, Any] = {
        "ids": torch.arange(rows * WIDTH).reshape(rows, WIDTH),
        "mask": torch.ones(rows, WIDTH, dtype=torch.int64),
        "positions": torch.arange(WIDTH).repeat(rows, 1),
        "log_probs": torch.rand(rows, WIDTH),
        "values": torch.rand(rows, WIDTH),
        "rewards": torch.rand(rows, WIDTH),
    }
    strings = {"text": np.array([f"answer {row}" for row in range(rows)], dtype=object)}
    return DataProto.from_dict(numbers, strings if texts else None)


class Doors:
    """What has passed the doors of Ray: seconds within them, calls by door, bytes and references
    of tasks, and when each rank was sent a call.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu, self.bytes, self.references = 0.0, 0.0, 0, 0
        self.calls: Counter[str] = Counter()
        self.sent: dict[str, list[float]] = {}  # by title of a call
        self._within = threading.local()

    @contextmanager
    def through(self, door: str) -> Generator[None]:
        """Within this context, the time is Ray's. A door behind another one counts no time."""
        self.calls[door] += 1
        if getattr(self._within, "door", False):
            yield
            return
        self._within.door, began, cpu = True, time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.cpu += time.thread_time() - cpu
            self.seconds += time.perf_counter() - began
            self._within.door = False

    def guard(self, owner: Any, name: str, instead: Callable[..., Any] | None = None) -> None:
        """Put a clock at one of Ray's own functions."""
        inner = getattr(owner, name)
        function = instead or inner

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self.through(name):
                return function(*args, **kwargs)

        setattr(owner, name, guarded)

    def submit(self, title: str, args: Sequence[Any]) -> None:
        """Pickle a task's arguments as Ray does."""
        with self.through("tasks"):
            context = ray._private.worker.global_worker.get_serialization_context()
            for value in args:
                if isinstance(value, ray.ObjectRef):
                    self.references += 1
                    continue
                pickled = context.serialize(value)
                self.bytes += pickled.total_bytes
                self.references += len(pickled.contained_object_refs)
                if not isinstance(value, bytes):
                    pickled.to_bytes()
        self.sent.setdefault(title, []).append(time.perf_counter())


DOORS = Doors()


class Tables:
    """The cluster's tables, in which stand-ins are as well. Ray is asked each time, too."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.rows: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_actor_info(self, actor_id: Any) -> Any:
        with DOORS.through("look-ups"):
            found = self._real.get_actor_info(actor_id)
            return self.rows.get(actor_id.hex(), found)

    def get_actor_table(self, *wanted: Any) -> list[Any]:
        with DOORS.through("look-ups"):
            return [*self._real.get_actor_table(*wanted), *self.rows.values()]

    def put(self, handle: Handle, dead: bool = False) -> None:
        """Say how an actor is."""
        states = gcs_pb2.ActorTableData
        self.rows[handle._actor_id.hex()] = states(
            actor_id=handle._actor_id.binary(),
            state=states.DEAD if dead else states.ALIVE,
            class_name="Host",
        ).SerializeToString()


class Handle:
    """Stands for an actor's handle: whatever its method, it pickles the arguments and answers."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank
        self._actor_id = ray.ActorID(os.urandom(16))

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self._ranks, self._rank, name)


class Method:
    """Stands for an actor's method. `returns`: how many references its tasks give."""

    def __init__(
        self, ranks: Ranks, rank: int, name: str, title: str = "", returns: int = 0
    ) -> None:
        self._ranks, self._rank, self._name, self._title = ranks, rank, name, title or name
        self._returns = returns or getattr(getattr(Host, name), "__ray_num_returns__", 1)

    def options(self, name: str = "", num_returns: int = 0) -> Method:
        return Method(self._ranks, self._rank, self._name, name, num_returns)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        DOORS.submit(self._title, (*args, *kwargs.values()))
        return self._ranks.answer(self._title, self._rank, self._returns)


class Ranks:
    """Stand-ins for the actors of a group; what they answer, by the title of the task."""

    def __init__(self, cluster: Cluster, size: int) -> None:
        self.cluster, self.size = cluster, size
        self.handles = [Handle(self, rank) for rank in range(size)]
        self.answers: dict[str, Sequence[Any]] = {"whoami": cluster.identities(size)}
        self._nothing = cluster.same("nothing", None, size)
        for handle in self.handles:
            cluster.tables.put(handle)
        self.group: Any = None

    def attach(self) -> Any:
        spec = RayClassWithInitArgs(ray.remote(Member))
        self.group = RayWorkerGroup(None, spec, worker_handles=self.handles)
        return self.group

    def answer(self, title: str, rank: int, returns: int) -> Any:
        """What the rank's task returns: what was said, or else nothing."""
        if title in self.answers:
            return self.answers[title][rank]
        if returns == 1:
            return self._nothing[rank]
        return list(islice(cycle(self._nothing), returns))

    def let_go(self) -> None:
        for handle in self.handles:
            self.cluster.tables.rows.pop(handle._actor_id.hex(), None)


class Maker:
    """Makes answers, and does nothing else."""

    def give(self, values: list[Any], gate: Any = None) -> Any:
        return values if len(values) > 1 else values[0]

    def fail(self, where: dict[str, Any]) -> None:
        raise WorkerError.wrap(ValueError("one rank has failed"), ray.cloudpickle.dumps, **where)

    def noop(self) -> None: ...


class Gate:
    """Keeps answers back until it is opened for them. What it is told may come in any order."""

    def __init__(self) -> None:
        self._opened: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def passed(self, number: int) -> None:
        await self._opened[number].wait()

    async def open(self, number: int) -> None:
        self._opened[number].set()


class Cluster:
    """A local Ray with the processes that make answers, and clocks at its doors."""

    def __init__(self) -> None:
        ray.init(
            address="local",
            num_cpus=8,  # logical
            num_gpus=0,
            include_dashboard=False,
            logging_level="ERROR",
            object_store_memory=1 << 30,
        )
        self._maker: Any = ray.remote(num_cpus=0)(Maker).remote()
        self._gate: Any = ray.remote(num_cpus=0)(Gate).remote()
        victim: Any = ray.remote(num_cpus=0)(Maker).remote()
        ray.get([self._maker.noop.remote(), victim.noop.remote()])
        ray.kill(victim)
        self._opened = 0
        self._made: dict[tuple[str, int], list[Any]] = {}
        self._node = ray.get_runtime_context().get_node_id()
        self.dead = failed(victim.noop)
        if hasattr(state, "_connect_and_get_accessor"):
            self.tables = tables = Tables(state._connect_and_get_accessor())
            state._connect_and_get_accessor = lambda: tables
        else:  # as ray 2.41 has it
            state._check_connected()
            self.tables = state.global_state_accessor = Tables(state.global_state_accessor)
        for name in ("get", "wait", "put"):
            DOORS.guard(ray, name)
        kill = ray.kill
        DOORS.guard(ray, "kill", lambda actor, **_: isinstance(actor, Handle) or kill(actor))

    def bare(self, count: int) -> tuple[float, float]:
        """Seconds that Ray takes to submit so many tasks that do nothing to an actor, and to get
        what they return.
        """
        noop = self._maker.noop
        gc.collect()
        began = time.perf_counter()
        refs = [noop.remote() for _ in range(count)]
        sent = time.perf_counter()
        ray.wait(refs, num_returns=count)
        ready = time.perf_counter()
        ray.get(refs)
        return sent - began, time.perf_counter() - ready

    def made(self, values: Sequence[Any], gate: Any = None) -> list[Any]:
        """A reference to each value, as to what an actor's method returned."""
        refs: list[Any] = []
        for start in range(0, len(values), RETURNS):
            some = list(values[start : start + RETURNS])
            given = self._maker.give.options(num_returns=len(some)).remote(some, gate)
            refs += given if len(some) > 1 else [given]
        return refs

    def same(self, name: str, value: Any, count: int) -> list[Any]:
        """So many references to values that are alike, all here, made once."""
        if (name, count) not in self._made:
            refs = self._made[name, count] = self.made([value] * count)
            ray.wait(refs, num_returns=count)
        return self._made[name, count]

    def outputs(self, count: int, texts: bool = False) -> list[Any]:
        """What hosts return for a batch of a rank's rows."""
        name = f"outputs {texts}"
        return self.same(name, packed_value(batch(ROWS, texts)), count)

    def published(self, count: int) -> list[Any]:
        """What `publish` of a host returns: the batch, and its bytes."""
        sizes = self.same("size", packed_value(batch(ROWS)).size, count)
        return list(zip(self.outputs(count), sizes, strict=True))

    def identities(self, count: int) -> list[Any]:
        if ("identities", count) not in self._made:
            address = "127.0.0.1"
            infos = [
                HostInfo(
                    r,
                    ProcessInfo(self._node, address, NO_PID + r, 1),
                    "cpu",
                    ("member",),
                    address=(address, 1),
                )
                for r in range(count)
            ]
            self._made["identities", count] = self.made(infos)
        return self._made["identities", count]

    def failing(self, title: str, rank: int) -> Any:
        role, _, method = title.partition(".")
        where = {
            "role": role,
            "method": method,
            "rank": rank,
            "node_ip": "127.0.0.1",
            "pid": NO_PID + rank,
            "remote_traceback": "\n".join(f'  File "loss.py", line {i}, in f' for i in range(20)),
            "when": time.time(),
            "log_tail": "",
        }
        ref = self._maker.fail.remote(where)
        ray.wait([ref])
        return ref

    def kept_back(self) -> Any:
        """A reference to what is here once `open` was called."""
        return self._gate.passed.remote(self._opened)

    def open(self) -> None:
        ray.get(self._gate.open.remote(self._opened))
        self._opened += 1


def failed(method: Any) -> Any:
    """A reference to what a method of an ended actor raised, once Ray has seen its end."""
    while True:
        ref = method.remote()
        try:
            ray.get(ref)
        except ray.exceptions.ActorDiedError:
            return ref


class Clock:
    """Notes what parts of a case take: seconds, and those of CPU that are not spent in Ray, since
    other programs may keep the machine busy. No garbage is collected meanwhile: that comes after so
    many objects, in one call with many ranks or in one of many with few.
    """

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self.elsewhere_s = 0.0  # of CPU, in the thread that lets go of results

    @contextmanager
    def __call__(self, part: str = "") -> Generator[None]:
        doors = DOORS
        doors.sent.clear()
        before = doors.seconds, doors.bytes, doors.references, Counter(doors.calls)
        cpu_before, elsewhere = doors.cpu, self.elsewhere_s
        gc.disable()
        began, cpu = time.perf_counter(), time.thread_time()
        yield
        cpu = time.thread_time() - cpu + self.elsewhere_s - elsewhere
        seconds = time.perf_counter() - began
        gc.enable()
        calls = doors.calls - before[3]
        sent = [times for title, times in doors.sent.items() if "." in title]
        self.parts[part] = {
            "seconds": seconds,
            "own_s": cpu - (doors.cpu - cpu_before),
            "ray_seconds": doors.seconds - before[0],
            "tasks": calls["tasks"],
            "bytes": doors.bytes - before[1],
            "references": doors.references - before[2],
            "lookups": calls["look-ups"],
            "waits": calls["wait"] + calls["get"],
            "skew_s": max((times[-1] - times[0] for times in sent), default=0.0),
        }

    @contextmanager
    def releasing(self, part: str = "release") -> Generator[None]:
        """Within this context results are dropped; a thread lets go of them before it ends."""
        times: SimpleQueue[float] = SimpleQueue()
        with self(part):
            later(lambda: times.put(time.thread_time()))
            yield
            later(lambda: times.put(time.thread_time()))
            self.elsewhere_s += -times.get() + times.get()


Round = Callable[[Clock], object]
Case = Callable[["Cluster", int], Iterator[Round]]  # yields what one round does, and cleans up


def to_all(value: Any) -> Case:
    def case(cluster: Cluster, size: int) -> Iterator[Round]:
        ranks = Ranks(cluster, size)
        group, args = ranks.attach(), () if value is None else (value,)

        def once(clock: Clock) -> None:
            with clock():
                group.take(*args)

        yield once
        ranks.let_go()

    return case


def by_rows(method: str, texts: bool = False) -> Case:
    """A batch goes out by rows, and comes back."""

    def case(cluster: Cluster, size: int) -> Iterator[Round]:
        ranks = Ranks(cluster, size)
        group, data = ranks.attach(), batch(ROWS * size, texts)
        outputs = cluster.outputs(size, texts)
        if method == "update_mesh":
            pipes, shards = mesh(size)
            tensors = size // pipes // shards
            places = [(r // shards // tensors, r // tensors % shards, r % tensors)
                      for r in range(size)]  # fmt: skip
            ranks.answers["member._query_dispatch_info"] = cluster.made([s for _, s, _ in places])
            ranks.answers["member._query_collect_info"] = cluster.made(
                [p == pipes - 1 and t == 0 for p, _, t in places]
            )
            rows = ROWS * size // shards
            whole = cluster.same(f"{rows} rows", packed_value(batch(rows)), shards)
            nothing = cluster.same("nothing", None, size)
            outputs = [whole[s] if p == pipes - 1 and t == 0 else nothing[r]
                       for r, (p, s, t) in enumerate(places)]  # fmt: skip
        ranks.answers[f"member.{method}"] = outputs

        def once(clock: Clock) -> None:
            with clock("send"):
                call = getattr(group, method).submit(data)
            with clock("collect"):
                result = call.result()
            assert len(result) == len(data)

        yield once
        ranks.let_go()

    return case


def mesh(size: int) -> tuple[int, int]:
    """Pipeline stages and data-parallel ranks: 8 x 64 x 8 for 4,096."""
    return MESHES.get(size, (1, size))


def chain(known: bool, parts: tuple[int, int] = (1, 1), union: bool = False) -> Case:
    """One group makes a batch, which stays there, and another one reads it."""

    def case(cluster: Cluster, size: int) -> Iterator[Round]:
        first, second = parts
        makers, readers = (
            Ranks(cluster, size // first * first),
            Ranks(cluster, size // first * second),
        )
        one, other = makers.attach(), readers.attach()
        makers.answers["publish"] = cluster.published(makers.size)
        rows = cluster.same("rows", ROWS, makers.size)
        readers.answers["member.use"] = cluster.same("use", ROWS * first // second, readers.size)

        def once(clock: Clock) -> None:
            gate = None if known else cluster.kept_back()
            makers.answers["member.make"] = (
                rows if known else cluster.made([ROWS] * makers.size, gate)
            )
            with clock("make"):
                made = one.make(Broadcast(ROWS))
                if union:
                    made = made.union(one.make(Broadcast(ROWS)))
            with clock("pass on"):
                read = other.use(made) if known else other.use_later(made)
            if not known:
                cluster.open()
                ray.wait(makers.answers["member.make"], num_returns=makers.size)
            with clock.releasing():
                del made, read

        yield once
        makers.let_go()
        readers.let_go()

    return case


def makers_of_batches(cluster: Cluster, size: int) -> tuple[Ranks, Any]:
    """Ranks that have made a batch each, which they publish when they are asked; their group."""
    ranks = Ranks(cluster, size)
    ranks.answers["publish"] = cluster.published(size)
    ranks.answers["member.make"] = cluster.same("rows", ROWS, size)
    return ranks, ranks.attach()


def fetch(cluster: Cluster, size: int) -> Iterator[Round]:
    """What was made without blocking comes to the driver."""
    ranks, group = makers_of_batches(cluster, size)

    def once(clock: Clock) -> None:
        made = group.make(Broadcast(ROWS))
        with clock("get"):
            result = made.get()
        assert len(result) == ROWS * size
        del result
        with clock.releasing():
            del made

    yield once
    ranks.let_go()


def raises(cluster: Cluster, size: int) -> Iterator[Round]:
    ranks = Ranks(cluster, size)
    group = ranks.attach()
    refs = list(cluster.same("nothing", None, size))
    refs[size // 2] = cluster.failing("member.take", size // 2)
    ranks.answers["member.take"] = refs

    def once(clock: Clock) -> None:
        with clock(), suppress(WorkerError):
            group.take()
            raise AssertionError("no rank has failed")

    yield once
    ranks.let_go()


def dies(cluster: Cluster, size: int) -> Iterator[Round]:
    def once(clock: Clock) -> None:
        ranks = Ranks(cluster, size)
        group = ranks.attach()
        refs = list(cluster.same("nothing", None, size))
        refs[size // 2] = cluster.dead
        ranks.answers["member.take"] = refs
        cluster.tables.put(ranks.handles[size // 2], dead=True)
        logging.getLogger("single_controller").setLevel(logging.CRITICAL)  # of the death
        with clock(), suppress(WorkerDiedError):
            group.take()
            raise AssertionError("no rank has died")
        ranks.let_go()

    yield once


def of_group(look: Callable[[Any], object]) -> Case:
    """Something about a group that is asked of the driver."""

    def case(cluster: Cluster, size: int) -> Iterator[Round]:
        ranks = Ranks(cluster, size)
        group = ranks.attach()

        def once(clock: Clock) -> None:
            with clock():
                look(group)

        yield once
        ranks.let_go()

    return case


def stats(cluster: Cluster, size: int) -> Iterator[Round]:
    """The sums, after a batch has been published by every rank."""
    ranks, group = makers_of_batches(cluster, size)

    def once(clock: Clock) -> None:
        made = group.make(Broadcast(ROWS))
        made.get()
        with clock.releasing("not shown"):
            del made
        del clock.parts["not shown"]
        with clock():
            str(group.stats())

    yield once
    ranks.let_go()


def ends(part: str) -> Case:
    """A group begins, with actors that are there, or closes."""

    def case(cluster: Cluster, size: int) -> Iterator[Round]:
        def once(clock: Clock) -> None:
            ranks, other = Ranks(cluster, size), Clock()
            with (clock if part == "attach" else other)():
                group = ranks.attach()
            with (clock if part == "close" else other)():
                group.close()
            ranks.let_go()

        yield once

    return case


CASES: dict[str, Case] = {
    "no-op": to_all(None),
    "int to all": to_all(7),
    "1 MB to all": to_all(np.zeros(1 << 20, np.uint8)),
    "6 columns": by_rows("update"),
    "6 columns and an object column": by_rows("update", texts=True),
    "6 columns, mesh": by_rows("update_mesh"),
    "future.get of 6 columns": fetch,
    "chain, rows known": chain(known=True),
    "chain, rows unknown": chain(known=False),
    "chain 3:2, rows known": chain(known=True, parts=(3, 2)),
    "chain 3:2, rows unknown": chain(known=False, parts=(3, 2)),
    "union, passed on": chain(known=True, union=True),
    "one rank raises": raises,
    "one rank dies": dies,
    "aliveness check": of_group(lambda group: group._hosts.now.find_dead()),
    "describe": of_group(lambda group: str(group.describe())),
    "stats": stats,
    "attach": ends("attach"),
    "close": ends("close"),
}


def measured(
    cluster: Cluster, case: Case, size: int, rounds: int, enough_s: float
) -> dict[str, dict[str, float]]:
    """Of each part of a case the medians over so many rounds, fewer where they take long."""
    once, began = next(prepared := case(cluster, size)), time.monotonic()
    found: list[dict[str, dict[str, float]]] = []
    warm = Clock()
    once(warm)  # also makes what is made once
    if time.monotonic() - began > enough_s:
        found.append(warm.parts)
    while not found or (len(found) < rounds and time.monotonic() - began < enough_s):
        clock = Clock()
        gc.collect()
        once(clock)
        found.append(clock.parts)
    for _ in prepared:
        pass
    return {
        part: {key: statistics.median(one[part][key] for one in found) for key in values}
        for part, values in found[0].items()
    }
