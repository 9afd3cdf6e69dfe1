"""Two models on two groups of workers: the job of `examples.native_ray_groups`, in this framework.

Run it from the project's folder with: python -m examples.two_groups --strategy SPREAD
"""

import argparse
from collections.abc import Sequence

import ray
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.cluster import connect
from examples.two_models import MLP, Attention, check_different, check_synchronised, make_data
from single_controller import Worker
from single_controller.base.decorator import register
from single_controller.device import device_kind
from single_controller.ray import RayClassWithInitArgs as Spec
from single_controller.ray import RayResourcePool, RayWorkerGroup, split_resource_pool


class ModelWorker(Worker):
    def __init__(self, model: type[torch.nn.Module]) -> None:
        dist.init_process_group(device_kind(self.device.type).backend)
        torch.manual_seed(self.rank)  # the replicas become equal because DDP makes them
        self.model = DistributedDataParallel(model().to(self.device))

    @register()
    def train_step(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        loss = self.model(x.to(self.device)).square().mean()
        loss.backward()
        return loss.item(), next(self.model.parameters()).grad.cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=["PACK", "SPREAD", "STRICT_PACK"], default="PACK")
    strategy = parser.parse_args(arguments).strategy
    connect(processes=4)
    with RayResourcePool([4], use_gpu=ray.cluster_resources().get("GPU", 0) >= 4) as pool:
        pool.get_placement_groups(strategy)
        halves = split_resource_pool(pool, 2)
        models = (Attention, MLP)
        groups = [
            RayWorkerGroup(p, Spec(ModelWorker, m)) for p, m in zip(halves, models, strict=True)
        ]
        gradients = []
        for group, model, data in zip(groups, models, make_data(), strict=True):
            print(group.describe())
            losses, ranks_gradients = zip(*group.train_step(list(data.chunk(2))), strict=True)
            gradients.append(check_synchronised(model.__name__, losses, ranks_gradients))
        check_different(*gradients)


if __name__ == "__main__":
    main()
