"""What is noted about calls adds up per method, and a trace gets every span."""

from __future__ import annotations

import pickle
import threading
import weakref

from single_controller.base import spans
from single_controller.base.recorder import MethodStats, Recorder


def test_counts_and_spans_of_a_method_add_up() -> None:
    recorder = Recorder()
    for size in (10, 20):
        record = recorder.call("actor", "update")
        record.count("bytes_out", size)
        with record.span("wait"):
            pass
    recorder.call("actor", "load")
    table = recorder.stats()
    assert [row.method for row in table] == ["update", "load"]
    assert (table["update"].calls, table["update"].bytes_out) == (2, 30)
    assert table["update"].wait_s > 0
    assert table["never called"] == MethodStats("never called")
    assert (table.driver_bytes, table.moved_bytes) == (30, 30)


def test_an_amount_that_is_known_later_counts_once() -> None:
    recorder, known = Recorder(), [None, 7]
    recorder.call("actor", "make").count_later("bytes_between", lambda: known.pop(0))
    assert recorder.stats()["make"].bytes_between == 0
    assert [recorder.stats()["make"].bytes_between for _ in range(2)] == [7, 7]
    assert recorder.stats().driver_bytes == 0
    assert recorder.stats().moved_bytes == 7


class Known:
    """An amount, and the memory that it holds."""

    def __init__(self) -> None:
        self.ready, self.asked = False, 0

    def __call__(self) -> int | None:
        self.asked += 1
        return 1 if self.ready else None


def test_what_is_known_is_not_kept_until_somebody_reads_it() -> None:
    recorder = Recorder()
    kept: weakref.WeakSet[Known] = weakref.WeakSet()
    for _ in range(1_000):
        amount = Known()
        amount.ready = True
        kept.add(amount)
        recorder.call("actor", "make").count_later("bytes_between", amount)
        del amount
        assert len(kept) < 50
    assert recorder.stats()["make"].bytes_between == 1_000


def test_what_stays_unknown_is_not_asked_for_again_and_again() -> None:
    recorder, amounts = Recorder(), [Known() for _ in range(3_000)]
    for amount in amounts:
        recorder.call("actor", "make").count_later("bytes_between", amount)
    assert sum(amount.asked for amount in amounts) < 2 * len(amounts)
    for amount in amounts:
        amount.ready = True
    assert recorder.stats()["make"].bytes_between == 3_000


def test_a_trace_gets_each_span_and_count_of_a_call_under_its_number() -> None:
    recorder = Recorder()
    untraced = recorder.call("actor", "update")
    spans.record()
    record = recorder.call("actor", "update")
    for name in ("dispatch", "wait"):
        with record.span(name), untraced.span(name):
            pass
    record.count("bytes_out", 7)
    events = spans.harvest().events
    assert [(e.name, e.category, e.call) for e in events] == [
        ("actor.update", "dispatch", record.number),
        ("actor.update", "wait", record.number),
        ("bytes_out", "bytes", record.number),
    ]
    assert (untraced.number, record.number > 0) == (0, True)
    assert events[0].start_ns <= events[1].start_ns
    assert recorder.stats()["update"].dispatch_s >= events[0].duration_ns / 1e9


def test_no_count_is_lost_between_threads() -> None:
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


def test_it_prints_as_a_table_and_begins_anew_in_another_process() -> None:
    recorder = Recorder()
    recorder.call("actor", "update").count("bytes_out", 1_234_567)
    head, row = str(recorder.stats()).splitlines()
    assert head.split()[:3] == ["method", "calls", "bytes_out"]
    assert "1 234 567" in row
    assert list(pickle.loads(pickle.dumps(recorder)).stats()) == []
