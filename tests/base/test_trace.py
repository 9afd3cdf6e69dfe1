"""What one process notes, the file that becomes of several processes' notes, and sums of calls."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from single_controller import span, trace
from single_controller.__main__ import main
from single_controller.base.trace import (
    CallMark,
    Event,
    MethodStats,
    Recorder,
    mark,
    note,
    now_ns,
    running,
)
from tests.slices import slices

MS = 1_000_000


class Hosts:
    """Other processes, which noted these events, and whose clocks are ahead."""

    def __init__(
        self, *noted: Sequence[Event], missing: tuple[str, ...] = (), ahead: int = 0
    ) -> None:
        self.noted, self.missing, self.ahead = noted, missing, ahead

    def harvest(self) -> tuple[dict[str, tuple[int, Sequence[Event]]], tuple[str, ...]]:
        told = now_ns() + self.ahead
        names = (f"a rank {i} on 10.0.0.1" for i in range(len(self.noted)))
        return {name: (told, e) for name, e in zip(names, self.noted, strict=True)}, self.missing


def recorded(path: Path, driver: list[Event], hosts: Hosts) -> trace:
    with trace(path) as made:
        for event in driver:
            note(event)
        mark(1, hosts)
    return made


def test_only_spans_within_a_trace_are_noted_also_where_its_body_raises(tmp_path: Path) -> None:
    assert span("forward") is span("backward", tokens=3)
    with pytest.raises(KeyError), span("before"), trace(tmp_path / "t.json") as made, span("load"):
        raise KeyError
    with span("after"):
        pass
    assert [e["name"] for e in slices(made)] == ["load"]


def test_a_process_keeps_its_newest_spans_and_the_file_says_whose_are_not_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("single_controller.base.trace._MOST", 3)
    with trace(tmp_path / "t.json") as made:
        for i in range(5):
            with span(f"step {i}", i=i, path=made.path):
                pass
    assert [(e["name"], e["part"], e["args"]) for e in slices(made)] == [
        (f"step {i}", "user", {"i": i, "path": str(made.path)}) for i in (2, 3, 4)
    ]
    [full] = made.content["otherData"]["full"]
    assert full.startswith("driver")


def test_a_second_trace_and_one_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with (
        trace(tmp_path / "one.json"),
        pytest.raises(ValueError, match=r"already, to .*one\.json"),
        trace(tmp_path / "two.json"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match=r"no/x\.json"), trace(tmp_path / "no" / "x.json"):
        pass
    assert span("forward") is span("backward")


def test_a_call_is_a_row_of_each_process_with_its_parts_and_the_users_spans_in_them(
    tmp_path: Path,
) -> None:
    driver = [Event("dispatch", "a.f", 10 * MS, 12 * MS, 1, {"bytes_out": 5})]
    rank = [
        Event("queue", "a.f", 12 * MS, 13 * MS, 1),
        Event("user", "forward", 13 * MS, 14 * MS, 1, {"rows": 4}),
        Event("run", "a.f", 13 * MS, 16 * MS, 1),
        Event("user", "load", 15 * MS, 18 * MS, 1),  # in another task
    ]
    made = recorded(tmp_path / "t.json", driver, Hosts(rank))
    found = [e for e in json.loads(made.path.read_text())["traceEvents"] if e["ph"] in "be"]
    assert [(e["pid"], e["ph"], e["name"], e["ts"] / 1_000) for e in found] == [
        (0, "b", "a.f", 0), (0, "b", "dispatch", 0), (0, "e", "dispatch", 2), (0, "e", "a.f", 2),
        (1, "b", "a.f", 2), (1, "b", "queue", 2), (1, "e", "queue", 3),
        (1, "b", "run", 3), (1, "b", "forward", 3), (1, "e", "forward", 4),
        (1, "b", "load", 5), (1, "e", "load", 8), (1, "e", "run", 6), (1, "e", "a.f", 8),
    ]  # fmt: skip
    alone = {e["name"] for e in found if e["id"] not in ("0.1", "1.1")}
    assert alone == {"load"}
    assert found[1]["args"] == {"bytes_out": 5, "call": 1}
    assert found[8]["args"] == {"rows": 4, "call": 1}


def test_spans_of_tasks_that_overlap_are_whole_and_of_the_call_that_runs_there(
    tmp_path: Path,
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        with span("first"):
            await begun.wait()
        ended.set()

    async def second() -> None:
        with span("second"):
            begun.set()
            await ended.wait()

    async def call() -> None:
        with running(CallMark(1, now_ns()), "a.f", (now_ns(), now_ns())):
            await asyncio.gather(first(), second())

    with trace(tmp_path / "t.json") as made, span("main"):
        asyncio.run(call())
    one, other, main = (e for e in slices(made, "user"))
    assert [e["name"] for e in (one, other, main)] == ["first", "second", "main"]
    assert (one["args"], other["args"], main["args"]) == ({"call": 1}, {"call": 1}, {})
    assert other["ts"] < one["ts"] + one["dur"] < other["ts"] + other["dur"]
    assert one["id"] != other["id"]


def called(sent: int, ahead: int, call: int = 1) -> list[Event]:
    """A call of 10 ms, as a process notes it whose clock is ahead."""
    own = sent + ahead
    return [
        Event("queue", "a.f", sent, own + MS, call),
        Event("run", "a.f", own + MS, own + 9 * MS, call),
        Event("user", "forward", own + 2 * MS, own + 3 * MS, call),
    ]


@pytest.mark.parametrize("ahead_s", [0, 3_600, -3_600])
def test_a_process_whose_clock_is_another_is_shown_by_the_drivers_and_the_file_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ahead_s: int
) -> None:
    ahead, sent = ahead_s * 1_000 * MS, now_ns()
    driver = [
        Event("dispatch", "a.f", sent - MS, sent, 1),
        Event("wait", "a.f", sent, sent + 10 * MS, 1),
        Event("collect", "a.f", sent + 10 * MS, sent + 12 * MS, 1),
    ]
    made = recorded(tmp_path / "t.json", driver, Hosts(called(sent, ahead), ahead=ahead))
    told = {e["part"]: (e["ts"] / 1_000, (e["ts"] + e["dur"]) / 1_000) for e in slices(made)}
    exact = {"dispatch": (0, 1), "wait": (1, 11), "collect": (11, 13)}
    assert {part: told[part] for part in exact} == exact
    assert told["queue"][0] == 1
    assert told["queue"][0] <= told["queue"][1] == pytest.approx(told["run"][0])
    assert told["run"] == pytest.approx((2, 10), abs=1.01)  # it was in the queue for 1 ms
    assert told["user"][0] - told["run"][0] == pytest.approx(1)
    clocks = {"a rank 0 on 10.0.0.1": pytest.approx(ahead_s * 1e3, abs=1.01 * bool(ahead_s))}
    assert made.content["otherData"]["clocks_ahead_ms"] == clocks
    assert main(["timeline", str(made.path)]) == 0
    told_so = "the clock of a rank 0 on 10.0.0.1 was" in capsys.readouterr().out.splitlines()[-1]
    assert told_so == bool(ahead_s)


def test_a_clock_that_is_set_during_a_trace_makes_no_time_negative(tmp_path: Path) -> None:
    sent = now_ns()
    noted = [*called(sent, 5_000 * MS), *called(sent + 20 * MS, -5_000 * MS, call=2)]
    made = recorded(tmp_path / "t.json", [], Hosts(noted))
    assert len(slices(made)) == 6
    assert all(e["dur"] >= 0 for e in slices(made))


def test_the_summary_says_per_method_where_the_time_went_and_what_is_no_trace_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = [
        Event("dispatch", "a.f", 0, 2 * MS, 1, {"bytes_out": 3_000_000}),
        Event("wait", "a.f", 2 * MS, 9 * MS, 1),
    ]
    ranks = [
        [
            Event("run", "a.f", 3 * MS, (4 + rank) * MS, 1),
            Event("serialise", "", 5 * MS, 5 * MS + MS // 2, 1),
            Event("user", "forward", 3 * MS, 3 * MS + MS // 2, 1),
        ]
        for rank in range(2)
    ]
    died = "a rank 2 on 10.0.0.1: it died"
    made = recorded(tmp_path / "trace.json", driver, Hosts(*ranks, missing=(died,)))
    assert main(["timeline", str(made.path)]) == 0
    head, row, _, _, forward, missing = capsys.readouterr().out.splitlines()
    names = head.replace(" ms", "_ms").replace(" MB", "_MB").split()
    told = dict(zip(names, row.split(), strict=False))
    assert (told["method"], told["out_MB"]) == ("a.f", "3.00")
    assert (told["dispatch_ms"], told["run_ms"], told["serialise_ms"]) == ("2.00", "1.50", "0.50")
    assert row.endswith("a rank 1")
    assert forward.split() == ["forward", "2", "0.50", "1.00"]
    assert missing == f"missing: {died}"
    (tmp_path / "other.json").write_text("[]")
    assert main(["timeline", str(tmp_path / "other.json")]) == 2
    assert "other.json is no trace" in capsys.readouterr().err


def test_counts_and_times_of_a_method_add_up_and_print_as_a_table() -> None:
    recorder = Recorder()
    for size in (10, 1_234_567):
        record = recorder.call("actor", "update")
        record.count("bytes_out", size)
        with record.span("wait"):
            pass
    recorder.call("actor", "load")
    table = recorder.stats()
    assert [row.method for row in table] == ["update", "load"]
    assert (table["update"].calls, table["update"].bytes_out) == (2, 1_234_577)
    assert table["update"].wait_s > 0
    assert table["never called"] == MethodStats("never called")
    assert (table.driver_bytes, table.moved_bytes) == (1_234_577, 1_234_577)
    head, row, _ = str(table).splitlines()
    assert head.split()[:3] == ["method", "calls", "bytes_out"]
    assert "1 234 577" in row


def test_a_trace_gets_each_part_of_a_call_with_the_bytes_that_went_in_it(tmp_path: Path) -> None:
    recorder = Recorder()
    untraced = recorder.call("actor", "update")
    with trace(tmp_path / "t.json") as recorded:
        record = recorder.call("actor", "update")
        with record.span("dispatch"), untraced.span("dispatch"):
            for size in (300, 200):
                record.count("bytes_out", size)
        with record.span("wait"):
            record.count("bytes_in", 70)
    dispatch, wait = slices(recorded)
    assert (dispatch["part"], wait["part"]) == ("dispatch", "wait")
    assert dispatch["args"] == {"call": record.number, "bytes_out": 500}
    assert wait["args"] == {"call": record.number, "bytes_in": 70}


def test_no_count_is_lost_between_threads_and_another_process_counts_anew() -> None:
    recorder = Recorder()

    def count() -> None:
        for _ in range(2_000):
            recorder.call("actor", "m").count("bytes_in", 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (recorder.stats()["m"].calls, recorder.stats()["m"].bytes_in) == (8_000, 8_000)
    assert list(pickle.loads(pickle.dumps(recorder)).stats()) == []
