"""What only a group in the driver's own process does: debuggers, private copies, environments,
and programs for Ray that run so by the environment alone."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from protocol import DataProto
from single_controller import (
    CallTimeoutError,
    ClassWithInitArgs,
    GroupBrokenError,
    PerRank,
    RegistrationError,
    ResourcePool,
    WorkerError,
    trace,
)
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import InlineWorkerGroup, colocate
from single_controller.testing import InlineGroups
from tests.conformance.team import Actor, zeros
from tests.slices import slices
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]


class Notebook(Worker):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def keep(self, x: Any) -> Any:
        self.seen.append(x)
        return self.seen

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, reads_only=True)
    def look(self, x: Any) -> None:
        self.seen.append(x)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def later(self, x: Any) -> Any:
        return x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def rows(self, data: DataProto) -> DataProto:
        self.seen.append(data)
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def call(self, function: Any, *args: Any) -> Any:
        return function(*args)


ENDED: list[int] = []  # ranks whose task has


class Sleeper(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def nested(self, other: Any) -> tuple[str, str, Any]:
        found = other.whose(0.001)
        return os.environ["WHO"], os.environ["RANK"], found

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def whose(self, seconds: float) -> tuple[int, str, str]:
        await asyncio.sleep(seconds)
        return self.rank, os.environ["RANK"], os.environ["WHO"]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def nap(self, seconds: float) -> tuple[int, str]:
        await asyncio.sleep(seconds)
        return self.rank, os.environ["RANK"]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def ask(self, group: Any, awaits: bool = True) -> Any:
        return await group.nap.submit(0) if awaits else group.nap(0)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False, timeout_s=0.05)
    async def never(self) -> None:
        await asyncio.sleep(3600)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def serve(self) -> None:
        async def go_on() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ENDED.append(self.rank)

        self.serving = asyncio.create_task(go_on())
        await asyncio.sleep(0)


def started(cls: type[Worker], ranks: int = 2, **options: Any) -> Any:
    return InlineWorkerGroup(ResourcePool([ranks]), ClassWithInitArgs(cls), **options)


@pytest.fixture
def group() -> Iterator[Any]:
    with started(Notebook) as two:
        yield two


@pytest.fixture
def sleepers() -> Iterator[Any]:
    with started(Sleeper) as two:
        yield two


def test_what_a_rank_gets_and_returns_is_nobody_elses(group: Any) -> None:
    given = [torch.zeros(2), {"k": [1]}]
    first, second = group.keep(given)
    given[0] += 1
    first[0][1]["k"].append(2)
    assert [seen[0][0].tolist() for seen in group.keep(None)] == [[0, 0], [0, 0]]
    assert second[0][1] == {"k": [1]}
    assert group.workers[0].seen[0] is not group.workers[1].seen[0]
    handles = group.later([1])
    assert [seen[-1] for seen in group.keep(handles[0])] == [[1], [1]]
    assert handles[0].get() is not handles[0].get()


def test_a_batch_that_is_still_with_its_ranks_is_as_it_was_when_they_returned_it(
    group: Any,
) -> None:
    future = group.rows(DataProto.from_dict({"a": torch.zeros(4)}))
    for worker in group.workers:
        worker.seen[0].batch["a"] += 5
    first = future.get()
    first.batch["a"] += 7
    assert future.get().batch["a"].tolist() == [0] * 4


def test_ranks_that_only_read_share_the_memory_of_what_they_get(group: Any) -> None:
    for given in ({"t": torch.zeros(3)}, {"t": torch.zeros(3), "o": Path("pickled")}):
        group.look(given)
        first, second = (worker.seen[-1]["t"].data_ptr() for worker in group.workers)
        assert first == second != given["t"].data_ptr()


def fail() -> None:
    local = "seen in a debugger"
    raise LookupError(local)


def test_the_cause_of_an_error_has_the_very_frames_of_the_worker(group: Any) -> None:
    with pytest.raises(LookupError) as caught:
        group.call(fail)
    cause = caught.value.__cause__
    assert isinstance(caught.value, WorkerError)
    assert isinstance(cause, LookupError)
    *_, (outer, _), (inner, _) = traceback.walk_tb(cause.__traceback__)
    assert inner.f_locals["local"] == "seen in a debugger"
    assert outer.f_locals["self"] is group.workers[0]
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), WorkerError)

    class OfATestError(Exception):
        pass

    def fail_so() -> None:
        raise OfATestError("seen by its type")

    with pytest.raises(OfATestError, match="seen by its type"):
        group.call(fail_so)


def run(program: str, *, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    env.setdefault("PYTHONBREAKPOINT", "")  # ray.init() of the tests before has set it
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_breakpoint_in_a_workers_method_opens_the_debugger_in_the_thread_that_calls() -> None:
    shown = run(
        """
        import threading
        from single_controller import Worker
        from single_controller.base.decorator import register
        from single_controller.inline import colocate

        class Actor(Worker):
            @register()
            def update(self, x):
                assert threading.current_thread() is threading.main_thread()
                doubled = 2 * x
                breakpoint()
                return doubled

        print(colocate(actor=Actor).actor.update(21))
        """,
        stdin="p doubled, self.rank\n!doubled = 43\ncontinue\n",
    )
    assert "(42, 0)" in shown.stdout, shown.stderr
    assert "[43]" in shown.stdout


def test_nothing_of_it_imports_ray() -> None:
    program = """
        import sys
        from single_controller import Worker
        from single_controller.base.decorator import register
        from single_controller.inline import colocate

        class Actor(Worker):
            @register()
            def modules(self):
                return {"ray", "torch"} & set(sys.modules)

        print("torch" in sys.modules, colocate(actor=Actor).actor.modules())
        """
    done = run(program)
    assert done.stdout == "False [{'torch'}]\n", done.stderr


def test_each_rank_has_an_environment_of_its_own_and_the_driver_keeps_its(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def env(of: Any, key: str) -> list[str | None]:
        return of.call(os.getenv, key)  # type: ignore[no-any-return]

    def put(key: str, value: str) -> None:
        os.environ[key] = value

    monkeypatch.setenv("OUTSIDE", "1")
    before = dict(os.environ)
    assert env(group, "RANK") == ["0", "1"]
    group.call(put, PerRank(["OWN", "OUTSIDE"]), "2")
    assert env(group, "OWN") == ["2", None]
    assert env(group, "OUTSIDE") == ["1", "2"]
    monkeypatch.setenv("OUTSIDE", "3")
    assert env(group, "OUTSIDE") == ["3", "2"]
    assert dict(os.environ) == {**before, "OUTSIDE": "3"}
    with InlineWorkerGroup(
        ResourcePool([1, 2]),
        ClassWithInitArgs(Notebook),
        name_prefix="p_",
        worker_env={"EXTRA": "1"},
    ) as three:
        assert env(three, "EXTRA") == ["1"] * 3
        assert env(three, "WG_PREFIX") == ["p_"] * 3
        assert env(three, "WG_BACKEND") == ["inline"] * 3
        assert env(three, "LOCAL_WORLD_SIZE") == ["1", "2", "2"]
        assert env(three, "RAY_LOCAL_RANK") == ["0", "0", "1"]
        assert env(three, "MASTER_PORT") == [three.master_port] * 3

    def nested() -> tuple[list[str | None], str]:
        with started(Notebook, 3) as inner:
            return env(inner, "RANK"), os.environ["RANK"]

    assert group.call(nested) == [(["0", "1", "2"], "0"), (["0", "1", "2"], "1")]
    assert "RANK" not in os.environ


def test_async_methods_of_all_ranks_wait_side_by_side_each_as_its_rank(sleepers: Any) -> None:
    expected = [(0, "0"), (1, "1")]
    assert sleepers.nap(0.01) == expected
    assert "RANK" not in os.environ

    async def driver() -> Any:
        blocking = sleepers.nap(0)
        awaited = await asyncio.gather(*(sleepers.nap.submit(0.01) for _ in range(3)))
        return blocking, awaited

    assert asyncio.run(driver()) == (expected, [expected] * 3)


def test_threads_of_the_driver_may_call_groups_at_the_same_time() -> None:
    groups: dict[str, Any] = {
        who: InlineWorkerGroup(
            ResourcePool([2]), ClassWithInitArgs(Sleeper), worker_env={"WHO": who}
        )
        for who in "abc"
    }
    before, torchs = dict(os.environ), torch.distributed.distributed_c10d._world

    def call(who: str, other: str) -> list[Any]:
        return [groups[who].nested(groups[other]) for _ in range(20)]

    with ThreadPoolExecutor(3) as threads:
        calls = {pair: threads.submit(call, *pair) for pair in ("ab", "bc", "ca")}
        for (who, other), found in calls.items():
            expected = [(who, str(rank), [(0, "0", other), (1, "1", other)]) for rank in range(2)]
            assert found.result(timeout=60) == [expected] * 20
    assert dict(os.environ) == before
    assert torch.distributed.distributed_c10d._world is torchs


def test_what_an_async_method_leaves_running_ends_with_its_group_alone(sleepers: Any) -> None:
    ENDED.clear()
    with started(Sleeper, 1) as one:
        sleepers.serve()
        one.serve()
    assert eventually(lambda: ENDED == [0])
    sleepers.close()
    assert eventually(lambda: sorted(ENDED) == [0, 0, 1])


def test_a_handle_waits_as_long_as_its_call_may_take(sleepers: Any) -> None:
    with pytest.raises(CallTimeoutError, match=r"after 0\.05 s"):
        sleepers.never()[0].get()


def test_an_async_method_awaits_others_and_cannot_hold_up_the_loop_that_they_run_in(
    sleepers: Any,
) -> None:
    with started(Sleeper, 1) as other:
        assert sleepers.ask(other) == [[(0, "0")], [(0, "0")]]
        with pytest.raises(RuntimeError, match="await what `submit` returns"):
            sleepers.ask(other, awaits=False)


def test_a_trace_has_the_drivers_parts_and_the_spans_of_the_workers(
    inline_group: InlineGroups, tmp_path: Path
) -> None:
    actor = inline_group(Actor, ranks=2)
    with trace(tmp_path / "t.json") as recorded:
        actor.add(zeros())
    found = [e["name"] for e in slices(recorded, "dispatch", "user", "collect")]
    assert sorted(found) == ["collect", "dispatch", "inside", "inside"]


class Unbuilt(Worker):
    def __init__(self) -> None:
        raise KeyError("k")


def test_what_a_constructor_raised_is_the_cause_itself() -> None:
    with pytest.raises(WorkerError) as caught:
        started(Unbuilt)
    assert type(caught.value.__cause__) is KeyError


def test_without_a_pool_there_is_one_rank_and_what_cannot_be_a_group_is_refused() -> None:
    with colocate(first=Notebook, second=ClassWithInitArgs(Notebook)) as both:
        assert both.first.world_size == 1
        assert both.hosts.workers[0].keys() == {"first", "second"}
        assert both.second.workers == [both.hosts.workers[0]["second"]]
        assert both.first.call(threading.get_ident) == [threading.get_ident()]
    for wrong in (None, Notebook, 3):
        with pytest.raises(RegistrationError, match="ray_cls_with_init must say what to start"):
            InlineWorkerGroup(None, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot attach to running ones"):
        InlineWorkerGroup(None, ClassWithInitArgs(Notebook), worker_names=["a"])
    with pytest.raises(ValueError, match="at least one node"):
        InlineWorkerGroup(ResourcePool([]), ClassWithInitArgs(Notebook))


@pytest.mark.slow
def test_a_program_for_ray_runs_inline_without_an_edit_and_without_a_cluster(
    cluster: None,
) -> None:
    program = """
        import os
        import ray, torch
        from protocol import DataProto
        from single_controller.ray import (
            RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, ResourcePoolManager, colocate,
            create_colocated_worker_cls, pin,
        )
        from single_controller.base import Worker
        from single_controller.base.decorator import Dispatch, register

        class Actor(Worker):
            @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
            def add(self, data: DataProto) -> DataProto:
                data.batch["a"] += self.rank
                return data

            @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
            def pid(self, *args: int) -> tuple[int, ...]:
                return os.getpid(), *args

        manager = ResourcePoolManager({"all": [4]}, {"actor": "all"})
        manager.create_resource_pool()
        spec = RayClassWithInitArgs(ray.remote(Actor))
        classes = create_colocated_worker_cls({"actor": spec})
        hosts = RayWorkerGroup(manager.get_resource_pool("actor"), classes, bin_pack=True)
        actor = hosts.spawn(["actor"])["actor"]
        data = DataProto.from_dict({"a": torch.zeros(5)})
        print(actor.add(data).batch["a"].tolist())
        print(actor.add(pin(data)).batch["a"].tolist())
        with colocate(RayResourcePool([2]), call_timeout_s=60, actor=Actor) as group:
            print({handle.get() for handle in group.actor.pid()} == {(os.getpid(),)})
            print(ray.is_initialized())
            ray.init(address="ADDRESS", logging_level="ERROR", log_to_driver=False)
            print([found[1:] for found in ray.get(group.actor.pid(ray.put(1), 2))])
        """
    address = str(ray.get_runtime_context().gcs_address)
    done = run(program.replace("ADDRESS", address), SINGLE_CONTROLLER_BACKEND="inline")
    rows = "[0.0, 0.0, 1.0, 2.0, 3.0]"
    shown = [rows, rows, "True", "False", "[(1, 2), (1, 2)]"]
    assert [line for line in done.stdout.splitlines() if line in shown] == shown, done.stderr
    done = run("import single_controller.ray", SINGLE_CONTROLLER_BACKEND="inlin")
    assert "SINGLE_CONTROLLER_BACKEND must be ray or inline; got 'inlin'" in done.stderr


def test_the_fixture_makes_groups_and_closes_them(inline_group: InlineGroups) -> None:
    actor = inline_group(ClassWithInitArgs(Actor, scale=3), ranks=2)
    assert actor.add(zeros()).batch["a"].tolist() == [0] * 5 + [3] * 5
    assert actor.workers[1].scale == 3
    assert inline_group(Actor, [1, 2], name_prefix="p").world_size == 3
    inline_group.close()
    with pytest.raises(GroupBrokenError, match="the group is closed"):
        actor.name()


class Refilling(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def pieces(self) -> Any:
        buffer = torch.zeros(2)
        for i in range(3):
            yield str(i), buffer.fill_(i)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load(self, pieces: Any) -> list[float]:
        return [float(tensor[0]) for _, tensor in pieces]


def test_what_is_yielded_arrives_as_it_was_then() -> None:
    with InlineWorkerGroup(ResourcePool([1]), ClassWithInitArgs(Refilling)) as group:
        assert group.load(group.pieces()[0]) == [[0.0, 1.0, 2.0]]
