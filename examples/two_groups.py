"""Two models on two groups of workers: the job of `native_ray_groups`, in this framework."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.cluster import chosen_strategy, connect
from examples.two_models import MODELS, check_different, check_synchronised, make_data
from single_controller import Worker
from single_controller.base.decorator import register
from single_controller.ray import RayClassWithInitArgs as Spec
from single_controller.ray import RayResourcePool, RayWorkerGroup, split_resource_pool


class ModelWorker(Worker):
    def __init__(self, model_class: type[torch.nn.Module]) -> None:
        dist.init_process_group()
        torch.manual_seed(self.rank)  # the replicas become equal because DDP makes them
        self.model = DistributedDataParallel(model_class().to(self.device))

    @register()
    def train_step(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        loss = self.model(x.to(self.device)).square().mean()
        loss.backward()
        return loss.item(), next(self.model.parameters()).grad.cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    strategy = chosen_strategy(__doc__, arguments)
    with RayResourcePool([4], use_gpu=connect(processes=4)) as pool:
        pool.get_placement_groups(strategy)
        groups, gradients = [], []
        halves = split_resource_pool(pool, 2)
        for half, model, data in zip(halves, MODELS, make_data(), strict=True):
            groups.append(RayWorkerGroup(half, Spec(ModelWorker, model)))
            print(groups[-1].describe())
            outputs = groups[-1].train_step(list(data.chunk(2)))
            gradients.append(check_synchronised(model.__name__, outputs))
        check_different(*gradients)


if __name__ == "__main__":
    main()
