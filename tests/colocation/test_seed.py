"""The seed's program as written there, but for the import prefix and the device."""

from __future__ import annotations

import ray
import torch

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray.base import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)


@ray.remote
class Actor(Worker):
    def __init__(self) -> None:
        super().__init__()

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto):
        data.batch["a"] = data.batch["a"].to("cpu")
        data.batch["a"] += self.rank
        return data


@ray.remote
class Critic(Worker):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    async def sub(self, data: DataProto):
        data.batch["a"] = data.batch["a"].to("cpu")
        data.batch["a"] -= self.config["b"]
        return data


def test_colocated_workers(cluster: None) -> None:
    data = DataProto.from_dict({"a": torch.zeros(10)})
    actor_cls = RayClassWithInitArgs(cls=Actor)
    critic_cls = RayClassWithInitArgs(cls=Critic, config={"b": 10})
    resource_pool = RayResourcePool(process_on_nodes=[2])
    cls_dict = {"actor": actor_cls, "critic": critic_cls}
    ray_cls_with_init = create_colocated_worker_cls(cls_dict)
    wg_dict = RayWorkerGroup(resource_pool=resource_pool, ray_cls_with_init=ray_cls_with_init)
    spawn_wg = wg_dict.spawn(prefix_set=cls_dict.keys())
    colocated_actor_wg = spawn_wg["actor"]
    colocated_critic_wg = spawn_wg["critic"]
    actor_output = colocated_actor_wg.add(data)
    critic_output = colocated_critic_wg.sub(data)
    assert actor_output.batch["a"].tolist() == [0] * 5 + [1] * 5
    assert critic_output.batch["a"].tolist() == [-10] * 10
    assert data.batch["a"].tolist() == [0] * 10
    wg_dict.close()
    resource_pool.close()
