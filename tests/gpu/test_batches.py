"""Batches on a device: to the driver, to roles of the same process, to other processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from protocol.device_memory import _CHUNK, _pinned, to_host
from single_controller import SharedMemoryWriteError
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
)
from tests.gpu.cards import ROWS, Consumer, Producer, check, rows
from tests.waiting import eventually

ANCHOR = 512  # bytes: what a lender keeps allocated for good


@pytest.fixture(scope="module")
def shared_card(gpus: int) -> Iterator[RayResourcePool]:
    """Two ranks on one card."""
    with RayResourcePool([2], cpus_per_process=0.5, gpus_per_process=0.5) as pool:
        yield pool


@pytest.fixture(scope="module")
def team(shared_card: RayResourcePool) -> Iterator[Any]:
    with colocate(shared_card, producer=Producer, consumer=Consumer) as both:
        yield both


@pytest.fixture(scope="module")
def reader(shared_card: RayResourcePool) -> Iterator[RayWorkerGroup]:
    """Consumers in processes of their own, on the same card."""
    with RayWorkerGroup(shared_card, RayClassWithInitArgs(Consumer)) as group:
        yield group


def test_what_a_call_returns_comes_to_the_cpu_and_a_future_where_it_is_told(team: Any) -> None:
    assert team.producer.to_driver(rows()).batch["x"].device.type == "cpu"
    future = team.producer.by_device(rows())
    assert future.get().batch["x"].device.type == "cpu"
    assert future.get(map_location="cuda").batch["x"].device.type == "cuda"


def test_by_host_a_batch_reaches_other_processes_on_the_cpu(team: Any, reader: Any) -> None:
    check(reader.look(team.producer.by_host(rows())), "cpu")


def test_by_device_it_reaches_them_on_their_own_device(team: Any, reader: Any) -> None:
    future = team.producer.by_device(rows())
    check(reader.look(future), "cuda")
    check(reader.look(future), "cuda")  # what the first wrote is not there
    assert team.producer.stats()["by_device"].bytes_between < 20_000


@pytest.mark.parametrize(
    ("allocator", "device"),
    [("expandable_segments:True", "cuda"), ("backend:cudaMallocAsync", "cpu")],
)
def test_what_another_allocator_made_arrives_too(
    shared_card: RayResourcePool, reader: Any, allocator: str, device: str
) -> None:
    env = {"PYTORCH_CUDA_ALLOC_CONF": allocator}
    with RayWorkerGroup(shared_card, RayClassWithInitArgs(Producer), worker_env=env) as producer:
        check(reader.look(producer.by_device(rows())), device)
        assert [x for x, _ in reader.sum(producer.big(rows(4)))] == [1.0, 5.0]


def test_each_consumer_gets_its_rows_of_several_producers(team: Any, reader: Any) -> None:
    future = team.producer.by_device(rows())
    found = reader.look.options(ranks=[1])(future)
    check(found, "cuda")
    assert [len(one["x"]) for one in found] == [ROWS]
    check(reader.look(future.select(["x", "half", "wide", "turned", "jagged", "name"])), "cuda")


def test_a_tensordict_keeps_its_device_on_the_way(team: Any, reader: Any) -> None:
    found = reader.look(team.producer.tensordict(rows()))
    assert [(one["device"], one["x"]) for one in found] == [
        ("cuda", [0.0, 2.0, 4.0]),
        ("cuda", [6.0, 8.0, 10.0]),
    ]


def test_between_roles_of_one_process_a_reader_gets_the_very_memory(team: Any) -> None:
    team.producer._hosts.now.read_elsewhere.clear()  # the next call would publish what it makes
    before = team.producer.stats()["by_host"].bytes_between
    future = team.producer.by_host(rows())
    assert team.consumer.pointer(future) == team.consumer.pointer(future)
    (own, device), _ = team.consumer.own_pointer(future)
    assert device == "cuda"
    assert own != team.consumer.pointer(future)[0]
    assert team.producer.stats()["by_host"].bytes_between == before


def test_who_only_reads_gets_no_copy_of_lent_memory(team: Any, reader: Any) -> None:
    found = reader.sum_there(team.producer.big(rows(4)))
    assert [x for x, _ in found] == [1.0, 5.0]
    assert all(size < 64 << 20 for _, size in found)


def test_lent_memory_is_not_given_back_before_the_card_has_read_it(team: Any, reader: Any) -> None:
    before = sum(team.producer.allocated())
    reader.start_sum(team.producer.big(rows(4)))
    assert eventually(lambda: sum(team.producer.allocated()) <= before + ANCHOR)
    team.producer.write_over(2)
    assert reader.finished_sum() == [1.0, 5.0]


def test_lent_memory_is_back_when_the_future_is_dropped(team: Any, reader: Any) -> None:
    before = sum(team.producer.allocated())
    future = team.producer.big(rows(4))
    assert reader.sum(future) == [(1.0, "cuda"), (5.0, "cuda")]
    assert team.producer.stats()["big"].bytes_between < 20_000
    assert sum(team.producer.allocated()) >= before + 4 * (64 << 20)
    del future
    assert eventually(lambda: sum(team.producer.allocated()) <= before + ANCHOR)


def test_a_consumer_that_is_still_busy_keeps_what_it_was_lent(team: Any, reader: Any) -> None:
    before = sum(team.producer.allocated())
    pending = [reader.sum.submit(team.producer.big(part)) for part in rows(16).chunk(8)]
    found = [[value for value, _ in one.result()] for one in pending]
    assert found == [[2 * i, 2 * i + 1] for i in range(8)]
    assert eventually(lambda: sum(team.producer.allocated()) <= before + ANCHOR)


def test_a_write_into_what_another_process_is_reading_is_found_out(team: Any, reader: Any) -> None:
    busy = reader.start_sum.submit(team.producer.kept(rows(2)))
    wrong = r"write_kept has written into what producer\.kept returned, and another process"
    with pytest.raises(SharedMemoryWriteError, match=wrong):
        team.producer.write_kept()
    busy.result()
    assert team.producer.write_kept() == [None, None]


def test_weights_that_were_written_to_since_are_not_read(team: Any, reader: Any) -> None:
    before = reader.first(team.producer.weights()[0])[0]
    for step in range(3):  # from the second on, they are lent ahead
        handle, _ = team.producer.weights()
        assert reader.first(handle) == [before + step] * 2
        team.producer.write_kept()
        with pytest.raises(SharedMemoryWriteError, match=r"producer.weights returned"):
            reader.first(handle)
    handle, _ = team.producer.weights()
    team.producer.write_kept()
    with pytest.raises(SharedMemoryWriteError, match=r"producer.weights returned"):
        reader.first(handle)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (16 << 20) + 1, (96 << 20) + 5])
def test_bytes_leave_the_device_as_they_are(gpus: int, size: int) -> None:
    flat = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    assert torch.equal(to_host(flat), flat.cpu())
    assert size < _CHUNK or _pinned() is not None
