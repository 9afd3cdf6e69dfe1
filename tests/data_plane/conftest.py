"""Two roles in the same two processes, and a group of three elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(params=["roles", "async_roles"])
def both(request: pytest.FixtureRequest) -> Any:
    """Two roles, of which nothing was read elsewhere so far."""
    group = request.getfixturevalue(request.param)
    group.one._hosts.now.read_elsewhere.clear()
    return group


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """The file that `hold` waits for; it is there when the test is over."""
    yield tmp_path / "go"
    (tmp_path / "go").touch()
