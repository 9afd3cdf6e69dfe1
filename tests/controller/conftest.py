"""Groups that several modules call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.controller.probe import Probe


@pytest.fixture(scope="module")
def group(cluster: None) -> Iterator[RayWorkerGroup]:
    """Two ranks, in the meshes "tp" (one dp rank) and "dp" (two)."""
    with (
        RayResourcePool([2], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Probe)) as two,
    ):
        yield two


@pytest.fixture(scope="module")
def three(cluster: None) -> Iterator[RayWorkerGroup]:
    with (
        RayResourcePool([3], cpus_per_process=0.1) as pool,
        RayWorkerGroup(pool, RayClassWithInitArgs(Probe, meshes=False)) as group,
    ):
        yield group
