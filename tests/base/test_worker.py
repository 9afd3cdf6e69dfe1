"""A worker knows its place, whatever its subclass does, and says where it stands in meshes."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from single_controller.base.worker import Worker, WorkerContext, building

CONTEXT = WorkerContext(
    rank=5,
    world_size=8,
    local_rank=0,
    local_world_size=4,
    node_rank=1,
    master_addr="10.0.0.1",
    master_port=29_500,
    prefix="group",
    backend="ray",
)
KEYS = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "RAY_LOCAL_RANK": "1",
    "RAY_LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "WG_PREFIX": "group",
    "WG_BACKEND": "ray",
}


@dataclass
class FakeMesh:
    """What `register_mesh` reads of a torch DeviceMesh."""

    mesh_dim_names: tuple[str, ...] | None
    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None

    def get_coordinate(self) -> tuple[int, ...] | None:
        return self.coordinate


def place(worker: Any) -> tuple[int, int, int, int]:
    return worker.rank, worker.world_size, worker.local_rank, worker.local_world_size


def here(cls: type[Worker] = Worker, **context: Any) -> Any:
    with building(WorkerContext(**context)):
        return cls()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in Worker.env_keys():
        monkeypatch.delenv(key, raising=False)


def test_a_worker_made_outside_a_group_reads_its_place_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which has every key, and nothing that changes how children meet."""
    assert CONTEXT.environment() == KEYS
    assert set(Worker.env_keys()) == set(KEYS)
    assert place(Worker()) == (0, 1, 0, 1)
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    worker = Worker()
    assert place(worker) == (5, 8, 0, 4)
    assert worker.get_master_addr_port() == ("10.0.0.1", "29500")
    assert WorkerContext.from_environment().environment() == KEYS


def test_a_subclass_without_super_init_knows_its_place_and_peers_from_the_first_line_on() -> None:
    class Forgetful(Worker):
        def __init__(self, x: int, *, y: int) -> None:
            self.seen = (self.rank, x, y)
            self.inner = Worker()  # stands in the same place, with meshes of its own
            self.inner._register_dispatch_collect_info("m", 1, True)

    with building(replace(CONTEXT, peers={})):
        worker = Forgetful(1, y=2)
    worker.fused_worker_dict["forgetful"] = worker  # as a group does
    assert worker.inner.get_fused_worker_by_name("forgetful") is worker
    assert worker.get_fused_worker_by_name("other") is None
    with pytest.raises(KeyError), building(CONTEXT):
        raise KeyError("constructor")
    assert Worker().world_size == 1
    assert worker.seen == (5, 1, 2)
    assert place(worker.inner) == place(worker) == (5, 8, 0, 4)
    assert worker.get_dispatch_collect()["dispatch_dp_rank"] == {}
    assert worker.inner._query_dispatch_info("m") == 1


def test_the_device_is_the_ranks_own_and_visible_are_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert here(device_name="cpu", local_rank=2).device == torch.device("cpu")
    assert here(device_name="cuda", local_rank=2).device == torch.device("cuda", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert Worker().get_cuda_visible_devices() == "3"
    assert Worker("0,1").get_cuda_visible_devices() == "0,1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert Worker().get_cuda_visible_devices() == "not set"


def test_an_address_for_the_users_own_rendezvous_can_be_bound() -> None:
    worker = Worker()
    for ask in (worker.get_available_master_addr_port, worker.get_availale_master_addr_port):
        address, port = ask()
        with socket.socket() as probe:
            probe.bind((address, int(port)))


# rank = pp * 4 + dp * 2 + tp
CUBE = [(pp, dp, tp) for pp in range(2) for dp in range(2) for tp in range(2)]


@pytest.mark.parametrize(
    ("options", "dp_ranks", "collects"),
    [
        ({}, (0, 0, 1, 1, 0, 0, 1, 1), {4, 6}),
        ({"collect": {"tp": 0, "pp": 0}}, (0, 0, 1, 1, 0, 0, 1, 1), {0, 2}),
        ({"collect": {"tp": -1, "pp": 1}}, (0, 0, 1, 1, 0, 0, 1, 1), {5, 7}),
        ({"collect": {"pp": -1}}, (0, 0, 1, 1, 0, 0, 1, 1), {4, 6}),
        ({"dp": "tp", "collect": {"dp": 1, "pp": 0}}, (0, 1) * 4, {2, 3}),
        ({"dp": ("pp", "dp"), "collect": {"tp": 0}}, (0, 0, 1, 1, 2, 2, 3, 3), {0, 2, 4, 6}),
        ({"dp": ("dp", "pp"), "collect": {"tp": 0}}, (0, 0, 2, 2, 1, 1, 3, 3), {0, 2, 4, 6}),
        ({"dp": ("pp", "dp", "tp"), "collect": {}}, tuple(range(8)), set(range(8))),
    ],
)
def test_a_mesh_of_three_dimensions_gives_each_rank_its_shard_and_says_who_answers(
    options: dict[str, Any], dp_ranks: tuple[int, ...], collects: set[int]
) -> None:
    workers = [here(rank=rank, world_size=8) for rank in range(8)]
    for worker, at in zip(workers, CUBE, strict=True):
        worker.register_mesh(FakeMesh(("pp", "dp", "tp"), (2, 2, 2), at), mesh_name="m", **options)
    assert tuple(worker._query_dispatch_info("m") for worker in workers) == dp_ranks
    assert {w.rank for w in workers if w._query_collect_info("m")} == collects
    assert [w.query_collect_info("m") for w in workers] == [r in collects for r in range(8)]


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (FakeMesh(("x", "tp"), (2, 2), (0, 0)), {}),
        (FakeMesh(("dp", "tp"), (2, 2), (0, 0)), {"collect": {"pp": 0}}),
        (FakeMesh(("dp",), (2,), None), {}),
        (FakeMesh(None, (2,), (0,)), {}),
    ],
)
def test_a_mesh_without_the_dimensions_or_without_this_rank_is_refused(
    mesh: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"mesh 'default' needs the dimensions.*rank 0"):
        Worker().register_mesh(mesh, **options)


def test_another_place_in_a_mesh_that_is_registered_is_refused_with_both() -> None:
    worker = here(rank=3)
    worker._register_dispatch_collect_info("m", 0, True)
    worker._register_dispatch_collect_info("m", 0, True)
    with pytest.raises(ValueError, match=r"'m' is registered already on rank 3.*0, True.*1, True"):
        worker._register_dispatch_collect_info("m", dp_rank=1, is_collect=True)
    assert worker._query_dispatch_info("m") == 0


def test_an_unknown_mesh_names_the_known_ones_and_is_caught_as_verls_error() -> None:
    worker = Worker()
    worker._register_dispatch_collect_info("actor", 0, True)
    for ask in (worker._query_dispatch_info, worker._query_collect_info, worker.query_collect_info):
        with pytest.raises(AssertionError, match=r"'critic' is not registered.*Worker.*actor"):
            ask("critic")


def test_a_worker_takes_over_a_mesh_of_the_worker_it_nests() -> None:
    outer, inner = Worker(), Worker()
    inner._register_dispatch_collect_info("train", 1, True)
    # veRL's engine workers register one, "train", and are taken over as "ref" and "actor".
    outer.set_dispatch_collect(mesh_name="ref", **inner.get_dispatch_collect())
    inner._register_dispatch_collect_info("infer", 2, False)
    outer.set_dispatch_collect("infer", **inner.get_dispatch_collect())
    assert outer.get_dispatch_collect() == {
        "dispatch_dp_rank": {"ref": 1, "infer": 2},
        "collect_dp_rank": {"ref": True, "infer": False},
    }
    outer.get_dispatch_collect()["dispatch_dp_rank"]["infer"] = 7
    assert outer._query_dispatch_info("infer") == 2
    for taken, nested in (("infer", inner), ("actor", inner), ("actor", Worker())):
        with pytest.raises(ValueError, match=f"mesh '{taken}' is registered already, or .* has"):
            outer.set_dispatch_collect(taken, **nested.get_dispatch_collect())


def test_a_function_sent_to_a_worker_runs_with_it_or_on_rank_zero_without() -> None:
    worker = here(rank=3)
    assert worker.execute_with_func_generator(lambda w, x, y=0: (w.rank, x, y), 1, y=2) == (3, 1, 2)
    assert worker.execute_func_rank_zero(lambda x, y=0: (x, y), 1, y=2) == (1, 2)
