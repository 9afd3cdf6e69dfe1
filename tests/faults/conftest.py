"""Groups to break."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from tests.faults.victim import Victim


@pytest.fixture(scope="module")
def group(pool: object) -> Iterator[RayWorkerGroup]:
    """Two ranks. Tests that break them restart them."""
    with RayWorkerGroup(pool, RayClassWithInitArgs(Victim)) as two:  # type: ignore[arg-type]
        yield two
