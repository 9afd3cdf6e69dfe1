"""What only a group in the driver's own process does: debuggers, private copies, environments."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol import DataProto
from single_controller import (
    CallTimeoutError,
    ClassWithInitArgs,
    PerRank,
    RegistrationError,
    ResourceError,
    ResourcePool,
    WorkerError,
)
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import InlineReference, InlineWorkerGroup, colocate

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

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fail(self) -> None:
        local = "seen in a debugger"
        raise LookupError(local)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def env(self, key: str) -> str | None:
        return os.environ.get(key)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def setenv(self, key: str, value: str) -> None:
        os.environ[key] = value

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def thread(self) -> int:
        return threading.get_ident()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def later(self, x: Any) -> Any:
        return x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def rows(self, data: DataProto) -> DataProto:
        self.seen.append(data)
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def call(self, function: Any) -> Any:
        return function(self)


class Sleeper(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def nap(self, seconds: float) -> tuple[int, str]:
        await asyncio.sleep(seconds)
        return self.rank, os.environ["RANK"]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def ask(self, group: Any) -> Any:
        return group.nap(0)


@pytest.fixture
def group() -> Any:
    with InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(Notebook)) as two:
        yield two


@pytest.fixture
def sleepers() -> Any:
    with InlineWorkerGroup(ResourcePool([2]), ClassWithInitArgs(Sleeper)) as two:
        yield two


def test_what_a_rank_gets_and_returns_is_nobody_elses(group: Any) -> None:
    given = [torch.zeros(2), {"k": [1]}]
    first, second = group.keep(given)
    given[0] += 1
    first[0][1]["k"].append(2)
    assert [seen[0][0].tolist() for seen in group.keep(None)] == [[0, 0], [0, 0]]
    assert second[0][1] == {"k": [1]}
    assert group.workers[0].seen[0] is not group.workers[1].seen[0]


def test_a_batch_that_is_still_with_its_ranks_is_as_it_was_when_they_returned_it(
    group: Any,
) -> None:
    future = group.rows(DataProto.from_dict({"a": torch.zeros(4)}))
    for worker in group.workers:
        worker.seen[0].batch["a"] += 5
    first = future.get()
    first.batch["a"] += 7
    assert future.get().batch["a"].tolist() == [0] * 4


def test_the_cause_of_an_error_has_the_very_frames_of_the_worker(group: Any) -> None:
    with pytest.raises(LookupError) as caught:
        group.fail()
    cause = caught.value.__cause__
    assert isinstance(caught.value, WorkerError)
    assert isinstance(cause, LookupError)
    *_, (frame, _) = traceback.walk_tb(cause.__traceback__)
    assert frame.f_locals["local"] == "seen in a debugger"
    assert frame.f_locals["self"] is group.workers[0]
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), WorkerError)


def test_methods_run_in_the_thread_that_calls(group: Any) -> None:
    assert group.thread() == [threading.get_ident()] * 2


def run(program: str, *, stdin: str = "", **env: str) -> str:
    env.setdefault("PYTHONBREAKPOINT", "")  # ray.init() of the tests before has set it
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_breakpoint_in_a_workers_method_opens_the_debugger() -> None:
    shown = run(
        """
        from single_controller import Worker
        from single_controller.base.decorator import register
        from single_controller.inline import colocate

        class Actor(Worker):
            @register()
            def update(self, x):
                doubled = 2 * x
                breakpoint()
                return doubled

        print(colocate(actor=Actor).actor.update(21))
        """,
        stdin="p doubled, self.rank\n!doubled = 43\ncontinue\n",
    )
    assert "(42, 0)" in shown
    assert "[43]" in shown


def test_nothing_of_it_imports_ray_or_needs_torch_before_a_worker_does() -> None:
    program = """
        import sys
        from single_controller import Worker
        from single_controller.base.decorator import Dispatch, register
        from single_controller.inline import colocate

        class Actor(Worker):
            @register(dispatch_mode=Dispatch.ONE_TO_ALL)
            def total(self):
                import torch
                from torch import distributed as dist
                dist.init_process_group("gloo")
                total = torch.ones(1)
                dist.all_reduce(total)
                return total.item(), dist.get_world_size()

        with colocate(actor=Actor) as group:
            print([name for name in ("ray", "torch", "numpy") if name in sys.modules])
            print(group.actor.total())
            print(sys.modules["torch"].distributed.is_initialized(), "ray" in sys.modules)
        """
    assert run(program).splitlines() == ["[]", "[(1.0, 1)]", "False False"]


def test_each_rank_has_an_environment_of_its_own_and_the_driver_keeps_its(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIDE", "1")
    before = dict(os.environ)
    assert group.env("RANK") == ["0", "1"]
    group.setenv(PerRank(["OWN", "OUTSIDE"]), "2")
    assert group.env("OWN") == ["2", None]
    assert group.env("OUTSIDE") == ["1", "2"]
    monkeypatch.setenv("OUTSIDE", "3")
    assert group.env("OUTSIDE") == ["3", "2"]
    assert dict(os.environ) == {**before, "OUTSIDE": "3"}
    with InlineWorkerGroup(
        ResourcePool([1, 2]),
        ClassWithInitArgs(Notebook),
        name_prefix="p_",
        worker_env={"EXTRA": "1"},
    ) as three:
        assert three.env("EXTRA") == ["1"] * 3
        assert three.env("WG_PREFIX") == ["p_"] * 3
        assert three.env("WG_BACKEND") == ["inline"] * 3
        assert three.env("LOCAL_WORLD_SIZE") == ["1", "2", "2"]
        assert three.env("RAY_LOCAL_RANK") == ["0", "0", "1"]
        assert three.env("MASTER_PORT") == [three.master_port] * 3
        assert three.master_port != group.master_port
        with pytest.raises(ResourceError, match=f"master_port {three.master_port} cannot"):
            InlineWorkerGroup(None, ClassWithInitArgs(Notebook), master_port=int(three.master_port))
    with pytest.raises(ValueError, match="must not set RANK"):
        InlineWorkerGroup(None, ClassWithInitArgs(Notebook), worker_env={"RANK": "3"})


def test_a_group_inside_a_worker_leaves_the_outer_ranks_as_they_were(group: Any) -> None:
    def nested(worker: Worker) -> tuple[list[str], str]:
        with InlineWorkerGroup(ResourcePool([3]), ClassWithInitArgs(Notebook)) as inner:
            inner.env("RANK")
            return inner.env("RANK"), os.environ["RANK"]

    assert group.call(nested) == [(["0", "1", "2"], "0"), (["0", "1", "2"], "1")]
    assert "RANK" not in os.environ


def test_a_reference_given_to_another_call_arrives_as_its_value(group: Any) -> None:
    references = group.later([1])
    assert all(isinstance(reference, InlineReference) for reference in references)
    assert [seen[-1] for seen in group.keep(references[0])] == [[1], [1]]
    assert references[0].result() is not references[0].result()


def test_async_methods_of_all_ranks_wait_side_by_side_each_as_its_rank(sleepers: Any) -> None:
    assert sleepers.nap(0.01) == [(0, "0"), (1, "1")]
    assert "RANK" not in os.environ

    async def driver() -> Any:
        blocking = sleepers.nap(0)
        awaited = await asyncio.gather(*(sleepers.nap.submit(0.01) for _ in range(3)))
        return blocking, awaited

    expected = [(0, "0"), (1, "1")]
    assert asyncio.run(driver()) == (expected, [expected] * 3)


def test_a_deadline_of_an_async_method_names_the_ranks_that_wait(sleepers: Any) -> None:
    future = sleepers.nap.submit(60)
    assert not future.done()
    assert not future.cancel()
    with pytest.raises(CallTimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(CallTimeoutError, match=r"nap: ranks \[0, 1\] of 2") as caught:
        sleepers.nap.options(timeout_s=0.01)(60)
    assert caught.value.pending_ranks == (0, 1)


def test_an_async_method_may_call_another_group_and_cannot_wait_for_its_own(
    sleepers: Any,
) -> None:
    with InlineWorkerGroup(None, ClassWithInitArgs(Sleeper)) as other:
        assert sleepers.ask(other) == [[(0, "0")], [(0, "0")]]
    with pytest.raises(RuntimeError, match="await the other worker's method itself"):
        sleepers.ask(sleepers)


def test_what_cannot_be_an_inline_group_is_refused() -> None:
    for wrong in (None, Notebook, 3):
        with pytest.raises(RegistrationError, match="ray_cls_with_init must say what to start"):
            InlineWorkerGroup(None, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none to attach to"):
        InlineWorkerGroup(worker_names=["a"])
    with pytest.raises(ValueError, match="at least one node"):
        InlineWorkerGroup(ResourcePool([]), ClassWithInitArgs(Notebook))


def test_without_a_pool_there_is_one_rank(group: Any) -> None:
    with colocate(first=Notebook, second=ClassWithInitArgs(Notebook)) as both:
        assert both.first.world_size == 1
        assert both.hosts.workers[0].keys() == {"first", "second"}
        assert both.second.workers == [both.hosts.workers[0]["second"]]
        assert len(both.describe().rows) == 2


def test_ranks_that_only_read_share_the_memory_of_what_they_get(group: Any) -> None:
    for given in ({"t": torch.zeros(3)}, {"t": torch.zeros(3), "o": Path("pickled")}):
        group.look(given)
        first, second = (worker.seen[-1]["t"].data_ptr() for worker in group.workers)
        assert first == second != given["t"].data_ptr()
