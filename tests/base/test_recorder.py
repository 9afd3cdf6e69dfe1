"""What is noted about calls adds up per method, and listeners see every span."""

from __future__ import annotations

import pickle
import threading

from single_controller.base.recorder import MethodStats, Recorder, Span


def test_counts_and_spans_of_a_method_add_up() -> None:
    recorder = Recorder()
    for size in (10, 20):
        record = recorder.call("update")
        record.count("bytes_out", size)
        with record.span("wait"):
            pass
    recorder.call("load")
    table = recorder.stats()
    assert [row.method for row in table] == ["update", "load"]
    assert (table["update"].calls, table["update"].bytes_out) == (2, 30)
    assert table["update"].wait_s > 0
    assert table["never called"] == MethodStats("never called")
    assert (table.driver_bytes, table.moved_bytes) == (30, 30)


def test_an_amount_that_is_known_later_counts_once() -> None:
    recorder, known = Recorder(), [None, 7]
    recorder.call("make").count_later("bytes_between", lambda: known.pop(0))
    assert recorder.stats()["make"].bytes_between == 0
    assert [recorder.stats()["make"].bytes_between for _ in range(2)] == [7, 7]
    assert recorder.stats().driver_bytes == 0
    assert recorder.stats().moved_bytes == 7


def test_a_listener_gets_each_span_with_its_name_and_time() -> None:
    recorder, seen = Recorder(), list[Span]()
    recorder.listen(seen.append)
    record = recorder.call("update")
    for name in ("dispatch", "wait", "a span of one's own"):
        with record.span(name):
            pass
    assert [(span.method, span.name) for span in seen] == [
        ("update", name) for name in ("dispatch", "wait", "a span of one's own")
    ]
    assert seen[0].start <= seen[1].start
    assert recorder.stats()["update"].dispatch_s == seen[0].seconds


def test_no_count_is_lost_between_threads() -> None:
    recorder = Recorder()

    def count() -> None:
        for _ in range(2_000):
            recorder.call("m").count("bytes_in", 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (recorder.stats()["m"].calls, recorder.stats()["m"].bytes_in) == (8_000, 8_000)


def test_it_prints_as_a_table_and_begins_anew_in_another_process() -> None:
    recorder = Recorder()
    recorder.call("update").count("bytes_out", 1_234_567)
    head, row = str(recorder.stats()).splitlines()
    assert head.split()[:3] == ["method", "calls", "bytes_out"]
    assert "1 234 567" in row
    assert list(pickle.loads(pickle.dumps(recorder)).stats()) == []
