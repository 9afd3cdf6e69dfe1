"""One Ray cluster for the whole session, for the tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from single_controller.ray import RayResourcePool

pytest_plugins = ["single_controller.testing"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, num_gpus=0, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[RayResourcePool]:
    with RayResourcePool([2], cpus_per_process=0.5) as two_ranks:
        yield two_ranks
