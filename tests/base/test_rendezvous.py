"""The port that ranks meet at: bound before it is published, and served when they come."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from single_controller.base.worker import Rendezvous
from single_controller.errors import ResourceError

HERE = "127.0.0.1"
_V6 = Path("/proc/net/if_inet6")
NO_V6 = pytest.mark.skipif(not (_V6.exists() and _V6.read_text()), reason="no IPv6 here")


@pytest.fixture
def meet() -> Iterator[Callable[..., Rendezvous]]:
    """Makes rendezvous, and lets go of those that nobody served."""
    made: list[Rendezvous] = []

    def make(*args: Any, **kwargs: Any) -> Rendezvous:
        made.append(Rendezvous(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_port_is_held_from_the_moment_it_is_known_and_of_a_range_the_first_free_one_is(
    meet: Callable[..., Rendezvous],
) -> None:
    held = meet(HERE)
    taken = held.port
    assert held.address == HERE
    with socket.socket() as rival, pytest.raises(OSError, match="in use"):
        rival.bind(("", taken))
    if taken < 65_500:
        assert taken < meet(HERE, port_range=[taken, taken + 30]).port <= taken + 30
    for options, named in (
        ({"port": taken}, f"master_port {taken} cannot be bound on {HERE}"),
        ({"port_range": [taken, taken]}, rf"master_port_range \[{taken}, {taken}\]"),
        ({"port": 70_000}, "70000"),
        ({"port_range": [70_000, 70_001]}, "70000"),
    ):
        with pytest.raises(ResourceError, match=named):
            meet(HERE, **options)


@pytest.mark.parametrize("here", [HERE, pytest.param("::1", marks=NO_V6)])
def test_ranks_meet_in_the_store_also_one_that_came_before_it_was_served(
    meet: Callable[..., Rendezvous], here: str
) -> None:
    from torch.distributed import TCPStore

    held = meet(here)
    read: list[bytes] = []

    def join(write: bool) -> None:
        store = TCPStore(here, held.port, is_master=False, timeout=timedelta(seconds=10))
        if write:
            store.set("key", "value")
        else:
            read.append(store.get("key"))

    early = threading.Thread(target=join, args=(False,), daemon=True)
    early.start()
    held.serve()
    join(write=True)
    early.join(timeout=10)
    assert read == [b"value"]
    with pytest.raises(ResourceError):
        Rendezvous(here, held.port)


FIRST = """
import sys
from single_controller.base import worker

worker._ALONE_S = 0
held = worker.Rendezvous("127.0.0.1")
held.serve()
print(held.port, "torch" in sys.modules, flush=True)
"""
MEETING = """
import os, sys, threading

port = sys.stdin.readline().strip()
os.environ.update(RANK=sys.argv[1], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
rank = int(sys.argv[1])
import torch.distributed as dist

for _ in range(2):
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    print("met", flush=True)
    sys.stdin.readline()
    threading.Event().wait(1 - rank)  # so that the others are first the second time
"""


def launch(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("order", [pytest.param((0, 1), marks=pytest.mark.slow), (1, 0)])
def test_rank_0_finds_the_store_that_its_process_serves_whoever_comes_first(
    order: tuple[int, int],
) -> None:
    """Without a variable for it, which would have other meetings wait for a store of nobody."""
    serving = FIRST.replace("_ALONE_S = 0", "_ALONE_S = 100")
    with launch(serving + MEETING, "0") as first, launch(MEETING, "1") as other:
        assert first.stdout is not None
        port = first.stdout.readline().split()[0]
        for _ in range(2):  # the second time, what they wrote the first time must not be there
            for rank in order:
                stdin = (first, other)[rank].stdin
                assert stdin is not None
                stdin.write(f"{port}\n")
                stdin.flush()
            for process in (first, other):
                assert process.stdout is not None
                assert process.stdout.readline() == "met\n"


def test_ranks_that_meet_without_the_first_one_find_the_store_too() -> None:
    from torch.distributed import TCPStore

    with launch(FIRST + "sys.stdin.read()") as first:
        assert first.stdout is not None
        port, has_torch = first.stdout.readline().split()
        assert has_torch == "False"
        store = TCPStore(HERE, int(port), is_master=False, timeout=timedelta(seconds=30))
        store.set("key", "value")
        assert store.get("key") == b"value"
        del store
        first.kill()
