"""Processes per node as arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from single_controller.base import ResourcePool


@pytest.mark.parametrize(
    ("store", "local_ranks", "local_sizes"),
    [
        ([], [], []),
        ([1], [0], [1]),
        ([2, 1], [0, 1, 0], [2, 2, 1]),
        ([2, 4], [0, 1, 0, 1, 2, 3], [2, 2, 4, 4, 4, 4]),
    ],
)
def test_ranks_are_counted_node_by_node(
    store: list[int], local_ranks: list[int], local_sizes: list[int]
) -> None:
    pool = ResourcePool(store)
    assert (pool.world_size, pool.store, pool()) == (sum(store), store, store)
    assert pool.local_rank_list() == local_ranks
    assert pool.local_world_size_list() == local_sizes


def test_defaults_are_an_empty_pool_that_ten_groups_may_share() -> None:
    pool = ResourcePool()
    assert (pool.store, pool.max_colocate_count, pool.n_gpus_per_node) == ([], 10, 8)


def test_a_node_can_be_added() -> None:
    pool = ResourcePool([2])
    pool.add_node(3)
    assert (pool.store, pool.world_size) == ([2, 3], 5)


def test_neither_the_callers_list_nor_the_store_is_the_pools_own() -> None:
    counts = [2]
    pool = ResourcePool(counts)
    pool.add_node(1)
    pool.store.append(9)
    pool().append(9)
    assert (counts, pool.store) == ([2], [2, 1])


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, [1]])
def test_a_count_that_is_no_positive_integer_is_refused_with_its_node(count: Any) -> None:
    with pytest.raises(ValueError, match=r"positive integers.*for node 1"):
        ResourcePool([1, count])


@pytest.mark.parametrize("wrong", [5, {1}])
def test_what_lists_no_nodes_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="process_on_nodes must list the processes of each node"):
        ResourcePool(wrong)


@pytest.mark.parametrize("wrong", [0, "x", 1.5, True])
def test_a_pool_must_allow_at_least_one_group(wrong: Any) -> None:
    match = f"max_colocate_count must be a whole number, at least 1; got {wrong!r}"
    with pytest.raises(ValueError, match=match):
        ResourcePool([1], max_colocate_count=wrong)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), max_size=6))
def test_every_rank_has_a_place_on_exactly_one_node(store: list[int]) -> None:
    pool = ResourcePool(store)
    ranks, sizes = pool.local_rank_list(), pool.local_world_size_list()
    assert len(ranks) == len(sizes) == pool.world_size
    assert all(rank < size for rank, size in zip(ranks, sizes, strict=True))
    assert ranks.count(0) == len(store)
