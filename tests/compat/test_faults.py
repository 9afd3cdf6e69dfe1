"""Faults that veRL 0.9 has and this library must not get, where no other test asks for them."""

from __future__ import annotations

import pytest
import torch

from protocol import DataProto
from single_controller.base import PerRank, Worker, decorator
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    get_random_string,
    parallel_put,
)


class Probe(Worker):
    def plain(self, *args: object) -> tuple[object, ...]:
        return args


def test_a_group_scatters_no_list_by_its_length_and_leaves_its_spec_as_it_was(
    pool: RayResourcePool,
) -> None:
    spec = RayClassWithInitArgs(Probe)
    with RayWorkerGroup(pool, spec, name_prefix="faults_") as group:
        assert group.execute_all_sync("plain", [1, 2]) == [([1, 2],)] * 2
        assert group.execute_all_sync("plain", PerRank([1, 2])) == [(1,), (2,)]
        assert [name.startswith("faults_") for name in group.worker_names] == [True, True]
    assert not {"name", "lifetime", "scheduling_strategy"} & set(spec.actor_spec().options)


def test_one_entry_of_additional_resources_counts_too() -> None:
    spec = RayClassWithInitArgs(Probe)
    spec.set_additional_resource({"high_bandwidth": 1})
    assert spec.actor_spec().options["resources"] == {"high_bandwidth": 1}


def test_chunks_have_their_own_meta_info() -> None:
    data = DataProto.from_dict({"a": torch.arange(4)}, meta_info={"k": 1})
    first, second = data.chunk(2)
    first.meta_info["k"] = 2
    assert second.meta_info["k"] == 1


def test_small_helpers_do_what_verls_were_meant_to(cluster: None) -> None:
    assert parallel_put([]) == []
    made = {get_random_string(8) for _ in range(20)}
    assert len(made) == 20
    assert all(len(text) == 8 and text.isalnum() for text in made)
    for check in (decorator._check_dispatch_mode, decorator._check_execute_mode):
        with pytest.raises(AssertionError, match="must be"):
            check("neither")
