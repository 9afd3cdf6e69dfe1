"""Device memory that one process lends and another maps: many tensors, the same at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch

from protocol import BatchError
from protocol.device_memory import settle
from tests.gpu import lending
from tests.gpu.lending import COUNT, Lender, differing, read
from tests.waiting import eventually

ANCHOR = 512  # bytes: what a lender keeps allocated for good
MIB = 1 << 20
SETTING = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture(
    scope="module",
    params=[(0, ""), (0, "expandable_segments:True"), (1, ""), (1, "expandable_segments:True")],
    ids=["same card", "same card, expandable", "other card", "other card, expandable"],
)
def lender(request: pytest.FixtureRequest) -> Iterator[Lender]:
    card, allocator = request.param
    if torch.cuda.device_count() <= card:
        pytest.skip(f"needs {card + 1} CUDA devices; this machine has {torch.cuda.device_count()}")
    with pytest.MonkeyPatch.context() as patched:
        if allocator:
            patched.setenv(SETTING, allocator)
        made = Lender(card)
    yield made
    made.close()
    settle()


@pytest.fixture
def other() -> Iterator[Lender]:
    """One that a test may end."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    made = Lender(0)
    yield made
    made.close()
    settle()


@pytest.mark.parametrize("how", ["own", "view"])
def test_many_tensors_of_all_kinds_arrive_as_they_are(lender: Lender, how: str) -> None:
    lender(lending.fill, 1)
    sent = lender(lending.lend)
    assert len(sent) < 200 * COUNT
    found = read(sent, "own" if how == "own" else "view")
    assert differing(found, 1) == []
    steps = {name: x.stride() for name, x in lending.expected(1).items()}
    assert how == "own" or {name: x.stride() for name, x in found.items()} == steps
    settle()


def test_the_same_memory_shows_each_steps_values_and_is_mapped_no_more(lender: Lender) -> None:
    for step in range(4):
        lender(lending.fill, step)
        sent = lender(lending.lend)
        map_one = torch.UntypedStorage._new_shared_cuda
        with patch.object(torch.UntypedStorage, "_new_shared_cuda", wraps=map_one) as mapping:
            found = read(sent, "view")
            assert differing(found, step) == []
            assert step < 2 or mapping.call_count == 0
        del found
        settle()


def test_a_copy_is_the_readers_own(lender: Lender) -> None:
    lender(lending.fill, 5)
    found = read(lender(lending.lend), "own")
    for name in ("0", "the same"):
        found[name] += 1
    settle()
    lender(lending.fill, 6)
    assert torch.equal(found["the same"].cpu(), lending.expected(5)["the same"] + 1)
    assert torch.equal(found["part of it"].cpu(), lending.expected(5)["part of it"])
    assert differing(read(lender(lending.lend), "own"), 6) == []
    settle()


@pytest.mark.parametrize("change", [lending.make, lending.resize])
def test_memory_that_was_freed_and_is_other_memory_now_is_read_as_it_is(
    lender: Lender, change: Callable[[int], None]
) -> None:
    lender(lending.fill, 0)
    for step in range(1, 7):
        if step % 2:  # at other times the same is lent twice, and so stays mapped
            lender(change, step)
        else:
            lender(lending.fill, step)
        found = read(lender(lending.lend), "view")
        assert differing(found, step) == []
        del found
        settle()


def test_what_was_made_to_be_lent_is_there_until_it_has_been_read(lender: Lender) -> None:
    found = read(lender(lending.lend_part_of_ragged), "own")["part"]
    settle()
    assert found.values().tolist() == [10.0 * i + j for i in range(1000) for j in (1, 2)]


def test_memory_is_free_again_once_the_lender_lets_go_whoever_has_it_mapped(lender: Lender) -> None:
    lender(lending.drop)
    before = lender(lending.allocated)
    for _ in range(3):
        assert int(read(lender(lending.lend_big, 64), "view")["big"].sum()) == 64 * MIB
        settle()
    assert lender(lending.allocated) >= before + 64 * MIB
    lender(lending.drop)
    assert lender(lending.allocated) <= before + ANCHOR


def test_who_settles_has_read_what_it_borrowed_and_else_waits_for_nothing(lender: Lender) -> None:
    big = read(lender(lending.lend_big, 1), "view")["big"]
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(1_000_000_000)
    total = big.sum()
    assert not stream.query()
    settle()
    assert stream.query()
    del big, total
    settle()
    torch.cuda._sleep(1_000_000_000)
    settle()
    assert not stream.query()
    stream.synchronize()


def test_a_call_that_goes_on_is_waited_for_when_another_has_settled(other: Lender) -> None:
    big = read(other(lending.lend_big, 1), "view")["big"]
    settle()  # of a call beside this one
    torch.cuda._sleep(1_000_000_000)
    big.sum()
    settle()
    assert torch.cuda.current_stream().query()


def test_memory_of_a_lender_that_was_killed_is_an_error_and_others_are_read(other: Lender) -> None:
    sent = other(lending.lend_big, 64)
    pid = other.process.pid
    other.close()
    with pytest.raises(BatchError, match=rf"process {pid} cannot be mapped.*gone"):
        read(sent, "own")
    another = Lender(0)
    assert int(read(another(lending.lend_big, 1), "own")["big"].sum()) == MIB
    another.close()
    settle()


def test_the_card_has_its_memory_back_when_a_lender_has_ended(other: Lender) -> None:
    free = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        assert int(read(other(lending.lend_big, 2048), "view")["big"][-1]) == 1
        settle()
    assert torch.cuda.mem_get_info()[0] < free - 1024 * MIB
    other.close()
    assert eventually(lambda: torch.cuda.mem_get_info()[0] > free - 1024 * MIB)
