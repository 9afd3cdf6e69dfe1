"""The port that ranks meet at: bound before it is published, and torch's when they come."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from single_controller.base.worker import Rendezvous
from single_controller.errors import ResourceError

_V6 = Path("/proc/net/if_inet6")
NO_V6 = pytest.mark.skipif(not (_V6.exists() and _V6.read_text()), reason="no IPv6 here")


@pytest.mark.parametrize("here", ["127.0.0.1", pytest.param("::1", marks=NO_V6)])
def test_the_port_is_held_from_the_moment_it_is_known_and_of_a_range_the_first_free_one_is(
    here: str,
) -> None:
    with contextlib.closing(Rendezvous(here)) as held:
        taken = held.port
        assert held.address == here
        with socket.socket() as rival, pytest.raises(OSError, match="in use"):
            rival.bind(("", taken))
        if taken < 65_500:
            with contextlib.closing(Rendezvous(here, port_range=[taken, taken + 30])) as other:
                assert taken < other.port <= taken + 30
        for options, named in (
            ({"port": taken}, f"master_port {taken} cannot be bound on {here}"),
            ({"port_range": [taken, taken]}, rf"master_port_range \[{taken}, {taken}\]"),
            ({"port": 70_000}, "70000"),
        ):
            with pytest.raises(ResourceError, match=named):
                Rendezvous(here, **options)  # type: ignore[arg-type]


KEEPING = """
from single_controller.base.worker import Rendezvous

held = Rendezvous("127.0.0.1")
held.hand_over()
print(held.port, flush=True)
"""
MEETING = """
import os, sys, threading

port = sys.stdin.readline().strip()
os.environ.update(RANK=sys.argv[1], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
import torch.distributed as dist

for _ in range(2):
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    print("met", flush=True)
    sys.stdin.readline()
    threading.Event().wait(1 - int(sys.argv[1]))  # so that the others are first the second time
"""


def launch(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_ranks_meet_at_the_port_again_and_again_whoever_comes_first() -> None:
    with launch(KEEPING + MEETING, "0") as first, launch(MEETING, "1") as other:
        assert first.stdout is not None
        port = first.stdout.readline()
        for _ in range(2):
            for process in (other, first):
                assert process.stdin is not None
                process.stdin.write(port)
                process.stdin.flush()
            for process in (first, other):
                assert process.stdout is not None
                assert process.stdout.readline() == "met\n"
