"""Rollout of step n+1 while step n trains: two groups, a future between them, and what it gains.

Each group is one process of one thread. The same GRPO steps are run twice, first waiting for each
call and then with the next rollout under way during training, so that its answers come from a
policy one step older, which the ratio of the PPO loss accounts for.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from examples.cluster import connect
from examples.ppo.settings import Settings
from examples.ppo.task import CharTokenizer, position_rewards
from examples.ppo.train import READS, advantages, make_batch, mini_batches
from examples.ppo.workers import Actor
from protocol import DataProto
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

Span = tuple[float, float]
SETTINGS = Settings(
    algorithm="grpo", prompts=32, answers=8, digits=8, response_length=24, epochs=1, ranks=1
)


class Rollout(Actor):
    """Answers prompts with the parameters it was last given."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take(self, parameters: dict[str, torch.Tensor]) -> None:
        """Go on with other parameters."""
        self.trained.bare.load_state_dict(parameters)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    def roll_out(self, prompts: DataProto) -> DataProto:
        """The prompts with answers, rewards and advantages; and when it was at work."""
        began = time.time()
        batch = prompts.union(self.generate(prompts).select(meta_info_keys=[]))
        rewards = position_rewards(batch.batch["responses"], batch.batch["targets"])
        rewards = rewards * batch.batch["response_mask"]
        # The rollout is its own reference here: KL is 0 at the first update of each step.
        ref = batch.batch["log_probs"].clone()
        batch = batch.union(DataProto.from_dict({"rewards": rewards, "ref_log_probs": ref}))
        batch = batch.union(advantages(self.settings, batch))
        batch.meta_info["metrics"] = {"span": (began, time.time())}
        return batch


class Learner(Actor):
    """Trains, and says what came of it."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def learn(self, batch: DataProto) -> tuple[Span, dict[str, torch.Tensor]]:
        """An update per mini-batch; when it was at work, and the new parameters."""
        began = time.time()
        self.update(*mini_batches(self.settings, batch.select(READS["actor"]), step=0))
        return (began, time.time()), self.parameters()


def run(rollout: RayWorkerGroup, learner: RayWorkerGroup, steps: int, overlap: bool) -> Any:
    """`steps` steps; the spans of both roles, and the mean reward of each step."""
    spans: dict[str, list[Span]] = {"rollout": [], "training": []}
    rewards = []
    tokenizer = CharTokenizer()
    coming = rollout.roll_out.submit(make_batch(SETTINGS, tokenizer, 0))
    taken = None
    for step in range(steps):
        batch = coming.result()
        if taken is not None:
            taken.result()  # done by now, or failed
        more = step + 1 < steps
        if more and overlap:
            coming = rollout.roll_out.submit(make_batch(SETTINGS, tokenizer, step + 1))
        spans["rollout"] += batch.meta_info.pop("metrics")["span"]
        rewards.append(float(batch.batch["rewards"].sum(1).mean()))
        [(span, parameters)] = learner.learn(batch)
        spans["training"].append(span)
        taken = rollout.take.submit(parameters)  # behind the rollout under way, before the next
        if more and not overlap:
            coming = rollout.roll_out.submit(make_batch(SETTINGS, tokenizer, step + 1))
    if taken is not None:
        taken.result()
    return spans, rewards


def seconds(spans: dict[str, list[Span]]) -> float:
    """From the first moment of work to the last."""
    every = [moment for all_ in spans.values() for span in all_ for moment in span]
    return max(every) - min(every)


def timeline(spans: Sequence[Span], start: float, scale: float, width: int = 72) -> str:
    """A line with a block where a role was at work, in turns of two shades."""
    line = [" "] * width
    for i, (began, ended) in enumerate(spans):
        for at in range(int((began - start) / scale), int((ended - start) / scale) + 1):
            line[min(at, width - 1)] = "█▒"[i % 2]
    return "".join(line)


def show(runs: dict[str, Any], picture: str) -> None:
    """Both timelines on one scale, as text and, if asked for, as a PNG."""
    scale = max(seconds(spans) for spans, _ in runs.values()) / 72
    for name, (spans, rewards) in runs.items():
        start = min(began for all_ in spans.values() for began, _ in all_)
        print(f"{name}: {seconds(spans):.2f} s, reward {rewards[0]:.2f} → {rewards[-1]:.2f}")
        for role, all_ in spans.items():
            print(f"  {role:<9}|{timeline(all_, start, scale)}|")
    if picture:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for axis, (name, (spans, _)) in zip(axes, runs.items(), strict=True):
            start = min(began for all_ in spans.values() for began, _ in all_)
            for row, all_ in enumerate(spans.values()):
                bars = [(began - start, ended - began) for began, ended in all_]
                axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=[f"C{row}"], edgecolor="w")
            axis.set(yticks=[0, 1], yticklabels=list(spans), title=name, ylim=(1.6, -0.6))
        axes[1].set_xlabel("seconds")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="of each run (default 12)")
    parser.add_argument("--picture", default="", help="also draw the timelines into this PNG")
    args = parser.parse_args(arguments)
    connect(processes=2)
    settings = dataclasses.replace(SETTINGS, threads=1)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 2 else 0.5
    pools = [RayResourcePool([1], gpus_per_process=gpus) for _ in range(2)]
    runs = {}
    with (
        pools[0],
        pools[1],
        RayWorkerGroup(pools[0], RayClassWithInitArgs(Rollout, settings, CharTokenizer())) as first,
        RayWorkerGroup(
            pools[1], RayClassWithInitArgs(Learner, settings, CharTokenizer())
        ) as second,
    ):
        run(first, second, 1, overlap=False)  # warms up
        for name, overlap in (("blocking", False), ("pipelined", True)):
            runs[name] = run(first, second, args.steps, overlap)
    show(runs, args.picture)
    gain = seconds(runs["blocking"][0]) / seconds(runs["pipelined"][0])
    print(f"pipelined is {gain:.2f} × as fast")


if __name__ == "__main__":
    main()
