"""A module that is trained on all ranks: replicated or cut over them, stepped, kept on disk.

What its loss is, is left to the workers. Every rank must call the same things in the same order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from single_controller.base import Worker
from single_controller.device import device_kind, get_torch_device

__all__ = ["Trained", "join_group", "mixed_precision", "take_weights"]


def join_group(worker: Worker, threads: int) -> None:
    """Make this process a member of the group's collectives, once for all its roles.

    Args:
        threads: that torch may use on a CPU; 0: the node's cores, shared with its other ranks.
    """
    if dist.is_initialized():
        return
    kind = device_kind(worker.device.type)
    if worker.device.type == "cpu":
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // worker.local_world_size))
    else:
        get_torch_device().set_device(worker.device)
    dist.init_process_group(kind.backend)


def mixed_precision(device: torch.device, precision: str) -> Any:
    """A context in which matrix products are in "bfloat16" or "float32"; "" leaves it to the
    device.
    """
    lower = precision == "bfloat16" or (not precision and device.type != "cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)


class Trained:
    """A module on every rank, with its optimizer.

    Gradients are averaged over ranks, so a loss that is a sum of each rank's share must be
    multiplied by the number of ranks; `backward` does.

    Args:
        blocks: names of the classes that "fsdp2" gathers one at a time.
        shard: "ddp" for a replica per rank, "fsdp2" for a part of each parameter per rank.
    """

    def __init__(
        self, module: nn.Module, blocks: set[str], shard: str, device: torch.device, lr: float
    ) -> None:
        self.bare: Any = module.to(device)
        self.module: Any
        if shard == "fsdp2":
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for block in [m for m in module.modules() if type(m).__name__ in blocks]:
                fully_shard(block, mesh=mesh)
            self.module = fully_shard(module, mesh=mesh)
        else:
            self.module = DistributedDataParallel(module, gradient_as_bucket_view=True)
        # This epsilon keeps rounding errors of gradients near zero from becoming whole steps.
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=lr, eps=1e-5, weight_decay=0.0
        )

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module for inference: ranks need not call it equally often."""
        parts = [m for m in self.bare.modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield self.bare
        finally:
            for part in parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()

    def backward(self, share: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of a loss; with `last`, average over the ranks."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        (share * dist.get_world_size()).backward()

    def accumulating(self, last: bool) -> Any:
        """The context for a forward pass whose `backward` has this `last`."""
        if last or isinstance(self.module, FSDPModule):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def step(self, max_grad_norm: float) -> float:
        """Take an optimizer step; returns the norm of the gradient before it was clipped."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def save(self, path: str) -> None:
        """Write parameters and optimizer state to a folder; each rank writes its part."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)

    def load(self, path: str) -> None:
        """Read what `save` wrote, with any number of ranks and either way of sharding."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def weights(self) -> dict[str, Tensor]:
        """What this rank has of the parameters and buffers, without a copy: all, or its rows."""
        return {
            name: value.to_local() if isinstance(value, DTensor) else value
            for name, value in self.bare.state_dict().items()
        }

    def parameters(self) -> dict[str, Tensor]:
        """The whole parameters by name, on the CPU."""
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu()
            for name, p in self.bare.named_parameters()
        }


def take_weights(module: nn.Module, parts: Sequence[Mapping[str, Tensor]]) -> None:
    """Copy into a module what `Trained.weights` gave: a replica, or all ranks' parts in order."""
    for name, mine in module.state_dict().items():
        found = [part[name] for part in parts]
        if found[0].shape == mine.shape:  # a replica; or no rank behind the first has a row
            mine.copy_(found[0])
        else:
            for place, rows in zip(mine.split([*map(len, found)]), found, strict=True):
                place.copy_(rows)
