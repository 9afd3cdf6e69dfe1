"""The formulas of PPO, GAE and GRPO as pure functions; where their inputs come from, and what is
done with a gradient, is left to others.

Tensors are (rows, tokens) over response tokens, unless it says otherwise; `mask` is 1 on tokens
that count, which are the first of each row, and 0 behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "clipped_policy_loss",
    "entropy_from_logits",
    "gae",
    "group_advantages",
    "kl_estimate",
    "masked_mean",
    "penalized_rewards",
    "token_weights",
    "value_loss",
    "whiten",
]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens that count; a scalar, 0 where none does."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def token_weights(mask: Tensor, algorithm: str) -> Tensor:
    """How much each token's loss counts in that of its mini-batch; they sum to 1.

    With "ppo" all tokens count the same; with "grpo" all rows do, and the tokens of a row share
    its weight (arXiv:2402.03300, section 4.1.1, equation 3). Cut by rows over ranks, the ranks'
    weighted sums add up to the loss of the whole, however uneven they are.
    """
    mask = mask.float()
    if algorithm == "ppo":
        return mask / mask.sum().clamp(min=1)
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values shifted and scaled to mean 0 and variance 1 over the tokens that count."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, section 3, equation 16).

    With delta_t = r_t + gamma V_{t+1} - V_t, A_t is the sum over l of (gamma lam)^l delta_{t+l}.
    An episode ends with its last token, so nothing has value behind it.

    Returns:
        `(advantages, returns)`, where returns are A_t + V_t, the targets of the value function.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    running, value_after = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], value_after = running, values[:, t]
    return advantages, (advantages + values) * mask


def group_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """Advantages relative to other answers to one prompt (arXiv:2402.03300, section 4.1.2).

    A_i = (r_i - mean(r)) / std(r) within a group; 0 in a group whose scores are all the same.

    Args:
        scores: (rows,), the reward of each whole answer.
        groups: (rows,) integers; rows of one prompt have the same.
    """
    _, group = torch.unique(groups, return_inverse=True)
    members = torch.bincount(group).to(scores.dtype)

    def mean(x: Tensor) -> Tensor:
        return (torch.zeros_like(members).index_add(0, group, x) / members)[group]

    centred = scores - mean(scores)
    return centred / (mean(centred**2).sqrt() + 1e-6)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """An unbiased estimate, never negative, of KL(policy || reference) for each token
    (arXiv:2402.03300, section 4.1.1, equation 4): q/p - log(q/p) - 1, for tokens drawn from p.
    """
    log_ratio = ref_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


def penalized_rewards(
    rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor, coefficient: float
) -> Tensor:
    """Rewards less a penalty for leaving the reference, token by token
    (arXiv:2402.03300, section 4.1.1, equation 2, as PPO has it).
    """
    return rewards - coefficient * (log_probs - ref_log_probs)


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate objective, negated (arXiv:1707.06347, section 3, equation 7).

    Returns:
        `(loss, clipped)`, each (rows, tokens): -min(r A, clip(r, 1 - clip, 1 + clip) A) with the
        probability ratio r, and where the clipped term is the smaller one.
    """
    ratio = (log_probs - old_log_probs).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.min(free, clipped), clipped < free


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the squared error of the value function (arXiv:1707.06347, section 5, equation 9)."""
    return 0.5 * (values - returns) ** 2


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy in nats of the distributions in the last dimension, which goes away."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
