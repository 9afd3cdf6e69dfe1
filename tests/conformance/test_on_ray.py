"""What only Ray's groups do: what travels how, other processes, ranks that are late."""

from __future__ import annotations

import gc
import itertools
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from single_controller import CallTimeoutError, RegistrationError, trace
from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, create_colocated_worker_cls
from tests.conformance.probe import batch
from tests.conformance.team import Actor, zeros
from tests.slices import processes, slices
from tests.waiting import once_taken

pytestmark = pytest.mark.parametrize("backend", ["ray"], indirect=True)


def test_a_process_bears_the_name_of_the_method_that_it_runs(group: RayWorkerGroup) -> None:
    for given in ((), (1,)):
        titles = [title.split("\0")[0] for title in group.process_title(*given)]
        assert titles == [f"ray::{group.role}.process_title"] * 2


def test_what_several_ranks_get_leaves_once_and_what_nobody_collects_does_not_come(
    group: RayWorkerGroup,
) -> None:
    big, kilobytes = torch.zeros(10_000), 40
    for call, method, leave in (
        (lambda: group.echo(big, y=big), "echo", kilobytes),
        (lambda: group.echo({"nested": [big]}), "echo", kilobytes),
        (lambda: group.replicated(batch(10_000)), "replicated", kilobytes),
        (lambda: group.second(batch(10_000), batch(10_000)), "second", 2 * kilobytes),
    ):
        before = group.stats()[method]
        call()
        after = group.stats()[method]
        assert leave <= (after.bytes_out - before.bytes_out) / 1_000 < leave + 300
    # of 10,000 strings and numbers one rank's, where both hold them
    assert after.bytes_in - before.bytes_in < 1.5 * (after.bytes_out - before.bytes_out) / 2


def test_explain_says_what_a_call_would_do_and_does_nothing(group: RayWorkerGroup) -> None:
    before, big, ref = group.count(), torch.zeros(10_000), ray.put(1)
    told = group.explain("echo", big, y=ref)
    assert [(a.ranks, a.name, a.type) for a in told.arguments] == [
        ((0, 1), "x", "Tensor"),
        ((0, 1), "y", "ObjectRef"),
    ]
    assert told.arguments[0].bytes > 40_000
    told = group.explain("add_rank", batch(6))
    assert [(a.ranks, a.rows, a.keys) for a in told.arguments] == [
        ((rank,), 3, ("a", "s")) for rank in (0, 1)
    ]
    assert group.explain("scatter", lambda: 1).arguments[0].bytes
    assert group.count() == before


def test_references_inside_an_argument_that_is_stored_once_stay_valid(
    group: RayWorkerGroup,
) -> None:
    group.keep([ray.put(np.ones(300_000))])
    gc.collect()
    group.block(0.5)
    assert group.kept_sum() == [300_000.0] * 2


def test_a_deadline_names_the_ranks_that_missed_it_and_a_short_wait_gives_nothing_up(
    group: RayWorkerGroup,
) -> None:
    future = group.block.submit(0.5)
    with pytest.raises(CallTimeoutError):
        future.result(timeout=0.1)
    assert len(group.count()) == 2
    assert future.result() == [None, None]
    with pytest.raises(CallTimeoutError, match=r"block: ranks \[0, 1\] of 2") as caught:
        group.block.options(timeout_s=0.2)(1.5)
    assert caught.value.pending_ranks == (0, 1)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] are still in a call"):
        group.count()
    assert len(once_taken(group.count)) == 2


def test_a_cancelled_call_holds_up_no_later_one(roles: dict[str, RayWorkerGroup]) -> None:
    @ray.remote(num_cpus=0)
    def slow() -> str:
        return str(threading.Event().wait(1))

    roles["critic"].note(slow.remote())
    dropped = roles["critic"].note.submit("never")
    assert dropped.cancel()
    with pytest.raises(CancelledError, match=r"critic\.note"):
        dropped.result(timeout=30)
    assert "never" not in roles["critic"].notes()[0]


def test_a_group_may_be_called_from_another_process_too(roles: dict[str, RayWorkerGroup]) -> None:
    @ray.remote(num_cpus=0)
    def elsewhere(group: RayWorkerGroup) -> list[str]:
        return group.name()

    assert ray.get(elsewhere.remote(roles["critic"]), timeout=60) == ["critic"] * 2
    assert roles["critic"].name() == ["critic"] * 2


def test_roles_that_disagree_on_an_option_are_refused(backend: Any) -> None:
    first, second = RayClassWithInitArgs(cls=Actor), RayClassWithInitArgs(cls=Actor)
    first.update_options({"max_restarts": 1})
    second.update_options({"max_restarts": 2})
    with pytest.raises(RegistrationError, match="'max_restarts' is 1 and, for role 'b', 2"):
        create_colocated_worker_cls({"a": first, "b": second})


@pytest.mark.parametrize(("role", "method"), [("actor", "add"), ("critic", "sub")])
def test_a_trace_has_each_part_of_a_call_and_the_users_spans_in_every_rank(
    roles: dict[str, Any], tmp_path: Path, role: str, method: str
) -> None:
    before = roles[role].stats()[method]
    with trace(tmp_path / "t.json") as recorded:
        getattr(roles[role], method)(zeros())
    found, names = slices(recorded), processes(recorded)
    assert {*recorded.content["otherData"]["clocks_ahead_ms"].values()} == {0}, "of one machine"
    calls = [e for e in recorded.content["traceEvents"] if e.get("part") == "call"]
    assert [(e["pid"], e["name"]) for e in calls] == [(i, f"{role}.{method}") for i in range(3)]
    assert len({e["args"]["call"] for e in found + calls}) == 1
    at = {(e["part"], e["pid"]): (e["ts"], e["ts"] + e["dur"]) for e in found}
    for pid in (1, 2):
        assert f"+critic rank {pid - 1} on" in names[pid]
        order = [at["dispatch", 0][:1] * 2]
        order += [at[part, pid] for part in ("queue", "deserialise", "run", "serialise")]
        order.append(at["collect", 0])
        assert all(end <= start + 0.01 for (_, end), (start, _) in itertools.pairwise(order))
        assert at["run", pid][0] <= at["user", pid][0]
        assert at["user", pid][1] <= at["run", pid][1] + 0.01
    assert at["dispatch", 0][1] <= at["wait", 0][0] + 0.01
    assert at["wait", 0][1] <= at["collect", 0][0] + 0.01
    assert [e["args"]["rows"] for e in slices(recorded, "user")] == [5, 5]
    waited = sum(e["dur"] for e in slices(recorded, "wait")) / 1e6
    after = roles[role].stats()[method]
    assert after.calls == before.calls + 1
    assert after.wait_s - before.wait_s == pytest.approx(waited, abs=1e-3)


def test_a_run_that_raises_is_in_the_trace(roles: dict[str, Any], tmp_path: Path) -> None:
    with trace(tmp_path / "t.json") as recorded, pytest.raises(LookupError):
        roles["actor"].add(zeros(fails=True))
    assert len(slices(recorded, "run")) == 2
    assert slices(recorded, "user") == []
