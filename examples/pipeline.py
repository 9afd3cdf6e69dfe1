"""Rollout of step n+1 while step n trains: two groups, what goes between them, and what it gains.

Each group is one process of one thread. GRPO steps are run in turns of two kinds: waiting for each
call, and with the next rollout under way during training, so that its answers come from a policy
one step older, which the ratio of the PPO loss accounts for. Answers go from one group to the
other, and weights back, without coming to the driver. Medians are compared, over all turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

import ray

from examples.cluster import connect
from examples.ppo import workers
from examples.ppo.settings import Settings
from examples.ppo.task import CharTokenizer, position_rewards
from examples.ppo.train import READS, advantages, make_batch, mini_batches
from examples.timelines import Run, Span, seconds, show
from protocol import DataProto
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

SETTINGS = Settings(
    algorithm="grpo", prompts=32, answers=8, digits=8, response_length=24, epochs=1, ranks=1
)


class Rollout(workers.Rollout):
    """Answers prompts with the weights it was last given, and says what the answers are worth."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True, blocking=False)
    def roll_out(self, prompts: DataProto) -> DataProto:
        """The prompts with answers, rewards and advantages; and when it was at work."""
        began = time.time()
        batch = self.generate(prompts).select(meta_info_keys=[])
        rewards = position_rewards(batch.batch["responses"], batch.batch["targets"])
        rewards = rewards * batch.batch["response_mask"]
        # The rollout is its own reference here: KL is 0 at the first update of each step.
        ref = batch.batch["log_probs"].clone()
        batch = batch.union(DataProto.from_dict({"rewards": rewards, "ref_log_probs": ref}))
        batch = batch.union(advantages(self.settings, batch))
        batch.meta_info["metrics"] = {"span": (began, time.time())}
        return batch


class Learner(workers.Actor):
    """Trains."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def learn(self, batch: DataProto) -> Span:
        """An update per mini-batch; when it was at work."""
        began = time.time()
        self.update(*mini_batches(self.settings, batch, step=0))
        return began, time.time()


def run(rollout: RayWorkerGroup, learner: RayWorkerGroup, steps: int, overlap: bool) -> Run:
    """`steps` steps; the spans of both roles, and the mean reward of each step."""
    spans: dict[str, list[Span]] = {"rollout": [], "training": []}
    rewards = []
    tokenizer = CharTokenizer()
    batch = rollout.roll_out(make_batch(SETTINGS, tokenizer, 0))
    taken = None
    for step in range(steps):
        seen = batch.select(["rewards"]).get()
        if taken is not None:
            taken.result()  # the rollout has the weights, so they may change
        spans["rollout"].append(seen.meta_info["metrics"]["span"])
        rewards.append(float(seen.batch["rewards"].sum(1).mean()))
        learned = learner.learn.submit(batch.select(READS["actor"]))
        more = step + 1 < steps
        if more and overlap:
            batch = rollout.roll_out(make_batch(SETTINGS, tokenizer, step + 1))
        spans["training"] += learned.result()
        # Behind the rollout under way, before the next. The driver has a handle, and no weights.
        taken = rollout.load.submit(*learner.weights())
        if more and not overlap:
            batch = rollout.roll_out(make_batch(SETTINGS, tokenizer, step + 1))
    if taken is not None:
        taken.result()
    return spans, rewards


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="of each turn (default 8)")
    parser.add_argument("--turns", type=int, default=3, help="of each kind (default 3)")
    parser.add_argument("--picture", default="", help="also draw the timelines into this PNG")
    args = parser.parse_args(arguments)
    connect(processes=2)
    settings = dataclasses.replace(SETTINGS, threads=1)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 2 else 0.5
    pools = [RayResourcePool([1], gpus_per_process=gpus) for _ in range(2)]
    runs: dict[str, list[Run]] = {"blocking": [], "pipelined": []}
    with (
        pools[0],
        pools[1],
        RayWorkerGroup(pools[0], RayClassWithInitArgs(Rollout, settings, CharTokenizer())) as first,
        RayWorkerGroup(
            pools[1], RayClassWithInitArgs(Learner, settings, CharTokenizer())
        ) as second,
    ):
        run(first, second, 1, overlap=False)  # warms up
        for _ in range(args.turns):
            for name, turns in runs.items():
                turns.append(run(first, second, args.steps, overlap=name == "pipelined"))
    typical = {name: sorted(turns, key=seconds)[len(turns) // 2] for name, turns in runs.items()}
    show(typical, args.picture)
    gain = seconds(typical["blocking"]) / seconds(typical["pipelined"])
    print(f"pipelined is {gain:.2f} × as fast")


if __name__ == "__main__":
    main()
