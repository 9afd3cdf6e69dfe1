"""What a method yields arrives as an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from single_controller import PerRank, SendError, WorkerError
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from tests.conformance.conftest import Backend

Pairs = Iterator[tuple[str, torch.Tensor]]
ALL: dict[str, Any] = {"dispatch_mode": Dispatch.ONE_TO_ALL}


class Weights(Worker):
    @register(**ALL, blocking=False)
    def weights(self, count: int = 4, fail_at: int = -1) -> Pairs:
        for i in range(count):
            if i == fail_at:
                raise KeyError(f"no w{i}")
            yield f"w{i}", torch.full((3,), i + 10.0 * self.rank, requires_grad=True)

    @register(dispatch_mode=Dispatch.RANK_ZERO, blocking=False)
    def first_rank(self) -> Pairs:
        yield "w", torch.zeros(1)

    @register(**ALL, blocking=False, bucket_bytes=12)
    def returned(self) -> Any:
        return ((name, torch.ones(2)) for name in "ab")

    @register(**ALL, blocking=False)
    def no_tensor(self) -> Any:
        yield "w", 1

    @register(**ALL, blocking=False, bucket_bytes=12)
    def no_generator(self) -> Any:
        return [("w", torch.zeros(1))]

    @register(**ALL, blocking=False)
    def no_buckets(self) -> Any:
        return (i for i in range(3))

    @register(**ALL)
    def load(self, pairs: Pairs, most: int = 100) -> list[tuple[str, list[float]]]:
        found = []
        for name, tensor in pairs:
            assert not tensor.requires_grad
            tensor += 1
            found.append((name, tensor.tolist()))
            if len(found) == most:
                break
        return found

    @register(**ALL)
    def load_all(self, streams: dict[str, Any]) -> dict[str, int]:
        return {key: len([*pairs]) for key, pairs in streams.items()}


def values(rank: int, count: int = 4) -> list[tuple[str, list[float]]]:
    return [(f"w{i}", [i + 10.0 * rank + 1] * 3) for i in range(count)]


@pytest.fixture(scope="module")
def maker(backend: Backend) -> Iterator[Any]:
    with backend.group(backend.spec(Weights)) as group:
        yield group


@pytest.fixture(scope="module")
def other(backend: Backend) -> Iterator[Any]:
    with backend.group(backend.spec(Weights)) as group:
        yield group


@pytest.fixture(params=["maker", "other"])
def reader(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("size", [1, 24, 1 << 20])
def test_pairs_arrive_in_order_alone_by_rank_and_within_other_arguments(
    maker: Any, reader: Any, size: int
) -> None:
    weights = maker.weights.options(bucket_bytes=size)
    assert reader.load(weights()[1]) == [values(1)] * 2
    assert reader.load(PerRank(weights())) == [values(0), values(1)]
    made = weights(count=3)
    assert reader.load_all({"a": made[0], "b": made[1]}) == [{"a": 3, "b": 3}] * 2
    assert reader.load(weights(count=0)[0]) == [[]] * 2
    assert reader.load(weights()[0], most=2) == [values(0, 2)] * 2


def test_a_generator_that_is_returned_and_one_of_rank_0_are_read_too(
    maker: Any, reader: Any
) -> None:
    assert reader.load(maker.returned()[0]) == [[("a", [2.0] * 2), ("b", [2.0] * 2)]] * 2
    assert reader.load(maker.first_rank()) == [[("w", [1.0])]] * 2


@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_error_names_the_method_and_rank_that_yields(
    maker: Any, other: Any, fail_at: int
) -> None:
    with pytest.raises(WorkerError, match=f"no w{fail_at}") as caught:
        other.load(maker.weights(fail_at=fail_at)[0])
    assert (caught.value.method, caught.value.rank) == ("weights", 0)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("no_tensor", "must yield pairs of a name and a tensor; it yielded .*'w', .*int"),
        ("no_generator", "must yield pairs of a name and a tensor; it returned list"),
        ("no_buckets", "returned a generator, which cannot be sent.* bucket_bytes="),
    ],
)
def test_what_cannot_be_sent_in_buckets_is_refused(
    maker: Any, reader: Any, method: str, match: str
) -> None:
    with pytest.raises(TypeError, match=match):
        reader.load(getattr(maker, method)()[0])


@pytest.mark.parametrize("backend", ["ray"], indirect=True)
def test_pairs_are_read_once(maker: Any, reader: Any) -> None:
    handle = maker.weights()[0]
    assert reader.load(handle) == [values(0)] * 2
    with pytest.raises(SendError, match="passed on before, and can be read once"):
        reader.load(handle)


@pytest.mark.parametrize("backend", ["ray"], indirect=True)
def test_the_driver_cannot_read_pairs(maker: Any) -> None:
    with pytest.raises(TypeError, match="pass the handle to a method of a group"):
        maker.weights()[0].get()
