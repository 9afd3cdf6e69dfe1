"""The driver: one PPO or GRPO step as calls on the roles' groups. What the roles do in their
processes is in `workers`; what is kept on disk in `records`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

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
from examples.ppo.workers import Actor, Critic, Reference, Reward
from protocol import DataProto
from single_controller.base import Worker
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
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

_ANSWERED = ["prompts", "prompt_mask", "responses", "response_mask"]
READS = {
    "reward": [*_ANSWERED, "targets"],
    "critic": [*_ANSWERED, "weights", "returns"],
    "actor": [*_ANSWERED, "weights", "log_probs", "ref_log_probs", "advantages"],
}
"""The columns that a role is sent."""


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
    """The groups of all roles by name, in one process per rank or in one for each role."""
    classes: dict[str, type[Worker]] = {"actor": Actor, "reference": Reference, "reward": Reward}
    if settings.algorithm == "ppo":  # GRPO has no value function
        classes["critic"] = Critic
    specs = {role: RayClassWithInitArgs(cls, settings, tokenizer) for role, cls in classes.items()}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            RayResourcePool([settings.ranks], use_gpu=settings.device != "cpu")
        )
        if settings.placement == "colocated":
            yield stack.enter_context(colocate(pool, **specs)).roles
        else:
            yield {
                role: stack.enter_context(RayWorkerGroup(pool, spec))
                for role, spec in specs.items()
            }


Interval = tuple[float, float]


class Seconds:
    """Where a step's time went: when each phase was at work on each rank, and the driver alone."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.worked: dict[str, list[Interval]] = {}  # of each phase, by rank
        self.in_driver = 0.0

    @contextlib.contextmanager
    def driver(self) -> Iterator[None]:
        """The algorithm's own work in the driver, while no rank works."""
        began = time.perf_counter()
        yield
        self.in_driver += time.perf_counter() - began

    def batch(self, phase: str, batch: DataProto) -> DataProto:
        self.worked[phase] = batch.meta_info.pop("metrics")["worked"]
        return batch

    def metrics(self, phase: str, shares: list[dict[str, Any]]) -> dict[str, float]:
        """What the ranks' shares add up to."""
        self.worked[phase] = [share.pop("worked") for share in shares]
        return {key: sum(share[key] for share in shares) for key in shares[0]}

    def summary(self) -> dict[str, float]:
        """Seconds by phase, of the slowest rank; "driver" is the algorithm's own work there;
        "controller" is what is left: dispatch, messages, waits for other ranks, collect. All of
        them add up to "step".
        """
        total = time.perf_counter() - self.began
        by_rank = [
            apart(dict(zip(self.worked, of_rank, strict=True)))
            for of_rank in zip(*self.worked.values(), strict=True)
        ]
        phases = max(by_rank, key=lambda seconds: sum(seconds.values()))
        left = total - sum(phases.values()) - self.in_driver
        return {**phases, "driver": self.in_driver, "controller": left, "step": total}


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
    prompts = make_prompts(
        settings.task, tokenizer, settings.prompts, settings.digits, generator
    ).repeat(settings.answers, interleave=True)
    noise = torch.rand(settings.rows, settings.answer_tokens, generator=generator)
    groups = torch.arange(settings.prompts).repeat_interleave(settings.answers)
    extra = {"noise": noise, "groups": groups}
    return prompts.union(DataProto.from_dict(extra, meta_info={"rows": settings.rows}))


def advantages(settings: Settings, batch: DataProto) -> DataProto:
    """advantages, and for PPO returns, of each token: (rows, tokens)."""
    columns, mask = batch.batch, batch.batch["response_mask"].float()
    if settings.algorithm == "grpo":
        scores = columns["rewards"].sum(1)
        of_rows = group_advantages(scores, columns["groups"])
        return DataProto.from_dict({"advantages": of_rows.unsqueeze(1) * mask})
    rewards = penalized_rewards(
        columns["rewards"], columns["log_probs"], columns["ref_log_probs"], settings.kl
    )
    estimates, returns = gae(rewards, columns["values"], mask, settings.gamma, settings.lam)
    return DataProto.from_dict({"advantages": whiten(estimates, mask), "returns": returns})


def mini_batches(settings: Settings, batch: DataProto, step: int) -> Iterator[DataProto]:
    """Shuffled mini-batches, the last of a pass with what is left, with their tokens' weights."""
    for mini in batch.make_iterator(
        settings.mini_batch,
        settings.epochs,
        seed=settings.seed * 1_000_003 + step,
        dataloader_kwargs={"shuffle": True, "drop_last": False},
    ):
        mini.batch["weights"] = token_weights(mini.batch["response_mask"], settings.algorithm)
        mini.meta_info["rows"] = len(mini)
        yield mini


def train_step(settings: Settings, roles: Roles, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """One step of the algorithm; returns its metrics."""
    seconds = Seconds()
    with seconds.driver():
        prompts = make_batch(settings, tokenizer, step)
    batch = prompts.union(seconds.batch("generate", roles["actor"].generate(prompts)))

    # None of these needs another's result: all are on their way before the first is waited for.
    answered = batch.select(READS["reward"])
    parts = {
        "reference": roles["reference"].log_probs.submit(answered),
        "reward": roles["reward"].score.submit(answered),
    }
    if "critic" in roles:
        parts["values"] = roles["critic"].values.submit(answered)
    for phase, future in parts.items():
        batch = batch.union(seconds.batch(phase, future.result()))

    with seconds.driver():
        batch = batch.union(advantages(settings, batch))
        minis = list(mini_batches(settings, batch, step))

    # One call takes all mini-batches, each of them split by rows over the ranks.
    updates = {
        role: roles[role].update.submit(*(mini.select(READS[role]) for mini in minis))
        for role in ("critic", "actor")
        if role in roles
    }
    learned = {
        role: seconds.metrics(f"update {role}", future.result()) for role, future in updates.items()
    }

    with seconds.driver():
        columns, mask = batch.batch, batch.batch["response_mask"]
        kl = kl_estimate(columns["log_probs"], columns["ref_log_probs"])
        metrics = {
            "step": step,
            "reward": float(columns["rewards"].sum(1).mean()),
            "kl": float(masked_mean(kl, mask)),
            "response_length": float(mask.sum(1).float().mean()),
        }
    for role, shares in learned.items():
        metrics.update({f"{role}/{key}": value for key, value in shares.items()})
    spent = seconds.summary()
    metrics["tokens_per_second"] = int(mask.sum()) / spent["step"]
    return {**metrics, "seconds": spent}
