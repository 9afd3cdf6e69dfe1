"""Two models, their data, and what must be true of gradients after one step: what the examples
`native_ray_groups` and `two_groups` have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "check_different", "check_synchronised", "make_data"]


class Attention(nn.Module):
    """Self-attention with 16 heads over (rows, tokens, 1024)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(1024, 3 * 1024), nn.Linear(1024, 1024)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 16, 64)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Sequential):
    """Two layers over (rows, 512)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))


MODELS = (Attention, MLP)


def make_data() -> tuple[Tensor, Tensor]:
    """A batch for each model: (4, 128, 1024) and (4, 512)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 128, 1024, generator=generator), torch.randn(4, 512, generator=generator)


def check_synchronised(name: str, outputs: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The one gradient of all ranks, whose losses come from different rows.

    Args:
        outputs: the loss and the gradient of each rank.

    Raises:
        RuntimeError: ranks have different gradients, or the same loss.
    """
    losses, (first, *others) = zip(*outputs, strict=True)
    if not all(torch.equal(first, other) for other in others) or len(set(losses)) < len(losses):
        raise RuntimeError(f"{name}: not one gradient of different rows: losses {losses}")
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    print(f"{name}: losses {shown}; one gradient of norm {first.norm():.4f}")
    return first


def check_different(first: Tensor, second: Tensor) -> None:
    """Two models have two gradients.

    Raises:
        RuntimeError: they have one.
    """
    if torch.equal(first.flatten()[:512], second.flatten()[:512]):
        raise RuntimeError("the groups have the same gradient")
    print("the groups' gradients differ")
