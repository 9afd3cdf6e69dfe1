"""The driver: one PPO or GRPO step as calls on the roles' groups. What the roles do in their
processes is in `workers`; what is kept on disk in `records`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from examples.ppo.core_algos import (
    gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    penalized_rewards,
    token_weights,
    whiten,
)
from examples.ppo.settings import Settings
from examples.ppo.task import CharTokenizer, Tokenizer, make_prompts
from examples.ppo.workers import Actor, Critic, Reference, Reward, Rollout
from protocol import DataProto, DataProtoFuture
from single_controller.base import PerRank, Worker
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
    pin,
)

__all__ = [
    "READS",
    "Roles",
    "Seconds",
    "advantages",
    "make_batch",
    "make_tokenizer",
    "mini_batches",
    "started",
    "train_step",
]

Roles = Mapping[str, RayWorkerGroup]
B = TypeVar("B", DataProto, DataProtoFuture)

_TOKENS = ["prompts", "prompt_mask", "responses"]
READS = {
    "reference": _TOKENS,
    "reward": ["responses", "response_mask", "targets"],
    "values": _TOKENS,
    "critic": [*_TOKENS, "weights", "returns"],
    "actor": [*_TOKENS, "weights", "log_probs", "ref_log_probs", "advantages"],
    "driver": ["response_mask", "log_probs"],
}
"""The columns that are read: in a phase, by a role that learns, by the driver."""


def make_tokenizer(settings: Settings) -> Tokenizer:
    """The model's own tokenizer, or one of characters for a model made on the spot."""
    if not settings.model:
        return CharTokenizer()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


@contextlib.contextmanager
def started(settings: Settings, tokenizer: Tokenizer) -> Iterator[Roles]:
    """The groups of all roles by name, in one process per rank or in one for each role; and that
    of the rollout, if it has processes of its own.
    """
    classes: dict[str, type[Worker]] = {"actor": Actor, "reference": Reference, "reward": Reward}
    if settings.algorithm == "ppo":  # GRPO has no value function
        classes["critic"] = Critic
    specs = {role: RayClassWithInitArgs(cls, settings, tokenizer) for role, cls in classes.items()}
    with contextlib.ExitStack() as stack:

        def pool(processes: int) -> RayResourcePool:
            return stack.enter_context(
                RayResourcePool([processes], use_gpu=settings.device != "cpu")
            )

        trainers = pool(settings.ranks)
        if settings.placement == "separate":
            yield {
                role: stack.enter_context(RayWorkerGroup(trainers, spec))
                for role, spec in specs.items()
            }
            return
        roles = dict(stack.enter_context(colocate(trainers, **specs)).roles)
        if settings.placement == "rollout":
            spec = RayClassWithInitArgs(Rollout, settings, tokenizer)
            own = pool(settings.processes_of_rollout)
            roles["rollout"] = stack.enter_context(RayWorkerGroup(own, spec))
        yield roles


def hand_over(settings: Settings, actor: RayWorkerGroup, rollout: RayWorkerGroup) -> None:
    """Give the rollout the actor's weights; the driver has only handles of them."""
    weights = actor.weights()  # one handle for each rank of the actor
    if settings.shard == "fsdp2":  # each has some rows, so all go to each rank of the rollout
        rollout.load(*weights)
    else:  # each has all, so every rank of the rollout takes one, and not all the same
        replicas = [weights[i % len(weights)] for i in range(rollout.world_size)]
        rollout.load(PerRank(replicas))


Interval = tuple[float, float]


class Seconds:
    """Where a step's time went: when each phase was at work on each rank that trains, and what
    was done while none of these works, by the driver or the rollout.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.worked: dict[str, list[Interval]] = {}  # of each phase, by rank
        self.others: dict[str, float] = {}

    @contextlib.contextmanager
    def alone(self, phase: str) -> Iterator[None]:
        """What the driver does, or waits for, while no rank that trains works."""
        began = time.perf_counter()
        yield
        self.others[phase] = self.others.get(phase, 0.0) + time.perf_counter() - began

    def batch(self, phase: str, batch: DataProto, of_rollout: bool = False) -> DataProto:
        """Note when the ranks worked on it: those that train, or those of the rollout."""
        worked = batch.meta_info.pop("metrics")["worked"]
        intervals = worked if isinstance(worked, list) else [worked]  # of one rank
        if of_rollout:
            self.others[phase] = max(ended - began for began, ended in intervals)
        else:
            self.worked[phase] = intervals
        return batch

    def metrics(self, phase: str, shares: list[dict[str, Any]]) -> dict[str, float]:
        """What the ranks' shares add up to."""
        self.worked[phase] = [share.pop("worked") for share in shares]
        return {key: sum(share[key] for share in shares) for key in shares[0]}

    def summary(self) -> dict[str, float]:
        """Seconds by phase, of the slowest rank; "driver" is the algorithm's own work there;
        "weights", from the call to the answer, their way to the rollout; "controller" is what is
        left: dispatch, messages, waits for other ranks, collect. All of them add up to "step".
        """
        total = time.perf_counter() - self.began
        by_rank = [
            apart(dict(zip(self.worked, of_rank, strict=True)))
            for of_rank in zip(*self.worked.values(), strict=True)
        ]
        phases = max(by_rank, key=lambda seconds: sum(seconds.values()))
        spent = {**phases, **self.others}
        return {**spent, "controller": total - sum(spent.values()), "step": total}


def apart(worked: Mapping[str, Interval]) -> dict[str, float]:
    """Each phase's seconds. Where phases overlap, as those of roles in processes of their own, the
    time is that of the phase which began first.
    """
    seconds, until = dict.fromkeys(worked, 0.0), -math.inf
    for phase, (began, ended) in sorted(worked.items(), key=lambda item: item[1]):
        seconds[phase] = max(0.0, ended - max(began, until))
        until = max(until, ended)
    return seconds


def make_batch(settings: Settings, tokenizer: Tokenizer, step: int) -> DataProto:
    """The prompts of a step, with the noise that their answers are drawn with.

    Both depend on seed and step alone, so that a resumed run sees what it would have seen.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    prompts = make_prompts(settings.task, tokenizer, settings.prompts, settings.digits, generator)
    noise = torch.rand(settings.rows, settings.answer_tokens, generator=generator)
    # Shuffled before anyone answers, so that consecutive rows make a mini-batch in every pass:
    # answers need not come to the driver to be put into one.
    groups = torch.randperm(settings.rows, generator=generator) % settings.prompts
    extra = DataProto.from_dict({"noise": noise, "groups": groups})
    return prompts.select_idxs(groups).union(extra)


def advantages(settings: Settings, batch: DataProto) -> DataProto:
    """advantages, weights in mini-batches, and for PPO returns, of each token: (rows, tokens)."""
    columns, mask = batch.batch, batch.batch["response_mask"].float()
    parts = [token_weights(part, settings.algorithm) for part in mask.split(settings.mini_batch)]
    found = {"weights": torch.cat(parts)}
    if settings.algorithm == "grpo":
        scores = columns["rewards"].sum(1)
        of_rows = group_advantages(scores, columns["groups"])
        return DataProto.from_dict({**found, "advantages": of_rows.unsqueeze(1) * mask})
    rewards = penalized_rewards(
        columns["rewards"], columns["log_probs"], columns["ref_log_probs"], settings.kl
    )
    estimates, returns = gae(rewards, columns["values"], mask, settings.gamma, settings.lam)
    return DataProto.from_dict({**found, "advantages": whiten(estimates, mask), "returns": returns})


def mini_batches(settings: Settings, batch: B, step: int) -> list[B]:
    """A step's rows, cut into mini-batches, the last with what is left; each pass has an order of
    its own.
    """
    rows, size = settings.rows, settings.mini_batch
    minis = [batch.slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    passes = [torch.randperm(len(minis), generator=generator) for _ in range(settings.epochs)]
    return [minis[i] for i in torch.cat(passes).tolist()]


def driver_bytes(roles: Roles) -> int:
    """Bytes that came to the driver or left it so far, but for what it has pinned."""
    return sum(group.stats().driver_bytes for group in roles.values())


def train_step(settings: Settings, roles: Roles, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """One step of the algorithm; returns its metrics.

    Prompts and answers stay with the ranks that answer: `batch` is a future, of which each role
    is sent the columns that it reads, and the driver what it computes with. A rollout of its own
    answers with the weights that the actor has now.
    """
    seconds, bytes_before = Seconds(), driver_bytes(roles)
    with seconds.alone("driver"):
        prompts = make_batch(settings, tokenizer, step)
    of_rollout = "rollout" in roles
    if of_rollout:
        with seconds.alone("weights"):
            hand_over(settings, roles["actor"], roles["rollout"])
    batch = roles["rollout" if of_rollout else "actor"].generate(prompts)
    seen = seconds.batch("generate", batch.select(READS["driver"]).get(), of_rollout)

    # None of these needs another's result: all are on their way before the first is waited for.
    calls = {"reference": roles["reference"].log_probs, "reward": roles["reward"].score}
    if "critic" in roles:
        calls["values"] = roles["critic"].values
    parts = {phase: call.submit(batch.select(READS[phase])) for phase, call in calls.items()}
    for phase, future in parts.items():
        seen = seen.union(seconds.batch(phase, future.result()))

    with seconds.alone("driver"):
        found = advantages(settings, seen.union(prompts.select(["groups"])))
        found = found.union(seen.select(["ref_log_probs"]))

    # One call takes all mini-batches, each of them split by rows over the ranks.
    batch = batch.union(pin(found))
    updates = {
        role: roles[role].update.submit(*mini_batches(settings, batch.select(READS[role]), step))
        for role in ("critic", "actor")
        if role in roles
    }
    learned = {
        role: seconds.metrics(f"update {role}", future.result()) for role, future in updates.items()
    }

    with seconds.alone("driver"):
        columns, mask = seen.batch, seen.batch["response_mask"]
        kl = kl_estimate(columns["log_probs"], columns["ref_log_probs"])
        metrics = {
            "step": step,
            "reward": float(columns["rewards"].sum(1).mean()),
            "kl": float(masked_mean(kl, mask)),
            "response_length": float(mask.sum(1).float().mean()),
        }
    for role, shares in learned.items():
        metrics.update({f"{role}/{key}": value for key, value in shares.items()})
    metrics["driver_bytes"] = driver_bytes(roles) - bytes_before + found.batch.bytes()
    spent = seconds.summary()
    metrics["tokens_per_second"] = int(mask.sum()) / spent["step"]
    return {**metrics, "seconds": spent}
