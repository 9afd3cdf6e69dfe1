"""Whether nodes can hold a pool, and a change that really makes it fit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from single_controller.ray.placement import NodeResources, PoolRequest

ONE_CPU = {"CPU": 1.0}
CPU_GPU = {"CPU": 1.0, "GPU": 1.0}
PACK, STRICT, SPREAD = "PACK", "STRICT_PACK", "STRICT_SPREAD"


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
        ([2], ONE_CPU, SPREAD, cpus(1, 1), True),
        ([2, 2], ONE_CPU, SPREAD, cpus(8, 1), False),
        ([3], ONE_CPU, SPREAD, cpus(8, 8, 0), False),
        ([2], CPU_GPU, STRICT, nodes({"CPU": 8, "GPU": 1}), False),
        ([2], CPU_GPU, PACK, nodes({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}), True),
        ([2], CPU_GPU, PACK, nodes({"CPU": 2}, {"GPU": 2}), False),
        ([10], {"CPU": 0.1}, STRICT, cpus(1), True),
        ([3], {"CPU": 1 / 3}, STRICT, cpus(1), True),
        ([2], {"CPU": 0.0, "GPU": 1.0}, STRICT, nodes({"GPU": 2}), True),
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


def test_what_others_hold_now_does_not_matter_for_whether_it_can_ever_fit() -> None:
    busy = [NodeResources("10.0.0.1", {"CPU": 4}, {"CPU": 0})]
    request = PoolRequest((4,), ONE_CPU)
    assert request.fits(busy)
    assert "close what holds the resources, or raise placement_timeout_s" in request.explain(busy)


def test_the_explanation_has_asked_total_and_free_per_resource_and_per_node() -> None:
    have = [
        NodeResources("10.0.0.1", {"CPU": 4, "GPU": 1}, {"CPU": 3, "GPU": 0}),
        NodeResources("10.0.0.2", {"CPU": 2}, {"CPU": 2}),
    ]
    lines = PoolRequest((2, 4), CPU_GPU).explain(have).splitlines()
    assert "process_on_nodes=[2, 4] under STRICT_PACK asks for 6 × {CPU: 1, GPU: 1}" in lines[0]
    assert [line.split() for line in lines[1:4]] == [
        ["resource", "asked", "total", "free"],
        ["CPU", "6", "6", "5"],
        ["GPU", "6", "1", "0"],
    ]
    assert lines[4].split()[:6] == ["node", "10.0.0.1", "holds", "1", "processes,", "0"]
    assert lines[5].split()[:6] == ["node", "10.0.0.2", "holds", "0", "processes,", "0"]
    assert lines[6] == "What fits: process_on_nodes=[1], or more or larger nodes"


@pytest.mark.parametrize(
    ("counts", "bundle", "have", "offered"),
    [
        ([2], CPU_GPU, nodes({"CPU": 8}), "use_gpu=False, or nodes with GPUs"),
        ([2], {"CPU": 1, "disk": 1}, cpus(8), "nodes with 1 disk, or no disk in the pool"),
        (
            [2],
            {"CPU": 1, "accelerator_type:H100": 1e-4},
            nodes({"CPU": 8, "accelerator_type:A100": 1}),
            "accelerator_type=None, or one of the types that are there: ['A100']",
        ),
        ([2], CPU_GPU, nodes({"CPU": 4}, {"GPU": 4}), "more nodes: none has all that one process"),
        ([2], {"CPU": 4}, cpus(2), "more nodes: none has all that one process asks for"),
        ([4, 4], ONE_CPU, cpus(4, 2), "process_on_nodes=[4, 2]"),
        ([2, 4], ONE_CPU, cpus(4, 1), "process_on_nodes=[1, 4]"),
        ([3, 3, 3], ONE_CPU, cpus(6, 1), "process_on_nodes=[3, 3, 1]"),
        ([2, 4], ONE_CPU, cpus(3, 3), "process_on_nodes=[2, 3, 1]"),
        ([5, 1], ONE_CPU, cpus(2, 2, 2), "process_on_nodes=[2, 2, 1, 1]"),
        ([8] * 16, ONE_CPU, cpus(*[8] * 15), f"process_on_nodes={[8] * 15}"),
    ],
)
def test_what_fits_is_offered_in_the_order_asked_for_or_what_no_node_has_is_said(
    counts: list[int], bundle: dict[str, float], have: list[NodeResources], offered: str
) -> None:
    assert f"What fits: {offered}" in PoolRequest(tuple(counts), bundle).explain(have)


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
    strategy=st.sampled_from([PACK, STRICT, SPREAD]),
)
def test_what_could_be_packed_is_never_refused_and_what_is_offered_can_be(
    counts: list[int], room: list[int], strategy: str
) -> None:
    request, have = PoolRequest(tuple(counts), ONE_CPU, strategy), cpus(*room)
    if strategy == STRICT and packs(counts, room):
        assert request.fits(have)
    if not request.fits(have) and any(room):
        offer = re.search(r"process_on_nodes=\[([\d, ]+)\], or", request.explain(have))
        assert offer is not None
        fewer = tuple(map(int, offer[1].split(",")))
        assert replace(request, counts=fewer).fits(have)
        assert strategy != STRICT or packs(fewer, room)
