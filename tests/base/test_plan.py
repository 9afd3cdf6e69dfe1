"""The values that calls are planned with: pools, layouts, markers."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from single_controller import DispatchError, PerRank, ResourcePool
from single_controller.base.plan import Layout, loaded
from tests.waiting import eventually

# rank = pp * 4 + dp * 2 + tp; the last pipeline stage answers, its first tp rank alone
PP_DP_TP = Layout((0, 0, 1, 1, 0, 0, 1, 1), tuple(r in (4, 6) for r in range(8)), 2)
REVERSED = Layout((2, 1, 0), (True, True, True), 3)


@pytest.mark.parametrize(
    ("store", "local_ranks", "local_sizes"),
    [
        ([], [], []),
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


def test_a_pool_is_empty_by_default_grows_by_nodes_and_keeps_its_store_to_itself() -> None:
    pool = ResourcePool()
    assert (pool.store, pool.max_colocate_count, pool.n_gpus_per_node) == ([], 10, 8)
    counts = [2]
    pool = ResourcePool(counts)
    pool.add_node(3)
    pool.store.append(9)
    pool().append(9)
    assert (counts, pool.store, pool.world_size) == ([2], [2, 3], 5)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", None, [1], True])
def test_a_count_that_is_no_positive_integer_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"process_on_nodes\[1\] must be a whole number"):
        ResourcePool([1, wrong])
    with pytest.raises(ValueError, match="max_colocate_count must be a whole number, at least 1; "):
        ResourcePool([1], max_colocate_count=wrong)


@pytest.mark.parametrize(
    ("layout", "ranks", "dp_ranks", "collects", "dp_size"),
    [
        (Layout.flat(3), (2, 0), (0, 1), (True, True), 2),
        (Layout.flat(3), (1,), (0,), (True,), 1),
        (PP_DP_TP, (2, 6), (0, 0), (False, True), 1),
        (PP_DP_TP, (6, 2, 4), (0, 0, 1), (True, False, True), 2),
    ],
)
def test_a_subset_of_ranks_is_a_layout_with_shards_numbered_as_they_come(
    layout: Layout, ranks: Sequence[int], dp_ranks: Any, collects: Any, dp_size: int
) -> None:
    assert layout.subset(ranks) == Layout(dp_ranks, collects, dp_size)


def test_a_layout_is_made_once_for_what_it_holds_and_knows_who_answers() -> None:
    assert Layout.of([0, 1], [True, True]) is Layout.flat(2)
    assert Layout.of([0, 1], [True, False]) is not Layout.flat(2)
    for layout in (PP_DP_TP, pickle.loads(pickle.dumps(PP_DP_TP))):
        assert (layout.collecting, layout.by_shard) == ((4, 6), (4, 6))
    assert (REVERSED.collecting, REVERSED.by_shard) == ((0, 1, 2), (2, 1, 0))


@pytest.mark.parametrize("values", [5, {0: 1}, {1, 2}, iter([1, 2])], ids=repr)
def test_what_has_no_value_for_each_rank_is_refused(values: Any) -> None:
    with pytest.raises(DispatchError, match="a list is needed, one value per rank; got "):
        PerRank(values)


def test_a_module_that_a_thread_is_importing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import sys, threading\n"
        "begun, go = threading.Event(), threading.Event()\n"
        "begun.set()\n"
        "go.wait(60)\n"
        "whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert loaded("slow_to_import") is None
    with ThreadPoolExecutor(2) as threads:
        threads.submit(importlib.import_module, "slow_to_import")
        assert eventually(lambda: hasattr(sys.modules.get("slow_to_import"), "begun"))
        found = threads.submit(loaded, "slow_to_import")
        assert not wait([found], timeout=0.2).done
        sys.modules["slow_to_import"].go.set()
        assert found.result(timeout=60).whole
