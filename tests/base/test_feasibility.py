"""Whether nodes can hold a pool, and what is said where they cannot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from single_controller.ray.placement import NodeResources, PoolRequest

ONE_CPU = {"CPU": 1.0}
CPU_GPU = {"CPU": 1.0, "GPU": 1.0}
PACK, STRICT = "PACK", "STRICT_PACK"


def nodes(*resources: dict[str, float]) -> list[NodeResources]:
    return [NodeResources(f"10.0.0.{i}", each, each) for i, each in enumerate(resources)]


def cpus(*counts: float) -> list[NodeResources]:
    return nodes(*({"CPU": count} for count in counts))


@pytest.mark.parametrize(
    ("counts", "bundle", "strategy", "have", "fits"),
    [
        ([2], ONE_CPU, STRICT, cpus(2), True),
        ([2, 4], ONE_CPU, STRICT, cpus(3, 3), False),
        ([2, 4], ONE_CPU, PACK, cpus(3, 3), True),
        ([2, 4], ONE_CPU, PACK, cpus(3, 2), False),
        ([4, 3, 3, 2], ONE_CPU, STRICT, cpus(7, 5), True),
        ([4, 4, 4], ONE_CPU, STRICT, cpus(6, 6), False),
        ([2], CPU_GPU, STRICT, nodes({"CPU": 8, "GPU": 1}), False),
        ([2], CPU_GPU, PACK, nodes({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}), True),
        ([2], CPU_GPU, PACK, nodes({"CPU": 2}, {"GPU": 2}), False),
        ([10], {"CPU": 0.1}, STRICT, cpus(1), True),
        ([3], {"CPU": 1 / 3}, STRICT, cpus(1), True),
        ([2], {"CPU": 1.0, "accelerator_type:H100": 1e-4}, STRICT, cpus(8), False),
    ],
)
def test_a_pool_fits_where_its_strategy_finds_room(
    counts: list[int],
    bundle: dict[str, float],
    strategy: str,
    have: list[NodeResources],
    fits: bool,
) -> None:
    assert PoolRequest(tuple(counts), bundle, strategy).fits(have) is fits


def test_what_is_said_has_what_is_asked_and_what_each_node_has_and_has_free() -> None:
    busy = [
        NodeResources("10.0.0.1", {"CPU": 4, "GPU": 1}, {"CPU": 3, "GPU": 0}),
        NodeResources("10.0.0.2", {"CPU": 2}, {"CPU": 2}),
    ]
    assert PoolRequest((2, 4), CPU_GPU).explain(busy).splitlines() == [
        "process_on_nodes=[2, 4] under STRICT_PACK asks for 6 × {CPU: 1, GPU: 1}",
        "  node 10.0.0.1 holds 1 processes, 0 now: 3 of 4 CPU, 0 of 1 GPU free",
        "  node 10.0.0.2 holds 0 processes, 0 now: 2 of 2 CPU, 0 of 0 GPU free",
    ]
    assert PoolRequest((1,), CPU_GPU).fits(busy), "what others hold now may be free later"


def packs(counts: Sequence[int], room: Sequence[int]) -> bool:
    """By trying all assignments."""
    for where in itertools.product(range(len(room)), repeat=len(counts)):
        left = list(room)
        for count, node in zip(counts, where, strict=True):
            left[node] -= count
        if min(left) >= 0:
            return True
    return False


@settings(deadline=None, max_examples=100)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    room=st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_what_could_be_packed_is_never_refused(counts: list[int], room: list[int]) -> None:
    if packs(counts, room):
        assert PoolRequest(tuple(counts), ONE_CPU).fits(cpus(*room))
