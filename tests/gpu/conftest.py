"""A cluster with the machine's GPUs, for tests that run only where there are some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from single_controller.ray import RayResourcePool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="package")
def gpus() -> Iterator[int]:
    """How many GPUs the cluster has."""
    count = torch.cuda.device_count()
    if not count:
        pytest.skip("needs a CUDA device; this machine has none")
    ray.init(num_cpus=16, num_gpus=count, include_dashboard=False, logging_level="ERROR")
    yield count
    ray.shutdown()


@pytest.fixture(scope="module")
def two_cards(gpus: int) -> Iterator[RayResourcePool]:
    """Two ranks, each with a card of its own."""
    if gpus < 2:
        pytest.skip(f"needs 2 CUDA devices; this machine has {gpus}")
    with RayResourcePool([2]) as pool:
        yield pool
