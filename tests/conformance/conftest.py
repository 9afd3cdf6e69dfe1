"""The same tests for every backend: what differs between them, and groups that modules share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
import ray

from single_controller import ClassWithInitArgs, ResourcePool, inline
from single_controller import ray as on_ray
from tests.conformance.probe import Engine, Fragile, Member, Probe
from tests.conformance.team import ARGUMENTS, specs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow_on_ray") and "[ray" in item.name:
            item.add_marker(pytest.mark.slow)


class Backend(Protocol):
    """How a backend's users say what the tests need."""

    name: str
    module: Any

    def pool(self, counts: list[int]) -> Any: ...
    def group(self, spec: Any, ranks: int | None = None, **options: Any) -> Any: ...
    def spec(self, cls: Any, *args: Any, **kwargs: Any) -> Any: ...
    def get(self, references: Any) -> Any: ...


class Inline:
    name, module = "inline", inline
    spec = ClassWithInitArgs

    def pool(self, counts: list[int]) -> ResourcePool:
        return ResourcePool(counts)

    def group(self, spec: Any, ranks: int | None = None, **options: Any) -> Any:
        return inline.InlineWorkerGroup(ResourcePool([ranks or 2]), spec, **options)

    def get(self, references: Any) -> Any:
        if isinstance(references, list):
            return [self.get(reference) for reference in references]
        return references.get(timeout=60)


class OnRay:
    name, module = "ray", on_ray
    spec = on_ray.RayClassWithInitArgs

    def __init__(self) -> None:
        self.pools: dict[tuple[int, ...], on_ray.RayResourcePool] = {}

    def pool(self, counts: list[int]) -> on_ray.RayResourcePool:
        """One pool for all groups of these counts."""
        key = tuple(counts)
        if key not in self.pools:
            self.pools[key] = on_ray.RayResourcePool(counts, cpus_per_process=0.1)
        return self.pools[key]

    def group(self, spec: Any, ranks: int | None = None, **options: Any) -> Any:
        return on_ray.RayWorkerGroup(self.pool([ranks or 2]), spec, **options)

    def get(self, references: Any) -> Any:
        return ray.get(references, timeout=60)


@pytest.fixture(scope="package", params=["inline", "ray"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "inline":
        yield Inline()
        return
    request.getfixturevalue("cluster")
    on = OnRay()
    yield on
    for pool in on.pools.values():
        pool.close()


@pytest.fixture(scope="package")
def in_turn(backend: Backend) -> Iterator[dict[str, Any]]:
    """By name, groups of roles whose calls run one after another, all in the same two hosts."""
    roles = {cls.__name__: backend.spec(cls) for cls in (Probe, Engine, Fragile)}
    with backend.group(backend.module.create_colocated_worker_cls(roles)) as hosts:
        yield hosts.spawn(roles)


@pytest.fixture(scope="package")
def group(in_turn: dict[str, Any]) -> Any:
    """Two ranks, in the meshes "tp" (one dp rank) and "dp" (two)."""
    return in_turn["Probe"]


@pytest.fixture(scope="package")
def four(backend: Backend) -> Iterator[dict[str, Any]]:
    """Roles on four ranks, by name: in two meshes, and in none."""
    roles = {"Member": backend.spec(Member), "Probe": backend.spec(Probe, meshes=False)}
    with backend.group(backend.module.create_colocated_worker_cls(roles), ranks=4) as hosts:
        yield hosts.spawn(roles)


@pytest.fixture(scope="package")
def wider(four: dict[str, Any]) -> Any:
    """As `group`, with four ranks."""
    return four["Probe"]


@pytest.fixture(scope="package")
def hosts(backend: Backend) -> Iterator[Any]:
    """Three roles on two ranks, one of them with async methods."""
    with backend.group(backend.module.create_colocated_worker_cls(specs(backend))) as all_roles:
        yield all_roles


@pytest.fixture(scope="package")
def roles(hosts: Any) -> dict[str, Any]:
    return hosts.spawn(ARGUMENTS)
