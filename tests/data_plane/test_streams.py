"""What a method yields goes in buckets to those that read it, while it is made."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from single_controller import (
    CallTimeoutError,
    GroupBrokenError,
    RegistrationError,
    SendError,
    SharedMemoryWriteError,
    WorkerDiedError,
    WorkerError,
    trace,
)
from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    Colocated,
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
    stream,
)
from single_controller.ray.failure import StaysError
from single_controller.ray.host import AsyncHost, Host
from single_controller.ray.placement import dead
from single_controller.ray.remote_batch import RemoteCall
from tests.data_plane.stage import moved
from tests.slices import slices
from tests.waiting import eventually, once_taken

ALL: dict[str, Any] = {"dispatch_mode": Dispatch.ONE_TO_ALL}
COUNT, SIZE = 10, 5_000  # tensors, and floats in each: a bucket goes by way of the store


def expected(rank: int, count: int = COUNT) -> list[tuple[str, float, int]]:
    return [(f"w{i}", i + 100.0 * rank, SIZE) for i in range(count)]


class Streams(Worker):
    """Makes and reads, and says how it went."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.closed, self.ahead, self.most = False, 0, 0
        self.ended = ""

    @register(**ALL, blocking=False)
    def weights(
        self,
        count: int = COUNT,
        size: int = SIZE,
        fail_at: int | None = None,
        progress: Path | None = None,
        die_at: int | None = None,
        closed: Path | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        alive: list[Any] = []
        self.made, self.closed, self.ahead, self.most = [], False, 0, 0
        try:
            for i in range(count):
                if i == fail_at:
                    raise KeyError(f"no w{i}")
                if i == die_at:
                    os._exit(1)
                array = np.full(size, i + 100.0 * self.rank, dtype=np.float32)
                alive.append(Lived(array))
                self.most = max(self.most, sum(one.lives for one in alive))
                self.made.append(array.ctypes.data)
                if progress is not None:
                    read = [path.stat().st_size for path in progress.iterdir()]
                    self.ahead = max(self.ahead, i - min(read))
                tensor = torch.from_numpy(array)
                del array
                yield f"w{i}", tensor
            if fail_at == count:
                raise KeyError("behind the last")
        finally:
            self.closed = True
            if closed is not None:
                closed.touch()

    @register(**ALL, blocking=False)
    def buffer(self) -> Iterator[tuple[str, torch.Tensor]]:
        x = torch.zeros(SIZE)
        for i in range(COUNT):
            x.fill_(i)
            yield f"w{i}", x

    @register(**ALL, blocking=False)
    def written_late(self) -> Iterator[tuple[str, torch.Tensor]]:
        made: list[torch.Tensor] = []
        for i in range(COUNT):
            made.append(torch.zeros(SIZE))
            if i > 1:
                made[i - 2] += 1  # which is on its way
            yield f"w{i}", made[-1]

    @register(**ALL, blocking=False)
    def freed_early(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(COUNT):
            x = torch.nn.Parameter(torch.zeros(SIZE))
            yield f"w{i}", x
            x.untyped_storage().resize_(0)

    @register(**ALL, reads_only=True)
    def write(self, pairs: Any) -> None:
        for _, tensor in pairs:
            tensor += 1

    @register(**ALL, blocking=False)
    def of_shapes(self, shapes: list[tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        for i, shape in enumerate(shapes):
            yield f"w{i}", torch.full(shape, float(i))

    @register(**ALL)
    def load(
        self,
        pairs: Iterator[tuple[str, torch.Tensor]],
        stop: int | None = None,
        fail_at: int | None = None,
        until: Path | None = None,
        progress: Path | None = None,
        die_at: int | None = None,
    ) -> list[tuple[str, float, int]]:
        found: list[tuple[str, float, int]] = []
        self.ended = ""
        try:
            for name, tensor in pairs if stop != 0 else ():
                while self.rank == 1 and until is not None and not until.exists():
                    threading.Event().wait(0.01)
                tensor += 0  # its own
                found.append((name, float(tensor.flatten()[0]), tensor.numel()))
                if progress is not None:
                    with (progress / f"{self.rank}").open("a") as file:
                        file.write(".")
                if len(found) == stop:
                    break
                if len(found) == die_at and self.rank == 0:
                    os._exit(1)
                if len(found) == fail_at and self.rank == 0:
                    raise ValueError("cannot take it")
        except Exception as error:
            self.ended = str(error)
            raise
        return found

    @register(**ALL)
    def some(self, pairs: Any, stop: int) -> list[tuple[str, float, int]]:
        return Streams.load.__wrapped__(self, pairs, stop)  # type: ignore[no-any-return]

    @register(**ALL)
    def load_or_close(self, pairs: Any) -> None:
        pairs.close() if self.rank == 0 else [*pairs]

    @register(**ALL)
    def shapes(self, pairs: Any) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for _, tensor in pairs]

    @register(**ALL)
    def load_all(self, streams: list[Any]) -> list[list[tuple[str, float]]]:
        at_once = [[(n, float(t[0])) for n, t in each] for each in zip(*streams, strict=True)]
        return [list(one) for one in zip(*at_once, strict=True)]

    @register(**ALL, blocking=False)
    def load_later(self, pairs: Any) -> int:
        return len([*pairs])

    @register(**ALL)
    def each(self, streams: list[Any], stop: int | None = None) -> list[int]:
        """How many it read of one after the other."""
        return [len(Streams.load.__wrapped__(self, one, stop)) for one in streams]

    @register(**ALL)
    def load_and_go_on(self, pairs: Any, stop: int, until: Path) -> None:
        Streams.load.__wrapped__(self, pairs, stop)
        while self.rank == 0 and not until.exists():
            threading.Event().wait(0.01)
        until.touch()

    @register(**ALL, reads_only=True)
    def look_at(self, streams: list[Any]) -> int:
        return sum(int(x[0]) + 100 == int(y[0]) for (_, x), (_, y) in zip(*streams, strict=True))

    @register(**ALL, reads_only=True)
    def count(self, pairs: Any) -> int:
        return len([*pairs])

    @register(**ALL, blocking=False)
    def called(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield str(ray.get_runtime_context().get_task_name()), torch.zeros(1)

    @register(**ALL, materialize_futures=False)
    def take_handle(self, handle: Any) -> None: ...

    @register(**ALL)
    def take_some(self, pairs: Any) -> str:
        self.pairs = pairs
        return str(next(pairs)[0])

    @register(**ALL)
    def take_more(self) -> str:
        return str(next(self.pairs)[0])

    @register(**ALL, reads_only=True)
    def addresses(self, pairs: Any) -> list[tuple[int, bool]]:
        return [(tensor.data_ptr(), is_shared(tensor)) for _, tensor in pairs]

    @register(**ALL)
    def state(self) -> tuple[int, bool, str]:
        """How many were made since this was asked, whether that ended, and how reading did."""
        found = len(self.made), self.closed, self.ended
        self.made, self.closed, self.ended = [], False, ""
        return found

    @register(**ALL)
    def read_of(self, progress: Path) -> int:
        return progress.stat().st_size if progress.exists() else 0

    @register(**ALL)
    def figures(self) -> tuple[int, int, list[int]]:
        return self.ahead, self.most, self.made

    @register(**ALL)
    def kept(self) -> tuple[int, int]:
        found = gc.get_objects()
        made = [o for o in found if inspect.isgenerator(o) and o.gi_code.co_name == "weights"]
        return sum(len(o._shelf) for o in found if isinstance(o, AsyncHost | Host)), len(made)


class Lived:
    """Whether memory still is: a tensor of it holds the array."""

    def __init__(self, array: Any) -> None:
        self._array = weakref.ref(array)

    @property
    def lives(self) -> bool:
        return self._array() is not None


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether it is memory of Ray's store."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(at, 16) for at in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return "plasma" in line or "/dev/shm" in line or "ray" in line
    return False


class InTurns(Worker):
    """Yields whether it has the device."""

    takes_turns, there = True, False

    def onload(self) -> None:
        self.there = True

    def offload(self) -> None:
        self.there = False

    @register(**ALL, blocking=False)
    def looks(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "there", torch.tensor([float(self.there)])

    @register(**ALL)
    def look(self) -> bool:
        return self.there


class AsyncStreams(Streams):
    """The same on an event loop."""

    @register(**ALL, blocking=False, bucket_bytes=2 * 4 * SIZE)
    async def awaited(self) -> Any:
        return Streams.weights.__wrapped__(self)

    @register(**ALL)
    async def load_there(self, pairs: Any) -> list[tuple[str, float, int]]:
        return [(name, float(x[0]), x.numel()) for name, x in pairs]


@contextmanager
def two_ranks(cls: type[Streams]) -> Iterator[Any]:
    """A group in processes of its own."""
    with (
        RayResourcePool([2], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(cls), call_timeout_s=60) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def roles(cluster: None) -> Iterator[Colocated]:
    with (
        RayResourcePool([2], cpus_per_process=0.1) as pool,
        colocate(pool, maker=Streams, twin=Streams) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def maker(roles: Colocated) -> Any:
    return roles.maker


@pytest.fixture(scope="module")
def reader(cluster: None) -> Iterator[Any]:
    with two_ranks(Streams) as group:
        yield group


@pytest.fixture(scope="module")
def on_a_loop(cluster: None) -> Iterator[Any]:
    with two_ranks(AsyncStreams) as group:
        yield group


def fails(call: Callable[[], Any], error: type[Exception], match: str = "") -> Any:
    """What it raises, once the ranks of the call before have all ended."""

    def tried() -> Any:
        with pytest.raises(error, match=match) as caught:
            call()
        return caught.value

    return once_taken(tried)


def in_buckets(group: Any, of: int = 2, **how: Any) -> list[Any]:
    """Handles of what it yields, so many tensors in a bucket."""
    handles: list[Any] = group.weights.options(bucket_bytes=of * 4 * SIZE)(**how)
    return handles


@pytest.mark.parametrize(
    ("sizes", "most", "groups"),
    [
        ([1, 1, 1], 4, [1, 1, 1]),
        ([1, 1, 1], 8, [2, 1]),
        ([1, 1, 1], 1, [1, 1, 1]),
        ([1, 9, 1, 1], 8, [1, 1, 2]),  # one that is larger goes alone
        ([0, 0, 2, 0], 8, [4]),
        ([1, 1, 1], 1 << 40, [3]),
        ([], 8, []),
    ],
)
def test_a_bucket_has_as_many_tensors_as_fit(
    sizes: list[int], most: int, groups: list[int]
) -> None:
    pairs = ((f"w{size}", torch.zeros(size)) for size in sizes)
    assert [len(bucket.pairs) for bucket in stream._buckets(pairs, most, "it")] == groups


def test_a_rank_makes_only_what_is_read(maker: Any, reader: Any) -> None:
    maker.state()
    assert reader.load(in_buckets(maker)[0]) == [expected(0)] * 2
    assert maker.state() == [(COUNT, True, ""), (0, False, "")]


def test_a_group_of_some_ranks_of_another_reads_to_the_end(maker: Any, reader: Any) -> None:
    spec = RayClassWithInitArgs(Streams)
    some: Any = RayWorkerGroup(None, spec, worker_handles=reader.workers[1:], call_timeout_s=60)
    assert some.load(in_buckets(maker, of=1)[0]) == [expected(0)]


def test_two_buckets_are_alive_while_the_slowest_reader_is_at_the_first(
    maker: Any, reader: Any, tmp_path: Path
) -> None:
    progress = tmp_path / "progress"
    progress.mkdir()
    for rank in range(2):
        (progress / f"{rank}").touch()
    gate = tmp_path / "go"
    (handle, _) = in_buckets(maker, count=20, progress=progress)
    read = reader.load.submit(handle, until=gate, progress=progress)
    assert eventually(lambda: (progress / "0").stat().st_size >= 4)  # all that was made so far
    gate.touch()
    assert read.result() == [expected(0, 20)] * 2
    ahead, most, _ = maker.figures()[0]
    assert 3 <= ahead <= 4  # of two tensors each, and the first that did not fit
    assert most <= 5


@pytest.mark.parametrize("role", ["maker", "twin"])
def test_a_process_reads_what_it_makes_alone_and_with_others(roles: Colocated, role: str) -> None:
    here = getattr(roles, role)
    each = [[(name, x) for name, x, _ in expected(rank)] for rank in range(2)]
    assert here.load(PerRank(in_buckets(roles.maker))) == [expected(0), expected(1)]
    assert here.load(in_buckets(roles.maker)[1]) == [expected(1)] * 2
    assert here.load_all(in_buckets(roles.maker)) == [each] * 2
    assert here.load.options(ranks=[1])(in_buckets(roles.maker)[0]) == [expected(0)]


def test_what_is_only_read_is_not_copied(roles: Colocated, reader: Any) -> None:
    made = in_buckets(roles.maker)
    found = roles.twin.addresses(PerRank(made))
    figures = roles.maker.figures()
    assert [[address for address, _ in one] for one in found] == [one[2] for one in figures]
    shared = reader.addresses(in_buckets(roles.maker, of=10)[0])
    assert [all(there for _, there in one) for one in shared] == [True, True]
    roles.twin.load(PerRank(in_buckets(roles.maker)))  # writes into copies
    assert reader.load(in_buckets(roles.maker)[0]) == [expected(0)] * 2


@pytest.mark.parametrize("of", [1, 2, COUNT])
def test_who_keeps_what_others_lend_is_told(
    maker: Any, reader: Any, monkeypatch: pytest.MonkeyPatch, of: int
) -> None:
    assert reader.count(in_buckets(maker, of=of)[0]) == [COUNT] * 2  # of shared memory
    monkeypatch.setattr(RemoteCall, "can_lend", lambda *_: True)  # as between cards
    assert maker.count(PerRank(in_buckets(maker, of=of))) == [COUNT] * 2  # its own
    assert reader.look_at(in_buckets(maker, of=of)) == [COUNT] * 2  # by `zip`, one at a time
    kept = r"that maker.weights yields is gone .* reads_only=True.* copy each"
    fails(lambda: reader.count(in_buckets(maker, of=of)[0]), RuntimeError, kept)
    assert once_taken(lambda: reader.shapes(in_buckets(maker)[0])) == [[(SIZE,)] * COUNT] * 2


def test_empty_ones_and_shapes_that_differ_from_the_last_are_read_as_they_are(
    maker: Any, reader: Any
) -> None:
    for shapes in ([], [(0,)], [(2, 3), (0, 4), (1,)], [(3, 2), (5,)]):
        assert reader.shapes(maker.of_shapes(shapes)[1]) == [shapes] * 2
        assert maker.shapes(maker.of_shapes(shapes)[1]) == [shapes] * 2


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_who_stops_reading_is_not_waited_for(maker: Any, reader: Any, stop: int) -> None:
    maker.state()
    assert reader.load(in_buckets(maker, of=1)[0], stop=stop) == [expected(0)[:stop]] * 2
    (made, closed, _), _ = maker.state()
    assert made <= stop + 3
    assert closed is (made > 0)
    one, all_of_them = maker.load(PerRank(in_buckets(maker)), stop=stop)
    assert (one, all_of_them) == (expected(0)[:stop], expected(1)[:stop])
    assert maker.load(in_buckets(maker)[0], stop=5) == [expected(0)[:5]] * 2


def test_who_leaves_a_loop_is_not_waited_for_though_its_call_goes_on(
    maker: Any, reader: Any, tmp_path: Path
) -> None:
    two = [in_buckets(maker, of=1)[0] for _ in range(2)]  # which one process makes
    assert reader.each.options(timeout_s=60)(two, PerRank([2, 3])) == [[2, 2], [3, 3]]
    call = reader.load_and_go_on.options(timeout_s=60)
    call(in_buckets(maker, of=1)[0], PerRank([1, COUNT]), tmp_path / "all was read")
    one = in_buckets(maker)[0]
    fails(lambda: reader.each([one, one]), RuntimeError, "is read once")
    assert once_taken(lambda: reader.each([])) == [[], []]


def test_a_process_makes_streams_in_the_order_in_which_all_ranks_are_passed_them(
    maker: Any, reader: Any
) -> None:
    one, other, last = (in_buckets(maker, of=1)[0] for _ in range(3))
    each = reader.each.options(timeout_s=60)
    assert each(PerRank([[one, last], [other, last]])) == [[COUNT] * 2] * 2
    one, other = (in_buckets(maker, of=1)[0] for _ in range(2))
    with pytest.raises(SendError, match="in different orders"):
        each(PerRank([[one, other], [other, one]]))
    assert each([other, one]) == [[COUNT] * 2] * 2


def test_a_maker_that_stops_reading_makes_the_rest_for_others(maker: Any) -> None:
    maker.state()
    handle = in_buckets(maker)[0]
    assert maker.some(handle, PerRank([1, COUNT])) == [expected(0)[:1], expected(0)]
    assert maker.state()[0][:2] == (COUNT, True)
    handle = in_buckets(maker)[0]
    assert maker.some(handle, PerRank([0, COUNT])) == [[], expected(0)]
    with pytest.raises(WorkerError, match="not made all that other ranks read, too"):
        maker.load_or_close(in_buckets(maker)[0])


@pytest.mark.parametrize("fail_at", [0, 5, COUNT])
def test_an_error_of_the_maker_ends_its_readers_and_says_where(
    maker: Any, reader: Any, fail_at: int
) -> None:
    what = "behind the last" if fail_at == COUNT else f"no w{fail_at}"
    error = fails(lambda: reader.load(in_buckets(maker, fail_at=fail_at)[1]), WorkerError, what)
    assert isinstance(error, KeyError)
    assert (error.role, error.method, error.rank) == ("maker", "weights", 1)
    assert [what in ended for _, _, ended in once_taken(reader.state)] == [True, True]
    assert maker.state()[1][1]
    fails(lambda: maker.load(in_buckets(maker, fail_at=fail_at)[1]), WorkerError, what)
    assert [what in ended for _, _, ended in once_taken(maker.state)] == [True, True]
    assert once_taken(lambda: reader.load(in_buckets(maker)[1])) == [expected(1)] * 2


def test_an_error_of_a_reader_ends_the_maker_and_the_other_readers(maker: Any, reader: Any) -> None:
    for group in (maker, reader):
        maker.state()
        read = lambda group=group: group.load(in_buckets(maker, of=1)[1], fail_at=3)  # noqa: E731
        error = fails(read, WorkerError, "cannot take it")
        assert (error.method, error.rank) == ("load", 0)
        made, closed, _ = once_taken(maker.state)[1] if group is reader else (0, True, "")
        assert (made < COUNT, closed) == (True, True)
    assert once_taken(lambda: reader.load(in_buckets(maker)[0])) == [expected(0)] * 2


def test_a_reader_has_its_deadline(maker: Any, reader: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    told = r"ranks \[1\].*They read what comes from maker.weights on rank 0"
    with pytest.raises(CallTimeoutError, match=told):
        reader.load.options(timeout_s=0.5)(in_buckets(maker)[0], until=gate, stop=4)
    gate.touch()
    assert once_taken(lambda: reader.load(in_buckets(maker)[0])) == [expected(0)] * 2


def test_a_write_into_what_was_yielded_is_found_out(maker: Any, reader: Any) -> None:
    for group in (maker, reader):
        for method, size in (
            ("buffer", 4),
            ("buffer", 1 << 20),
            ("written_late", 4),
            ("freed_early", 1 << 20),
        ):
            made = getattr(maker, method).options(bucket_bytes=size * SIZE)
            fails(lambda: group.load(made()[0]), SharedMemoryWriteError, "before all had read")  # noqa: B023
    fails(
        lambda: maker.write(PerRank(in_buckets(maker, of=COUNT))),
        SharedMemoryWriteError,
        "had yielded, before all had read",
    )


def test_what_is_yielded_is_read_once_and_in_one_call(maker: Any, reader: Any) -> None:
    first, _ = in_buckets(maker)
    assert reader.load(first) == [expected(0)] * 2
    for group in (maker, reader):
        with pytest.raises(SendError, match="on rank 0 was passed on before"):
            group.load(first)
    first, second = in_buckets(maker)
    assert maker.take_some(first) == ["w0", "w0"]
    assert reader.take_some(second) == ["w0", "w0"]
    for group in (maker, reader):
        with pytest.raises(RuntimeError, match="and that has ended"):
            group.take_more()
    with pytest.raises(SendError, match="materialize_futures=False"):
        reader.take_handle(in_buckets(maker)[0])
    with pytest.raises(StaysError, match=r"maker.weights returned stays .* Unless it is yielded"):
        ray.get(in_buckets(maker))
    with pytest.raises(TypeError, match="call it without submit"):
        maker.weights.submit()


def test_ranks_that_would_wait_for_one_another_are_refused(roles: Colocated) -> None:
    for group in (roles.maker, roles.twin):
        handles = in_buckets(roles.maker)
        for method in (group.load, group.load_later):
            with pytest.raises(SendError, match="pass it that, too"):
                method(PerRank(handles[::-1]))
        assert group.load(PerRank(handles)) == [expected(0), expected(1)]


@pytest.mark.slow
def test_methods_on_a_loop_make_and_read(maker: Any, reader: Any, on_a_loop: Any) -> None:
    assert reader.load(on_a_loop.awaited()[1]) == [expected(1)] * 2
    assert on_a_loop.load_there(in_buckets(maker)[0]) == [expected(0)] * 2
    assert on_a_loop.load_there(on_a_loop.awaited()[0]) == [expected(0)] * 2
    assert on_a_loop.load(PerRank(on_a_loop.awaited())) == [expected(0), expected(1)]
    with pytest.raises(WorkerError, match="no w3") as caught:
        reader.load(in_buckets(on_a_loop, fail_at=3)[1])
    assert (caught.value.method, caught.value.rank) == ("weights", 1)


@pytest.mark.parametrize("makers", ["maker", pytest.param("on_a_loop", marks=pytest.mark.slow)])
def test_what_is_dropped_unread_is_let_go_of(makers: str, request: pytest.FixtureRequest) -> None:
    group = request.getfixturevalue(makers)
    gc.collect()
    assert eventually(lambda: group.kept() == [(0, 0)] * 2)
    handles = in_buckets(group)
    assert group.kept() == [(1, 1)] * 2
    del handles
    assert eventually(lambda: group.kept() == [(0, 0)] * 2)


def test_a_relay_keeps_no_bucket_that_was_read(maker: Any, reader: Any) -> None:
    def kept(relay: Any) -> tuple[int, int]:
        streams = relay._streams.values()
        return sum(len(one.buckets) for one in streams), len(streams)

    relay = maker._hosts.now.relay()
    for stop in (None, 1, 3):
        reader.load(in_buckets(maker)[0], stop=stop)
    look = relay.__ray_call__
    assert eventually(lambda: ray.get(look.remote(kept))[0] == 0)
    assert ray.get(look.remote(kept))[1] <= stream._LATE
    ray.kill(relay)
    assert eventually(lambda: maker._hosts.now.relay() is not relay)
    assert reader.load(in_buckets(maker)[0]) == [expected(0)] * 2


def test_the_makers_next_call_waits_until_all_was_read(
    maker: Any, reader: Any, tmp_path: Path
) -> None:
    progress = tmp_path / "progress"
    progress.mkdir()
    closed = tmp_path / "closed"
    (handle, _) = in_buckets(maker, of=COUNT, closed=closed)  # all of it can be made at once
    read = reader.load.submit(handle, until=tmp_path / "go", progress=progress)
    after = maker.read_of.submit(progress / "1")
    assert eventually(closed.exists)
    (tmp_path / "go").touch()
    assert after.result()[0] == COUNT
    assert read.result() == [expected(0)] * 2


def test_bytes_go_from_process_to_process_and_are_counted(
    maker: Any, reader: Any, tmp_path: Path
) -> None:
    assert reader.load(maker.called()[0]) == [[("maker.called", 0.0, 1)]] * 2  # for who looks on
    moved(maker)  # so that all is counted
    before, driver = maker.stats()["weights"].bytes_between, maker.stats().driver_bytes
    with trace(tmp_path / "t.json") as recorded:
        assert reader.shapes(in_buckets(maker)[0]) == [[(SIZE,)] * COUNT] * 2
        assert eventually(lambda: maker.stats()["weights"].bytes_between > before)  # its end
    between = maker.stats()["weights"].bytes_between - before
    assert COUNT * SIZE * 4 <= between < 1.5 * COUNT * SIZE * 4
    [made] = [e["args"] for e in slices(recorded, "user") if e["name"] == "stream"]
    assert (made["method"], made["bytes"]) == ("maker.weights", between)
    maker.load(in_buckets(maker)[0])  # one that makes and reads them, too
    assert eventually(lambda: maker.stats()["weights"].bytes_between > before + between)
    assert maker.stats()["weights"].bytes_between - before == 2 * between
    assert maker.stats().driver_bytes - driver < 10_000


def test_two_threads_may_pass_streams_between_the_same_groups_at_the_same_moment(
    maker: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, both = RemoteCall.task, threading.Barrier(2)

    def meet(call: RemoteCall, name: str, *args: Any) -> Any:
        ref = told(call, name, *args)
        assert name == "stream"
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # for the other one to have told its maker, which it may not
        return ref

    monkeypatch.setattr(RemoteCall, "task", meet)
    with ThreadPoolExecutor(2) as threads:
        there = threads.submit(lambda: reader.load.submit(in_buckets(maker)[0]).result(timeout=20))
        back = threads.submit(lambda: maker.load.submit(in_buckets(reader)[0]).result(timeout=20))
        assert there.result() == back.result() == [expected(0)] * 2


def test_a_number_of_bytes_and_a_mode_that_has_handles_are_asked_for(maker: Any) -> None:
    for wrong in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="a whole number of bytes, at least 1"):
            register(**ALL, blocking=False, bucket_bytes=wrong)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="a whole number of bytes, at least 1"):
            maker.weights.options(bucket_bytes=wrong)
    for how in ({}, {"blocking": True}, {"dispatch_mode": Dispatch.DP_COMPUTE_PROTO}):
        with pytest.raises(RegistrationError, match="needs blocking=False and a mode"):
            register(
                **{**ALL, "blocking": bool(how.get("blocking", not how)), **how}, bucket_bytes=1
            )
    with pytest.raises(ValueError, match="sends nothing in buckets"):
        maker.load.options(bucket_bytes=1)


@pytest.fixture
def short_lived(cluster: None) -> Iterator[Any]:
    with (
        RayResourcePool([2], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Streams)) as group,
    ):
        yield group


@pytest.mark.slow
def test_the_death_of_a_reader_ends_the_maker_and_the_other_readers(
    maker: Any, short_lived: Any
) -> None:
    maker.state()
    with pytest.raises(WorkerDiedError) as caught:
        short_lived.load(in_buckets(maker)[1], die_at=3)
    assert (caught.value.method, caught.value.rank) == ("load", 0)
    made, closed, _ = maker.state()[1]
    assert (made < COUNT, closed) == (True, True)


@pytest.mark.slow
def test_the_death_of_a_maker_ends_its_readers(reader: Any, short_lived: Any) -> None:
    with pytest.raises(WorkerDiedError) as caught:
        reader.load(in_buckets(short_lived, die_at=5)[1])
    assert (caught.value.method, caught.value.rank) == ("weights", 1)
    assert [bool(ended) for _, _, ended in reader.state()] == [True, True]
    with pytest.raises(WorkerDiedError):
        short_lived.load.options(timeout_s=60)(in_buckets(short_lived, die_at=5)[1])


@pytest.mark.slow
def test_a_maker_whose_readers_were_not_sent_their_call_goes_on(
    maker: Any, short_lived: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = short_lived._hosts.now.relay()

    def interrupted() -> Any:
        making = lambda at: any(one.buckets for one in at._streams.values())  # noqa: E731
        assert eventually(lambda: ray.get(relay.__ray_call__.remote(making)))
        raise KeyboardInterrupt

    monkeypatch.setattr(maker._hosts.now, "sending_a_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        maker.load(in_buckets(short_lived, of=1)[0])
    assert short_lived.shapes.options(timeout_s=60)([]) == [[]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "ranks", "told"),
    [
        ("close", [0, 1], "weights: rank 0|the group that yields"),  # one of which waits for pairs
        ("restart", [0, 1], "weights: rank 0|the group that yields"),
        ("close", [1], "the group that yields it was closed or restarted"),
    ],
)
def test_the_end_of_the_makers_group_ends_its_readers_and_its_relay(
    reader: Any,
    short_lived: Any,
    tmp_path: Path,
    end: str,
    ranks: list[int],
    told: str,
) -> None:
    before = in_buckets(short_lived)
    relay = short_lived._hosts.now.relay()
    (handle, _) = in_buckets(short_lived, count=1000)
    read = reader.load.options(ranks=ranks).submit(handle, until=tmp_path / "go")
    assert eventually(lambda: ray.get(relay.__ray_call__.remote(lambda r: bool(r._streams))))
    getattr(short_lived, end)()
    (tmp_path / "go").touch()
    with pytest.raises((WorkerDiedError, GroupBrokenError), match=told) as caught:
        read.result(timeout=60)
    assert caught.value.method in ("weights", "load")  # type: ignore[attr-defined]
    with pytest.raises(GroupBrokenError):
        reader.load(before[0])

    def relay_died() -> bool:
        try:
            return bool(ray.get(relay.__ray_call__.remote(lambda _: False)))
        except ray.exceptions.ActorDiedError:
            return True

    assert eventually(relay_died), "it outlives the makers"
    if end == "restart":
        assert reader.load(in_buckets(short_lived)[0]) == [expected(0)] * 2


@pytest.mark.slow
def test_a_role_that_takes_turns_has_the_device_when_its_pairs_are_made(reader: Any) -> None:
    with (
        RayResourcePool([1], cpus_per_process=0.1) as pool,
        colocate(pool, one=InTurns, two=InTurns) as roles,
    ):
        made = roles.one.looks()
        assert roles.two.look() == [True]
        assert reader.load(made[0]) == [[("there", 1.0, 1)]] * 2


@pytest.mark.slow
def test_a_relay_ends_with_a_group_that_is_dropped(reader: Any) -> None:
    with RayResourcePool([1], cpus_per_process=0.1) as pool:
        group: Any = RayWorkerGroup(pool, RayClassWithInitArgs(Streams))
        assert reader.load(in_buckets(group)[0]) == [expected(0)] * 2
        actor = group._hosts.now.relay()._actor_id.hex()
        del group
        gc.collect()
        assert eventually(lambda: dead([actor]) != set())
