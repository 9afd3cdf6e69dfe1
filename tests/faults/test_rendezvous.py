"""Many groups on one machine, while another program takes ports as fast as it can."""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from tests.faults.victim import Victim

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def grabber() -> Iterator[None]:
    """Binds ephemeral ports one after another, and keeps the last two thousand."""
    done = threading.Event()

    def grab() -> None:
        kept: collections.deque[socket.socket] = collections.deque()
        while not done.wait(0.001):
            kept.append(socket.socket())
            kept[-1].bind(("", 0))
            kept[-1].listen(1)
            if len(kept) > 2_000:
                kept.popleft().close()
        for taken in kept:
            taken.close()

    thread = threading.Thread(target=grab, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.parametrize("groups", [3, pytest.param(50, marks=pytest.mark.long)])
def test_groups_beside_each_other_never_meet_on_one_port(cluster: None, groups: int) -> None:
    """Six of them are alive at any time."""
    spec = RayClassWithInitArgs(Victim)
    alive: collections.deque[RayWorkerGroup] = collections.deque()
    with RayResourcePool([2], cpus_per_process=0.5) as pool, grabber():
        for _ in range(groups):
            alive.append(RayWorkerGroup(pool, spec))
            assert alive[-1].all_reduce() == [3.0, 3.0]
            assert len({group.master_port for group in alive}) == len(alive)
            if len(alive) == 6:
                alive.popleft().close()
        for group in alive:
            assert group.all_reduce() == [3.0, 3.0]
            group.close()
