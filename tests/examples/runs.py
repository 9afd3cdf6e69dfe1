"""Short runs of examples/ppo on the session's cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from single_controller.ray import RayWorkerGroup

TOLERANCE = 1e-5
"""Of parameters after three steps: sums of float32 in another order, through Adam."""


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
