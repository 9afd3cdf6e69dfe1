"""What a run is told, as one value; and the command line that it is read from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["Settings"]

GRPO = {"prompts": 64, "answers": 8, "digits": 3, "steps": 200, "entropy": 0.0}
"""Defaults that differ: without a value function, longer answers take longer to learn."""

PRESETS = {
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 4},
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "vocab_size": 151936,
    },
}


def _option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes, and where it runs."""

    algorithm: str = _option(
        "ppo",
        "how advantages are estimated; grpo also changes defaults: "
        + ", ".join(f"{key} {value}" for key, value in GRPO.items()),
        ["ppo", "grpo"],
    )
    task: str = _option("sort", "what to do with the digits", ["copy", "reverse", "sort"])
    digits: int = _option(4, "most digits in a prompt; each has at least two")
    steps: int = _option(100, "PPO steps in all")
    prompts: int = _option(768, "prompts per step; with grpo, of `answers` rows each")
    answers: int = _option(1, "answers to each prompt; grpo needs two or more")
    seed: int = _option(0, "of weights, prompts and sampling")

    ranks: int = _option(2, "processes that train, each with one device")
    rollout_ranks: int = _option(0, "with placement rollout, those that generate; 0: as many")
    device: str = _option("", "cuda or cpu; default: GPUs if the cluster has any")
    shard: str = _option("ddp", "replicas, or parameters cut over the ranks", ["ddp", "fsdp2"])
    placement: str = _option(
        "colocated",
        "roles in one process per rank; each in its own; or generation on devices of its own, with "
        "a copy of the weights that the actor hands over in each step",
        ["colocated", "separate", "rollout"],
    )
    threads: int = _option(0, "CPU threads of a process; 0: the node's cores over its ranks")
    precision: str = _option(
        "",
        "of matrix products; default: bfloat16, on a CPU float32",
        ["bfloat16", "float32"],
    )
    micro_rows: int = _option(0, "most rows in one forward and backward pass; 0: all")

    model: str = _option("", "a Hugging Face name or path; default: random weights, sizes below")
    hidden_size: int = _option(64, "width of the model")
    intermediate_size: int = _option(0, "width inside its MLPs; 0: four times the width")
    layers: int = _option(2, "its layers")
    heads: int = _option(4, "its attention heads")
    kv_heads: int = _option(0, "heads of keys and values; 0: as many")
    vocab_size: int = _option(0, "its vocabulary; 0: as the tokenizer's")

    response_length: int = _option(0, "most tokens of an answer; 0: the right answer's")
    temperature: float = _option(1.0, "of sampling")
    epochs: int = _option(2, "passes over a step's rows")
    mini_batch: int = _option(128, "rows per update; the last one may be smaller")
    actor_lr: float = _option(1e-3, "learning rate of the actor")
    critic_lr: float = _option(1e-3, "learning rate of the critic")
    max_grad_norm: float = _option(1.0, "where gradients are clipped")
    clip: float = _option(0.2, "how far a ratio may leave 1")
    entropy: float = _option(0.01, "weight of the entropy bonus")
    kl: float = _option(0.001, "weight of the KL penalty")
    gamma: float = _option(1.0, "discount")
    lam: float = _option(0.5, "lambda of GAE")

    output: str = _option("runs/ppo", "folder for metrics.jsonl, progress.png and checkpoints")
    save_every: int = _option(50, "steps between checkpoints; the last step has one too")
    resume: bool = _option(False, "go on from the newest checkpoint in the output folder")

    def __post_init__(self) -> None:
        for name in ("digits", "steps", "prompts", "answers", "ranks", "mini_batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.rollout_ranks < 0 or (self.rollout_ranks and self.placement != "rollout"):
            raise ValueError(
                "rollout_ranks must be at least 0, and 0 unless placement is rollout; "
                f"got {self.rollout_ranks}, placement {self.placement}"
            )
        if self.algorithm == "grpo" and self.answers < 2:
            raise ValueError(
                "grpo compares answers to one prompt, so answers must be at least 2; "
                f"got {self.answers}"
            )

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> Settings:
        """The settings that a command line asks for; ends the program where it is wrong."""
        parser = argparse.ArgumentParser(
            prog="python -m examples.ppo",
            description="A small language model learns a rule by reinforcement alone.",
        )
        parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the model")
        for one in fields(cls):
            text = one.metadata["help"]
            flag = f"--{one.name.replace('_', '-')}"
            if one.name == "resume":
                parser.add_argument(flag, action="store_true", help=text)
            else:
                parser.add_argument(
                    flag,
                    type=type(one.default),
                    default=one.default,
                    choices=one.metadata["choices"],
                    help=f"{text} (default {one.default})" if one.default else text,
                )
        chosen, _ = parser.parse_known_args(arguments)
        parser.set_defaults(**PRESETS[chosen.preset])
        if chosen.algorithm == "grpo":
            parser.set_defaults(**GRPO)
        values = vars(parser.parse_args(arguments))
        del values["preset"]
        try:
            return cls(**values)
        except ValueError as error:
            parser.error(str(error))

    @property
    def rows(self) -> int:
        """Rows of a step's batch."""
        return self.prompts * self.answers

    @property
    def processes_of_rollout(self) -> int:
        """Processes that do nothing but generate."""
        return (self.rollout_ranks or self.ranks) if self.placement == "rollout" else 0

    @property
    def answer_tokens(self) -> int:
        """Tokens that an answer may have."""
        return self.response_length or self.digits + 1
