"""Draw `one_call.png` anew: two calls, one after another, of a pair that shares two processes."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import ray
import torch

from protocol import DataProto
from single_controller import Worker, span, trace
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayResourcePool, colocate
from single_controller.timeline import Timeline


class Actor(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate(self, prompts: DataProto) -> DataProto:
        with span("forward"):
            threading.Event().wait(0.03)
        return prompts


class Critic(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto) -> DataProto:
        for name, seconds in (("forward", 0.01), ("backward", 0.02)):
            with span(name):
                threading.Event().wait(seconds)
        return batch


def main(path: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")  # type: ignore[arg-type]
    batch = DataProto.from_dict({"tokens": torch.zeros(1_000, 2_000)})
    file = Path(tempfile.mkdtemp()) / "trace.json"
    with (
        RayResourcePool([2], use_gpu=False) as pool,
        colocate(pool, actor=Actor, critic=Critic) as group,
    ):
        group.critic.update(group.actor.generate(batch))
        with trace(file):
            group.critic.update(group.actor.generate(batch))
    timeline = Timeline.read(file)
    print(timeline)
    timeline.draw(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
