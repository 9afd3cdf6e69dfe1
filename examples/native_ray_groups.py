"""Two models on two groups of workers by Ray's own means: what a controller takes off you.

`python -m examples.two_groups` is the same job in this framework. It runs on GPUs where the
cluster has four of them, else on CPUs.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples.cluster import chosen_strategy, connect
from examples.two_models import MODELS, check_different, check_synchronised, make_data

PER_GROUP = 2


class ModelWorker:
    """One rank. It can be asked for an address before it joins the others."""

    def address(self) -> tuple[str, int]:
        """This node's address, and a port that is free now and, with luck, a moment later."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, rank: int, address: tuple[str, int], model_class: type[nn.Module]) -> str:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(PER_GROUP),
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
        )
        on_gpu = bool(ray.get_runtime_context().get_accelerator_ids()["GPU"])
        self.device = torch.device("cuda" if on_gpu else "cpu")
        dist.init_process_group("nccl" if on_gpu else "gloo")
        torch.manual_seed(rank)  # the replicas become equal because DDP makes them
        self.model = DistributedDataParallel(model_class().to(self.device))
        return f"rank {rank}/{dist.get_world_size()} {model_class.__name__} on {self.device}"

    def train_step(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss, and the gradient of the first parameter."""
        loss = self.model(x.to(self.device)).square().mean()
        loss.backward()
        return loss.item(), next(self.model.parameters()).grad.cpu()


def start_group(
    group: PlacementGroup, first: int, model_class: type[nn.Module], on_gpu: bool
) -> list[Any]:
    """Workers in consecutive bundles from `first` on, joined in a process group of their own."""
    workers = []
    for rank in range(PER_GROUP):
        in_bundle = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=first + rank
        )
        options = {"num_cpus": 1, "num_gpus": int(on_gpu), "scheduling_strategy": in_bundle}
        workers.append(ray.remote(ModelWorker).options(**options).remote())
    address = ray.get(workers[0].address.remote())
    joined = [w.join.remote(rank, address, model_class) for rank, w in enumerate(workers)]
    print("\n".join(ray.get(joined)))
    return workers


def train(name: str, workers: list[Any], data: torch.Tensor) -> torch.Tensor:
    """One step on a shard per worker; the gradient, which all of them must have."""
    shards = data.chunk(len(workers))
    outputs = [w.train_step.remote(shard) for w, shard in zip(workers, shards, strict=True)]
    return check_synchronised(name, ray.get(outputs))


def main(arguments: Sequence[str] | None = None) -> int:
    strategy = chosen_strategy(__doc__, arguments)
    on_gpu = connect(processes=2 * PER_GROUP)
    bundle = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
    group = placement_group([bundle] * 2 * PER_GROUP, strategy=strategy)
    workers: list[Any] = []
    try:
        if not group.wait(60):
            print(f"the cluster has no room for {2 * PER_GROUP} bundles of {bundle}: {strategy}")
            return 1
        for i, model_class in enumerate(MODELS):
            workers += start_group(group, i * PER_GROUP, model_class, on_gpu)
        gradients = [
            train(model_class.__name__, workers[i * PER_GROUP :][:PER_GROUP], data)
            for i, (model_class, data) in enumerate(zip(MODELS, make_data(), strict=True))
        ]
        check_different(*gradients)
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
