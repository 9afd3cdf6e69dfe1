"""What one process notes, and the file that becomes of several processes' notes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from single_controller import span, trace
from single_controller.base import spans
from single_controller.base.spans import Event, Harvest
from single_controller.base.trace_file import ProcessTrace, chrome_events, write
from single_controller.timeline import Timeline, main


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    spans.harvest()


def event(name: str, category: str, start: int, end: int, call: int = 0, **details: Any) -> Event:
    return Event(name, category, start, end - start, 1, call, details or None)


def process(*events: Event, name: str = "driver", offset: int = 0) -> ProcessTrace:
    return ProcessTrace(name, Harvest(7, "clock", events, 0, {1: "main"}), offset)


def complete(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in found if e["ph"] == "X"]


def test_a_span_without_a_trace_notes_nothing_and_is_always_the_same() -> None:
    assert span("forward") is span("backward", tokens=3)
    assert spans.recording() is None


def test_a_full_buffer_keeps_the_newest_and_counts_the_others() -> None:
    spans.record(capacity=3)
    for i in range(5):
        with span(f"step {i}"):
            pass
    found = spans.harvest()
    assert [e.name for e in found.events] == ["step 2", "step 3", "step 4"]
    assert found.dropped == 2
    assert spans.recording() is None


def test_a_trace_of_the_driver_alone_is_a_file_with_its_spans(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with trace(path), span("load", rows=4):
        pass
    [load] = complete(json.loads(path.read_text())["traceEvents"])
    assert (load["name"], load["cat"], load["args"]) == ("load", "user", {"rows": 4})


def test_a_second_trace_a_capacity_and_a_folder_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with (
        trace(tmp_path / "one.json"),
        pytest.raises(ValueError, match=r"already, to .*one\.json"),
        trace(tmp_path / "two.json"),
    ):
        pass
    with pytest.raises(ValueError, match=r"capacity must be .*, at least 1; got 0"):
        trace(tmp_path / "x.json", capacity=0)
    with pytest.raises(FileNotFoundError, match=r"no/x\.json"), trace(tmp_path / "no" / "x.json"):
        pass
    assert spans.recording() is None


def test_a_body_that_raises_still_leaves_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(KeyError), trace(path), span("load"):
        raise KeyError
    assert [e["name"] for e in complete(json.loads(path.read_text())["traceEvents"])] == ["load"]


def test_all_events_are_on_the_drivers_clock() -> None:
    driver = process(event("a.f", "dispatch", 1_000_000, 1_002_000, call=1))
    # A host whose clock is 5 ms ahead: sent at 1_002_000 by the driver's, run 3 µs later.
    host = process(
        event("a.f", "queue", 1_002_000, 6_005_000, call=1),
        event("a.f", "run", 6_005_000, 6_009_000, call=1),
        name="rank 0",
        offset=5_000_000,
    )
    found = chrome_events([driver, host])
    times = {e["cat"]: (e["ts"], e["dur"]) for e in complete(found)}
    assert times == {"dispatch": (0, 2), "queue": (2, 3), "run": (5, 4)}
    arrows = {e["ph"]: (e["pid"], e["ts"]) for e in found if e["ph"] in "sf"}
    assert arrows == {"s": (0, 2), "f": (1, 5)}


def test_what_overlaps_in_a_thread_is_put_side_by_side_and_what_nests_is_not() -> None:
    crossing = event("b", "run", 10, 30)
    found = complete(
        chrome_events([process(event("a", "run", 0, 20), event("in a", "user", 5, 9), crossing)])
    )
    lanes = {e["name"]: e["tid"] for e in found}
    assert lanes["a"] == lanes["in a"] != lanes["b"]


def test_the_bytes_of_a_call_are_told_where_they_leave_and_come() -> None:
    found = chrome_events(
        [
            process(
                event("bytes_out", "bytes", 1, 1, call=1, bytes=300),
                event("bytes_out", "bytes", 1, 1, call=1, bytes=200),
                event("a.f", "dispatch", 0, 2, call=1),
                event("bytes_in", "bytes", 4, 4, call=1, bytes=70),
                event("a.f", "wait", 2, 5, call=1),
            )
        ]
    )
    args = {e["cat"]: e["args"] for e in complete(found)}
    assert args["dispatch"] == {"call": 1, "bytes_out": 500}
    assert args["wait"] == {"call": 1, "bytes_in": 70}


def a_file(path: Path) -> Path:
    driver = process(
        event("a.f", "dispatch", 0, 2_000_000, call=1),
        event("a.f", "wait", 2_000_000, 9_000_000, call=1),
    )
    hosts = [
        process(
            event("a.f", "run", 3_000_000, (4 + rank) * 1_000_000, call=1),
            event("serialise", "serialise", 5_000_000, 5_500_000, call=1),
            event("forward", "user", 3_000_000, 3_500_000, call=1),
            name=f"a rank {rank} on 10.0.0.1",
        )
        for rank in range(2)
    ]
    write(path, [driver, *hosts], ["a rank 2 on 10.0.0.1: it died"])
    return path


def test_the_summary_says_per_method_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(a_file(tmp_path / "trace.json"))]) == 0
    head, row, _, _, forward, missing = capsys.readouterr().out.splitlines()
    names = head.replace(" ms", "_ms").replace(" MB", "_MB").split()
    told = dict(zip(names, row.split(), strict=False))
    assert told["method"] == "a.f"
    assert (told["dispatch_ms"], told["run_ms"], told["serialise_ms"]) == ("2.00", "1.50", "0.50")
    assert row.endswith("a rank 1")
    assert forward.split() == ["forward", "2", "0.50", "1.00"]
    assert missing == "missing: a rank 2 on 10.0.0.1: it died"


def test_a_trace_is_drawn_and_what_is_no_trace_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "out.png"
    assert main([str(a_file(tmp_path / "trace.json")), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("[]")
    assert main([str(tmp_path / "other.json")]) == 1
    assert "other.json is no trace" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no spans to draw"):
        Timeline((), {}, ()).draw(png)


def test_the_colours_of_a_drawn_trace_tell_roles_apart() -> None:
    spans = [
        {"cat": "run", "name": f"{role}.{method}", "pid": 1, "tid": 1, "args": {"call": 1}}
        for role in ("actor", "critic", "ref")
        for method in ("f", "g")
    ]
    colours = Timeline(tuple(spans), {1: "actor+critic+ref rank 0"}, ())._colours()
    runs = {kind: colour for kind, colour in colours.items() if kind.startswith("run")}
    assert list(runs) == ["run actor", "run critic", "run ref"]
    assert len(set(colours.values())) == len(colours)


def test_threads_are_told_apart_by_name(tmp_path: Path) -> None:
    ready, done = threading.Event(), threading.Event()

    def load() -> None:
        with span("load"):
            ready.set()
        done.wait(30)

    with trace(tmp_path / "trace.json") as recorded:
        loader = threading.Thread(target=load, name="loader")
        loader.start()
        ready.wait(30)
    done.set()
    loader.join()
    events = recorded.content["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert [lanes[e["tid"]] for e in complete(events)] == ["loader"]


def test_an_opentelemetry_provider_gets_calls_with_their_parts_below_them(tmp_path: Path) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from single_controller.base import telemetry

    provider, exporter = sdk.TracerProvider(), memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    host = process(
        event("a.f", "run", 20, 70, call=1), event("forward", "user", 30, 40, call=1), name="rank 0"
    )
    telemetry.export([process(event("a.f", "dispatch", 10, 20, call=1)), host], provider)
    found = {s.name: s for s in exporter.get_finished_spans()}
    call = found["a.f"]
    assert call.end_time - call.start_time == 60
    for part in ("dispatch", "run", "forward"):
        assert found[part].parent.span_id == call.context.span_id
    assert found["forward"].attributes["process"] == "rank 0"
    with trace(tmp_path / "x.json", tracer_provider=provider), span("alone"):
        pass
    assert exporter.get_finished_spans()[-1].name == "alone"
