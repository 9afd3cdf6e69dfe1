"""Two roles in the same two processes, and a group of three elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from single_controller.ray import (
    Colocated,
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
)
from tests.data_plane.stage import AsyncStage, Stage


@pytest.fixture(scope="package")
def roles(cluster: None) -> Iterator[Colocated]:
    with (
        RayResourcePool([2], cpus_per_process=0.1) as two,
        colocate(two, one=Stage, two=Stage) as group,
    ):
        yield group


@pytest.fixture(scope="package")
def async_roles(cluster: None) -> Iterator[Colocated]:
    with (
        RayResourcePool([2], cpus_per_process=0.1) as two,
        colocate(two, one=AsyncStage, two=AsyncStage) as group,
    ):
        yield group


@pytest.fixture(scope="package")
def three(cluster: None) -> Iterator[RayWorkerGroup]:
    env = {"SINGLE_CONTROLLER_CHECK_READS": "1"}
    with (
        RayResourcePool([3], cpus_per_process=0.1) as ranks,
        RayWorkerGroup(ranks, RayClassWithInitArgs(Stage), worker_env=env) as group,
    ):
        yield group
