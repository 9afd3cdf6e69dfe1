"""The reward of an answer: how many of its words are near the one that was asked for."""

from __future__ import annotations

from typing import Any

__all__ = ["compute_score"]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, **_: Any
) -> dict[str, float]:
    """The fraction of words `w<number>` within 12 of the right one, which a few steps can move."""
    wanted, words = int(ground_truth[1:]), solution_str.split()
    numbers = [int(word[1:]) for word in words if word[:1] == "w" and word[1:].isdigit()]
    score = sum(abs(number - wanted) <= 12 for number in numbers) / max(1, len(words))
    return {"score": score, "acc": float(score > 0.25), "words": float(len(words))}
