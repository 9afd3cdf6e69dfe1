"""An actor and a critic in one process per device, each called as a group from this driver.

Run it with `make demo`, or: python examples/colocated_actor_critic.py --ranks 4 --uneven
It starts Ray here, or uses the cluster at RAY_ADDRESS.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

import ray
import torch

from protocol import DataProto
from single_controller import SingleControllerError
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)


def make_workers(uneven: bool) -> tuple[type[Worker], type[Worker]]:
    class Actor(Worker):
        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=uneven)
        def add(self, data: DataProto) -> DataProto:
            data.batch["a"] = data.batch["a"].to(self.device)
            data.batch["a"] += self.rank
            return data

    class Critic(Worker):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.config = config

        @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=uneven)
        def sub(self, data: DataProto) -> DataProto:
            data.batch["a"] = data.batch["a"].to(self.device)
            data.batch["a"] -= self.config["b"]
            return data

    return Actor, Critic


def share_of_a_gpu(ranks: int) -> float:
    """1, or what lets all ranks share the one GPU that a development machine may have."""
    return math.floor(1000 / ranks) / 1000 if ray.cluster_resources().get("GPU") == 1 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--rows", type=int, default=10, help="rows of the batch (default 10)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: GPUs if the cluster has any, else CPU"
    )
    parser.add_argument(
        "--uneven", action="store_true", help="let shards differ by a row, so any rows fit"
    )
    args = parser.parse_args()
    if args.ranks < 1:
        parser.error(f"--ranks must be at least 1; got {args.ranks}")

    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="ERROR")
    else:
        logical_cpus = max(args.ranks, os.cpu_count() or 1)
        ray.init("local", num_cpus=logical_cpus, include_dashboard=False, logging_level="ERROR")
    actor_class, critic_class = make_workers(args.uneven)
    roles = {
        "actor": RayClassWithInitArgs(cls=actor_class),
        "critic": RayClassWithInitArgs(cls=critic_class, config={"b": 10}),
    }
    pool = RayResourcePool(
        process_on_nodes=[args.ranks],
        use_gpu=args.device != "cpu",
        gpus_per_process=share_of_a_gpu(args.ranks),
    )
    data = DataProto.from_dict({"a": torch.zeros(args.rows)})
    try:
        with (
            pool,
            RayWorkerGroup(
                pool, create_colocated_worker_cls(roles), device_name=args.device
            ) as hosts,
        ):
            device = pool.device(args.device).name
            shared = device != "cpu" and pool.gpus_per_process < 1
            note = f", {args.ranks} ranks on one device" if shared else ""
            print(f"running on {device}{note}\n\n{hosts.describe()}\n")
            group = hosts.spawn(prefix_set=roles.keys())
            print("actor.add: ", group["actor"].add(data).batch["a"].int().tolist())
            print("critic.sub:", group["critic"].sub(data).batch["a"].int().tolist())
    except SingleControllerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
