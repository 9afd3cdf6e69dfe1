"""The result of a call without blocking stays in its process until someone else asks for it."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import ray

from protocol import DataProtoFuture, MissingKeyError
from protocol.future import origins
from single_controller import (
    CallTimeoutError,
    GroupBrokenError,
    Handle,
    SharedMemoryWriteError,
    WorkerError,
)
from single_controller.ray import (
    Colocated,
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    pin,
    remote_batch,
)
from single_controller.ray.remote_batch import RemoteCall
from tests.data_plane.stage import Stage, batch, moved, xs
from tests.waiting import eventually, once_taken


def test_a_pipeline_over_roles_of_one_host_moves_no_byte(both: Colocated) -> None:
    made = both.one.step(batch(6))
    before = moved(both.one, both.two)
    last = both.two.step(both.one.step(both.two.step(made)))
    assert sum(both.one.total(last)) == sum(16 * x + 15 for x in range(6))
    assert moved(both.one, both.two) == before
    assert xs(last.get()) == [16 * x + 15 for x in range(6)]
    assert eventually(lambda: both.two.stats()["step"].bytes_between > 0)
    assert both.two.stats()["step"].bytes_in > 0


def test_a_role_that_reads_only_gets_what_another_made_and_others_a_copy(both: Colocated) -> None:
    made = both.one.step(batch(6))
    here = both.two.borrowed_addresses(made)
    assert both.one.borrowed_addresses(made) == here
    assert all(a != b for a, b in zip(both.two.addresses(made), here, strict=True))
    assert sum(both.two.spoil(made)) == sum(2 * x + 1 + 100 for x in range(6))
    whole = made.get()
    assert xs(whole) == [2 * x + 1 for x in range(6)]
    assert [array.tolist() for array in whole.non_tensor_batch["s"]] == [[i] * 3 for i in range(6)]
    both.one._hosts.now.read_elsewhere.clear()
    before = moved(both.one, both.two)
    made = both.one.step(pin(batch(6)))
    assert len(both.two.borrowed_addresses(made)) == 2
    assert moved(both.one, both.two) == before


def test_a_call_that_is_waited_for_has_only_what_it_reads_elsewhere_published(
    both: Colocated, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, sent = RemoteCall._publication, []

    def noted(call: RemoteCall, what: Any, *how: Any) -> Any:
        sent.append(what)
        return send(call, what, *how)

    monkeypatch.setattr(RemoteCall, "_publication", noted)
    assert sum(both.two.total(both.one.step(batch(6)))) == 36
    assert sent == []
    assert sum(both.two.total(both.one.thin(batch(5)))) == 0 + 1 + 2 + 3
    assert sent == [(0, None, False)]  # rank 0 made three rows of the four, rank 1 reads two


def test_a_call_that_waits_for_what_it_reads_is_given_up_after_its_time(both: Colocated) -> None:
    with pytest.raises(CallTimeoutError):
        both.two.total.options(timeout_s=0.2)(both.one.step(both.one.slow(batch(2))))
    assert sum(once_taken(lambda: both.two.total(both.one.step(batch(2))))) == 1 + 3


def test_what_others_have_read_once_comes_to_them_before_later_calls(
    roles: Colocated, three: RayWorkerGroup, gate: Path
) -> None:
    roles.one._hosts.now.read_elsewhere.clear()
    made = roles.one.step(batch(2))
    assert xs(made.select("x").get()) == [1, 3]
    assert sum(three.total(made)) == 1 + 3
    made = roles.one.step(batch(4))
    busy = roles.one.hold.submit(gate)
    assert sum(three.total.options(timeout_s=10)(made)) == 1 + 3 + 5 + 7
    assert xs(made.get(timeout=10)) == [1, 3, 5, 7]
    assert xs(made.select("x").get(timeout=10)) == [1, 3, 5, 7]
    assert not busy.done()
    gate.touch()
    busy.result()


def test_on_a_loop_a_call_has_ended_before_the_next_one_begins(
    async_roles: Colocated, gate: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").touch()
    first = async_roles.one.hold.submit(tmp_path / "there")
    second = async_roles.one.hold.submit(gate)
    first.result(timeout=10)
    assert not second.done()
    gate.touch()
    second.result()


def test_what_nobody_read_elsewhere_is_not_sent_any_more(both: Colocated) -> None:
    assert xs(both.one.step(batch(2)).get()) == [1, 3]
    read = both.one._hosts.now.read_elsewhere
    assert [len(what) for what in read.values()] == [2]
    assert sum(both.two.total(both.one.step(batch(2)))) == 1 + 3
    gc.collect()
    assert eventually(lambda: not any(read.values()))
    before = moved(both.one)
    assert sum(both.two.total(both.one.step(pin(batch(2))))) == 1 + 3
    assert moved(both.one) == before


def test_rows_that_a_later_call_keeps_back_are_said_to_be(both: Colocated, gate: Path) -> None:
    made = both.one.step(batch(4))
    assert len(made) == 4
    busy = both.one.hold.submit(gate)
    late = r"one.step: rank \d has finished, and had not sent its rows after [\d.]+ s: a later call"
    with pytest.raises(CallTimeoutError, match=late) as caught:
        made.get(timeout=0.3)
    (stack,) = caught.value.stacks.values()
    assert "in hold" in stack
    gate.touch()
    busy.result()
    assert xs(made.get()) == [1, 3, 5, 7]


def test_a_call_that_is_not_waited_for_has_its_deadline_too(both: Colocated) -> None:
    with pytest.raises(CallTimeoutError, match=r"had not finished after 0.2 s") as caught:
        both.one.slow.options(timeout_s=0.2)(batch(2)).get()
    assert "in slow" in caught.value.stacks[0]
    given_up = r"a call that was given up after 0.2 s \(one.slow\)\. Calls are taken again"
    with pytest.raises(GroupBrokenError, match=given_up):
        both.one.step(batch(2))
    assert once_taken(lambda: xs(both.one.step(batch(2)).get())) == [1, 3]


def test_what_was_made_in_time_can_be_read_after_the_deadline(both: Colocated) -> None:
    made = both.one.step.options(timeout_s=60)(batch(2))
    origin: Any
    (origin, _) = origins([made])
    assert eventually(origin.call.done)
    origin.call._deadline = 0
    assert xs(made.get()) == [1, 3]


def test_a_future_goes_from_group_to_group_past_the_driver(
    both: Colocated, three: RayWorkerGroup
) -> None:
    made = both.one.step(batch(6))
    published = both.one.stats()["step"].bytes_between
    before = [group.stats().driver_bytes for group in (both.one, three)]
    assert sum(three.total(three.step(made))) == sum(4 * x + 3 for x in range(6))
    assert [group.stats().driver_bytes for group in (both.one, three)] == before
    assert eventually(lambda: both.one.stats()["step"].bytes_between > published)


def test_a_result_is_let_go_of_when_the_driver_drops_it(both: Colocated) -> None:
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [0, 0])
    first = both.one.step(batch(4))
    second = both.two.step(first)
    part = second.chunk(2)[0]
    del first, second
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [1, 1])
    assert xs(part.get()) == [3, 7]
    del part
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [0, 0])
    for _ in range(20):
        both.two.step(both.one.double(batch(3)))  # dropped before it ran
        both.one.fail(batch(3))
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [0, 0])


def test_a_call_that_failed_holds_nothing_that_it_read(both: Colocated) -> None:
    gc.collect()
    assert eventually(lambda: both.one.results_kept() == [0, 0])
    gc.disable()  # what is in a cycle would be there until somebody collects it
    try:
        made = both.one.step(batch(4))
        with pytest.raises(KeyError, match="no such thing"):
            both.two.fail.submit(made).result()
        del made
        assert eventually(lambda: both.one.results_kept() == [0, 0])
    finally:
        gc.enable()


def test_a_failed_producer_is_the_cause_wherever_its_future_goes(
    both: Colocated, three: RayWorkerGroup
) -> None:
    failed = both.one.fail(batch(4))
    for read in (failed.get, lambda: both.two.total(failed), lambda: three.total(failed)):
        with pytest.raises(KeyError) as caught:
            read()
        assert isinstance(caught.value, WorkerError)
        assert caught.value.method == "fail"


def test_a_future_inside_another_value_or_process_finds_its_rows(
    both: Colocated, three: RayWorkerGroup
) -> None:
    made = both.one.step(batch(4))
    (pair, *_) = three.give([made, {"again": made.select("x")}])
    assert xs(pair[0]) == xs(pair[1]["again"]) == [1, 3, 5, 7]
    ((again, [inside]), *_) = both.two.give([made, [made]])
    assert xs(again) == xs(inside) == [1, 3, 5, 7]
    both.two.keep(made)
    three.keep(made)
    rest = ray.remote(lambda future: future.get().batch["x"].sum().item())
    elsewhere = rest.remote(made)
    del made
    gc.collect()
    assert ray.get(elsewhere) == 16
    assert sum(both.two.kept_sum()) == sum(three.kept_sum()) == 16


def test_a_worker_that_changes_what_it_returned_is_found_out(roles: Colocated) -> None:
    made = roles.one.hand_out_buffer(batch(4))
    assert sum(roles.two.total(made)) == 0
    roles.one.write_buffer()
    with pytest.raises(
        SharedMemoryWriteError, match=r"one.hand_out_buffer returned tensors.*clone"
    ):
        roles.two.total(made)
    with pytest.raises(SharedMemoryWriteError):
        made.get()


def test_results_end_with_their_group(three: RayWorkerGroup, cluster: None) -> None:
    with (
        RayResourcePool([1], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Stage)) as group,
    ):
        made, [value], late = group.step(batch(2)), group.state(), group.slow(batch(2))
        [small] = group.text(3)  # which is here
        assert len(made) == 2
        assert eventually(lambda: value.done() and small.done())
    for one, way in itertools.product((value, small), (Handle.get, three.own, three.give)):
        gone = r"what Stage.\w+ returned is gone with its workers: the group is closed. Fetch what"
        with pytest.raises(GroupBrokenError, match=gone):
            way(one)
    with pytest.raises(GroupBrokenError, match=gone):
        made.get()
    with pytest.raises(GroupBrokenError, match="the group is closed"):
        late.get()


def test_only_the_columns_that_are_selected_move(both: Colocated, three: RayWorkerGroup) -> None:
    made = both.one.widen(batch(6))
    before = moved(both.one, both.two, three)
    assert xs(made.select(["x"]).get()) == list(range(6))
    assert sum(three.total(made.select("x"))) == sum(both.two.total(made.select("x"))) == 15
    assert xs(made.union(made).select("x").get()) == list(range(6))
    chained = both.two.step(both.one.widen(batch(6)).select(["x", "s"]))
    assert sum(three.total(chained.select("x"))) == sum(2 * x + 1 for x in range(6))
    spread = DataProtoFuture.concat([made, both.one.thin(batch(5))])
    assert sum(both.two.total(spread.chunk(2)[0].select("x"))) == 0 + 1 + 2 + 3 + 4
    assert moved(both.one, both.two, three) - before < 100_000
    missing = r"no \['nope'\] in batch, which has the keys \['x', 'hidden', 's'\]"
    for read in (DataProtoFuture.get, both.two.total, three.total):
        with pytest.raises(MissingKeyError, match=missing):
            read(both.one.widen(batch(6)).select("nope"))


def test_a_rank_is_told_only_of_what_it_reads_though_no_rows_are_known(
    both: Colocated, three: RayWorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, parts = remote_batch.sealed, []
    monkeypatch.setattr(remote_batch, "sealed", lambda *a: parts.append(a[2]) or seal(*a))
    slow = three.slow(batch(6))
    last = three.step(three.step(slow))
    wide = both.one.step(both.one.step(both.two.slow(batch(6))))
    parts.clear()
    both.one.step(last), three.step(wide)
    found = [ray.get(part).read() for [part] in parts]
    assert [len(list(origins(futures))) for futures in found] == [2, 2, 1, 2, 1]
    assert [len(future) for [future] in found] == [3, 3, 2, 2, 2]
