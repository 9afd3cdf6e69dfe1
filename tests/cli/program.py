"""`python -m single_controller` as a program of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ray

ROOT = Path(__file__).parents[2]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "single_controller", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def here() -> str:
    """The address of the tests' cluster."""
    return str(ray.get_runtime_context().gcs_address)
