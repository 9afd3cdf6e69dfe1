"""What is to be learned: prompts of digits, and a rule that any answer can be checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from protocol import DataProto

__all__ = ["RULES", "CharTokenizer", "Tokenizer", "make_prompts", "position_rewards"]

RULES: dict[str, Callable[[str], str]] = {
    "copy": lambda digits: digits,
    "reverse": lambda digits: digits[::-1],
    "sort": lambda digits: "".join(sorted(digits)),
}
"""What the answer to a prompt is, by the name of the task."""

NO_TOKEN = -1  # fills up targets; no token that a model can emit


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Hugging Face have it too."""

    pad_token_id: int
    eos_token_id: int

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, ids: Any) -> str: ...


class CharTokenizer:
    """One token per character: padding, the end, "=" and ten digits."""

    characters = "_$=0123456789"
    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(map(self.characters.index, text))

    def decode(self, ids: Any) -> str:
        return "".join(self.characters[i] for i in ids)


def make_prompts(
    task: str, tokenizer: Tokenizer, rows: int, digits: int, generator: torch.Generator
) -> DataProto:
    """Prompts such as "507=" with `digits` digits or fewer, at least two.

    Returns:
        prompts and prompt_mask (rows, longest prompt), filled up on the left; targets
        (rows, longest answer): the tokens of the right answer and the end, then -1.
    """
    lengths = torch.randint(min(2, digits), digits + 1, (rows,), generator=generator).tolist()
    numbers = torch.randint(10, (rows, digits), generator=generator).tolist()
    prompts, targets = [], []
    for length, row in zip(lengths, numbers, strict=True):
        text = "".join(map(str, row[:length]))
        prompts.append(tokenizer.encode(f"{text}=", add_special_tokens=False))
        answer = tokenizer.encode(RULES[task](text), add_special_tokens=False)
        targets.append([*answer, tokenizer.eos_token_id])
    width, longest = max(digits + 1, *map(len, prompts)), max(digits + 1, *map(len, targets))
    pad = tokenizer.pad_token_id
    return DataProto.from_dict(
        {
            "prompts": torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
            "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            "targets": torch.tensor([t + [NO_TOKEN] * (longest - len(t)) for t in targets]),
        }
    )


def position_rewards(responses: Tensor, targets: Tensor) -> Tensor:
    """1/n at each of the n positions of the right answer that holds the right token, so that a
    row's rewards sum to the fraction of positions that are right.

    Args:
        responses: (rows, tokens). targets: (rows, longest answer), -1 behind the answer.

    Returns:
        (rows, tokens), float32.
    """
    rewards = torch.zeros(responses.shape, device=responses.device)
    width = min(responses.shape[1], targets.shape[1])
    right = (responses[:, :width] == targets[:, :width]).float()
    rewards[:, :width] = right / (targets != NO_TOKEN).sum(1, keepdim=True).clamp(min=1)
    return rewards
