"""What a trace holds of a call, in every backend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from single_controller import trace
from tests.conformance.team import zeros
from tests.slices import processes, slices


@pytest.mark.parametrize(("role", "method"), [("actor", "add"), ("critic", "sub")])
def test_a_trace_has_each_part_of_a_call_and_the_users_spans_in_every_rank(
    roles: dict[str, Any], backend: Any, tmp_path: Path, role: str, method: str
) -> None:
    before = roles[role].stats()[method]
    with trace(tmp_path / "t.json") as recorded:
        getattr(roles[role], method)(zeros())
    roles[role].name()
    found, names = slices(recorded), processes(recorded)
    assert {*recorded.content["otherData"]["clocks_ahead_ms"].values()} == {0}, "of one machine"
    calls = [e for e in recorded.content["traceEvents"] if e.get("part") == "call"]
    assert [(e["pid"], e["name"]) for e in calls] == [(i, f"{role}.{method}") for i in range(3)]
    assert len({e["args"]["call"] for e in found + calls}) == 1
    at = {(e["part"], e["pid"]): (e["ts"], e["ts"] + e["dur"]) for e in found}
    order = ["queue", "deserialise", "run"] + ["serialise"] * (backend.name == "ray")
    for pid in (1, 2):
        assert f"+critic rank {pid - 1} on" in names[pid]
        steps = [at[part, pid] for part in order] + [at["collect", 0]]
        assert all(end <= start + 0.01 for (_, end), (start, _) in itertools.pairwise(steps))
        assert at["run", pid][0] <= at["user", pid][0]
        assert at["user", pid][1] <= at["run", pid][1] + 0.01
        assert at["dispatch", 0][0] <= at["queue", pid][0]
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
