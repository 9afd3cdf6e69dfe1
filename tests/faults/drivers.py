"""Drivers of their own, in processes of their own, for what cannot be done to the one of the tests.

Each is the source of a program; `START` begins it with a cluster, and `GROUP` with a group as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["GROUP", "START", "launch", "run"]

ROOT = Path(__file__).parents[2]

START = """
import os, signal, sys, threading, time
import ray
from single_controller import *
from single_controller.base import PerRank
from single_controller.ray import *
from tests.faults.victim import Victim
from tests.waiting import eventually

def say(*words):
    print(*words, flush=True)

ray.init(
    "local", num_cpus=4, include_dashboard=False,
    logging_level="ERROR", log_to_driver=False, **OPTIONS
)
spec = RayClassWithInitArgs(Victim)
"""
GROUP = (
    START
    + """
pool = RayResourcePool([2], cpus_per_process=0.5)
group = RayWorkerGroup(pool, spec)
pids = [pid for _, pid, *_ in group.look()]
say("pids", *pids)

def acting():
    return all("Victim.act" in open(f"/proc/{pid}/cmdline").read() for pid in pids)
"""
)


def launch(program: str, options: str = "{}", **env: str) -> subprocess.Popen[str]:
    """Start a program; its output is in `stdout`, line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", program.replace("OPTIONS", options)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(program: str, options: str = "{}", timeout_s: float = 200, **env: str) -> str:
    """Run a program to its end; what it printed."""
    with launch(program, options, **env) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, output
    return output
