"""The formulas of examples/ppo against numbers worked out by hand, or by the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from examples.ppo.core_algos import (
    clipped_policy_loss,
    entropy_from_logits,
    gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    penalized_rewards,
    token_weights,
    value_loss,
    whiten,
)

MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.9, 1.0), (0.7, 0.3)])
def test_gae_is_the_sum_of_discounted_deltas(gamma: float, lam: float) -> None:
    rewards, values = torch.randn(3, 4), torch.randn(3, 4)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate([3, 2, 1]):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert not advantages[MASK == 0].any()
    assert not returns[MASK == 0].any()


def test_what_lies_behind_an_answer_changes_nothing() -> None:
    rewards, values = torch.randn(3, 4), torch.randn(3, 4)
    noise = torch.randn(3, 4) * 1e6 * (1 - MASK)
    expected, got = (gae(rewards + n, values + n, MASK, 0.9, 0.8) for n in (0 * noise, noise))
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])


def test_answers_to_one_prompt_are_compared_with_each_other_alone() -> None:
    scores = torch.tensor([1.0, 10.0, 3.0, 10.0, 5.0, 3.0])
    got = group_advantages(scores, torch.tensor([7, 2, 7, 2, 7, 4]))
    spread = math.sqrt(8 / 3)  # of 1, 3, 5; an answer that is alone teaches nothing
    assert got.tolist() == pytest.approx([-2 / spread, 0, 0, 0, 2 / spread, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 1.0, -1.2, True),
        (0.5, 1.0, -0.5, False),  # a likelier good answer is still worth something
        (0.5, -1.0, 0.8, True),
        (1.5, -1.0, 1.5, False),  # a likelier bad answer still costs
    ],
)
def test_a_ratio_stops_paying_where_it_is_clipped(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    old = torch.tensor([[-1.0]])
    got, hit = clipped_policy_loss(
        old + math.log(ratio), old, torch.tensor([[advantage]]), clip=0.2
    )
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert hit.item() is clipped


def test_beyond_the_clip_there_is_no_gradient() -> None:
    log_probs = torch.tensor([[math.log(1.5), math.log(1.1)]], requires_grad=True)
    loss, _ = clipped_policy_loss(log_probs, torch.zeros(1, 2), torch.ones(1, 2), clip=0.2)
    loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([0.0, -1.1])


def test_the_kl_estimate_is_never_negative_and_right_on_average() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    of_each_token = kl_estimate(p.log(), q.log())
    exact = (p * (p / q).log()).sum()
    assert (of_each_token >= 0).all()
    assert (p * of_each_token).sum().item() == pytest.approx(exact.item(), abs=1e-6)
    assert not kl_estimate(p.log(), p.log()).any()


def test_entropy_is_largest_where_all_is_alike_and_zero_where_one_is_certain() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 200.0, 0.0, 0.0]])
    assert entropy_from_logits(logits).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_leaving_the_reference_costs_reward_and_a_wrong_value_half_its_square() -> None:
    one, behind, far = torch.tensor([[1.0], [-1.0], [-3.0]])
    got = penalized_rewards(one, behind, far, coefficient=0.1)
    assert got.tolist() == pytest.approx([0.8])
    assert value_loss(torch.tensor([3.0]), one).tolist() == [2.0]


def test_means_and_whitening_look_at_tokens_that_count() -> None:
    values = torch.randn(3, 4)
    counted = values[MASK.bool()]
    assert masked_mean(values, MASK).item() == pytest.approx(counted.mean().item(), abs=1e-6)
    white = whiten(values, MASK)[MASK.bool()]
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert masked_mean(values, torch.zeros(3, 4)).item() == 0


def test_ppo_weighs_tokens_alike_and_grpo_rows() -> None:
    assert token_weights(MASK, "ppo").sum(1).tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert token_weights(MASK, "grpo").sum(1).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_shards_of_any_size_add_up_to_the_loss_of_the_whole(algorithm: str) -> None:
    losses, weights = torch.randn(3, 4), token_weights(MASK, algorithm)
    whole = (losses * weights).sum().item()
    shards = [(losses[i:j] * weights[i:j]).sum().item() for i, j in ((0, 2), (2, 3), (3, 3))]
    assert sum(shards) == pytest.approx(whole, abs=1e-6)
    assert weights.sum().item() == pytest.approx(1)
