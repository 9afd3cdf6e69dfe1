"""Short runs of examples/ppo, on groups and as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from single_controller.ray import RayWorkerGroup

TOLERANCE = 1e-5
"""Of parameters after three steps: sums of float32 in another order, through Adam."""
ROOT = Path(__file__).parents[2]


def parameters(group: RayWorkerGroup) -> dict[str, torch.Tensor]:
    """A role's parameters, which all of its ranks must have."""
    first, *others = group.parameters()
    for other in others:
        assert all(torch.equal(first[name], value) for name, value in other.items())
    return first


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def trained(settings: Any, roles: Any, steps: Iterable[int]) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of the roles that learn, after these steps."""
    from examples.ppo.train import make_tokenizer, train_step

    for step in steps:
        train_step(settings, roles, make_tokenizer(settings), step)
    return {role: parameters(roles[role]) for role in ("actor", "critic") if role in roles}


def until_good(settings: Any) -> list[dict[str, Any]]:
    """The metrics of each step, until the reward of the last few is good on average."""
    from examples.ppo.train import make_tokenizer, started, train_step

    seen: list[dict[str, Any]] = []
    with started(settings, make_tokenizer(settings)) as roles:
        while len(seen) < settings.steps and not _is_good(seen):
            seen.append(train_step(settings, roles, make_tokenizer(settings), len(seen)))
    return seen


def check_learned(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["reward"] <= 0.2
    assert _is_good(seen), [metrics["reward"] for metrics in seen]


def _is_good(seen: list[dict[str, Any]]) -> bool:
    last = [metrics["reward"] for metrics in seen[-5:]]
    return len(last) == 5 and sum(last) / 5 >= 0.9


def run(*options: str, output: Path, address: str = "") -> subprocess.Popen[str]:
    """The program; without an address it starts Ray itself, in its own process group."""
    sizes = ["--prompts", "9", "--mini-batch", "4", "--hidden-size", "32", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "examples.ppo", *sizes, *options, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*options: str, output: Path, address: str) -> None:
    with run(*options, output=output, address=address) as program:
        errors = program.communicate(timeout=120)[1]
        assert program.returncode == 0, errors
