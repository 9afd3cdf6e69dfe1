"""Whether nodes can hold a pool, and changes that really make it fit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from single_controller.ray.feasibility import NodeResources, PoolRequest

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
        ([3], ONE_CPU, STRICT, cpus(2), False),
        ([2, 4], ONE_CPU, STRICT, cpus(4, 2), True),
        ([2, 4], ONE_CPU, STRICT, cpus(6), True),
        ([2, 4], ONE_CPU, STRICT, cpus(3, 3), False),
        ([2, 4], ONE_CPU, PACK, cpus(3, 3), True),
        ([2, 4], ONE_CPU, PACK, cpus(3, 2), False),
        ([3, 3, 2, 2, 2], ONE_CPU, STRICT, cpus(6, 6), True),
        ([4, 3, 3, 2], ONE_CPU, STRICT, cpus(7, 5), True),
        ([4, 4, 4], ONE_CPU, STRICT, cpus(6, 6), False),
        ([2], ONE_CPU, SPREAD, cpus(8), False),
        ([2], ONE_CPU, SPREAD, cpus(1, 1), True),
        ([2, 2], ONE_CPU, SPREAD, cpus(2, 2), True),
        ([2, 2], ONE_CPU, SPREAD, cpus(8, 1), False),
        ([3], ONE_CPU, SPREAD, cpus(8, 8, 0), False),
        ([2], CPU_GPU, STRICT, nodes({"CPU": 8}), False),
        ([2], CPU_GPU, STRICT, nodes({"CPU": 8, "GPU": 1}), False),
        ([2], CPU_GPU, PACK, nodes({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}), True),
        ([2], CPU_GPU, PACK, nodes({"CPU": 2}, {"GPU": 2}), False),
        ([10], {"CPU": 0.1}, STRICT, cpus(1), True),
        ([3], {"CPU": 1 / 3}, STRICT, cpus(1), True),
        ([2], {"CPU": 0.0, "GPU": 1.0}, STRICT, nodes({"GPU": 2}), True),
        ([2], {"CPU": 1.0, "accelerator_type:H100": 1e-4}, STRICT, cpus(8), False),
        ([1], ONE_CPU, STRICT, [], False),
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
    text = request.explain(busy)
    assert "close what holds the resources" in text
    assert "placement_timeout_s" in text
    assert "node 10.0.0.1 holds 4 processes, 0 now" in text


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
    assert lines[-1].startswith("Smallest change that fits: ")


def changes(request: PoolRequest, have: Sequence[NodeResources]) -> Iterator[tuple[str, bool]]:
    """Each change that the explanation offers, and whether the pool fits with it."""
    text = request.explain(have).split("Smallest change that fits: ")[1]
    for found in re.finditer(r"process_on_nodes=\[([\d, ]+)\]", text):
        counts = tuple(map(int, found[1].split(",")))
        yield found[0], replace(request, counts=counts).fits(have)
    for found in re.finditer(r"(cpus|gpus)_per_process=([\d.]+)", text):
        name = "CPU" if found[1] == "cpus" else next(k for k in request.bundle if k != "CPU")
        bundle = {**request.bundle, name: float(found[2])}
        yield found[0], replace(request, bundle=bundle).fits(have)
    for found in re.finditer(r"ray\.init\(num_cpus=([\d.]+)\)", text):
        larger = nodes({**(have[0].total if have else {}), "CPU": float(found[1])})
        yield found[0], request.fits(larger if len(have) == 1 else [*larger, *have])
    if "use_gpu=False" in text:
        bundle = {name: need for name, need in request.bundle.items() if name == "CPU"}
        yield "use_gpu=False", replace(request, bundle=bundle).fits(have)


@pytest.mark.parametrize(
    ("request_", "have", "offered"),
    [
        (PoolRequest((8,), ONE_CPU), cpus(4), "process_on_nodes=[4]"),
        (PoolRequest((8,), ONE_CPU), cpus(4), "cpus_per_process=0.5"),
        (PoolRequest((8,), ONE_CPU), cpus(4), "ray.init(num_cpus=8)"),
        (PoolRequest((2, 2), ONE_CPU), cpus(1), "ray.init(num_cpus=4)"),
        (PoolRequest((2, 4), ONE_CPU), cpus(3, 3), "process_on_nodes="),
        (PoolRequest((4,), ONE_CPU, SPREAD), cpus(8, 8), "process_on_nodes=[2]"),
        (PoolRequest((2,), CPU_GPU), nodes({"CPU": 8}), "use_gpu=False"),
        (PoolRequest((2,), CPU_GPU), nodes({"CPU": 8, "GPU": 1}), "gpus_per_process=0.5"),
        (PoolRequest((4, 4), ONE_CPU), cpus(1, 4), "process_on_nodes="),
    ],
)
def test_every_change_that_is_offered_really_fits(
    request_: PoolRequest, have: list[NodeResources], offered: str
) -> None:
    assert not request_.fits(have)
    assert offered in request_.explain(have)
    assert [change for change, fits in changes(request_, have) if not fits] == []


@pytest.mark.parametrize(
    ("counts", "have", "smallest"),
    [
        ([4, 4], cpus(4, 2), [4, 2]),
        ([2, 4], cpus(4, 1), [1, 4]),
        ([4, 4], cpus(1, 4), [4, 1]),
        ([3, 3, 3], cpus(6, 1), [3, 3, 1]),
        ([8] * 16, cpus(*[8] * 15), [8] * 15),
    ],
)
def test_the_smallest_change_keeps_as_many_processes_as_fit(
    counts: list[int], have: list[NodeResources], smallest: list[int]
) -> None:
    text = PoolRequest(tuple(counts), ONE_CPU).explain(have)
    assert f"Smallest change that fits: process_on_nodes={smallest}" in text


def test_a_missing_accelerator_type_is_said() -> None:
    request = PoolRequest((2,), {"CPU": 1.0, "accelerator_type:H100": 1e-4})
    assert "accelerator_type=None" in request.explain(cpus(8))
    others = nodes({"CPU": 8, "accelerator_type:A100": 1}, {"CPU": 1, "accelerator_type:T4": 1})
    assert "accelerator_type='A100' or accelerator_type=None" in request.explain(others)


def test_a_custom_resource_is_asked_for_by_its_own_name() -> None:
    text = PoolRequest((2,), {"CPU": 1.0, "disk": 1.0}).explain(nodes({"CPU": 8, "disk": 1}))
    assert "resources_per_process={'disk': 0.5}" in text
    assert "nodes with 2 disk, or no disk in the pool" in text
    assert "use_gpu" not in text


def test_nodes_without_anything_get_no_offer_of_a_pool_without_processes() -> None:
    text = PoolRequest((2,), CPU_GPU).explain(nodes({}))
    assert "process_on_nodes=[]" not in text
    assert "more nodes" in text


def test_a_search_that_would_take_too_long_leaves_the_answer_to_ray() -> None:
    assert PoolRequest((3,) * 40, ONE_CPU).fits(cpus(*range(4, 40)))
    mixed = PoolRequest(tuple(range(30, 70)), ONE_CPU)
    have = cpus(*range(20, 60))
    assert [fits for _, fits in changes(mixed, have) if not fits] == []


def packs(counts: Sequence[int], room: Sequence[int]) -> bool:
    """By trying all assignments."""
    for where in itertools.product(range(len(room)), repeat=len(counts)):
        left = list(room)
        for count, node in zip(counts, where, strict=True):
            left[node] -= count
        if min(left) >= 0:
            return True
    return False


def most_kept(counts: Sequence[int], room: Sequence[int]) -> int:
    """By trying all assignments, cut to what each node holds."""
    best = 0
    for where in itertools.product(range(len(room)), repeat=len(counts)):
        asked = [0] * len(room)
        for count, node in zip(counts, where, strict=True):
            asked[node] += count
        best = max(best, sum(map(min, asked, room)))
    return best


@settings(deadline=None, max_examples=80)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    room=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    strategy=st.sampled_from([PACK, STRICT, SPREAD]),
)
def test_strict_pack_is_exact_and_every_offer_fits(
    counts: list[int], room: list[int], strategy: str
) -> None:
    request, have = PoolRequest(tuple(counts), ONE_CPU, strategy), cpus(*room)
    if strategy == STRICT:
        assert request.fits(have) == packs(counts, room)
    if not request.fits(have):
        if strategy == STRICT and any(room):
            offer = re.search(r"that fits: process_on_nodes=\[([\d, ]+)\]", request.explain(have))
            assert offer is not None
            assert sum(map(int, offer[1].split(","))) == most_kept(counts, room)
        assert [change for change, fits in changes(request, have) if not fits] == []
