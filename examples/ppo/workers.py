"""The roles: an actor, a critic, a reference, a rule that rewards, and a rollout, which answers in
the actor's place. The driver says what they do when; formulas are in `core_algos`, models in
`models`, ranks in `training`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from examples.ppo.core_algos import (
    clipped_policy_loss,
    entropy_from_logits,
    kl_estimate,
    value_loss,
)
from examples.ppo.models import (
    ValueModel,
    generate,
    language_model,
    response_logits,
    response_values,
)
from examples.ppo.settings import Settings
from examples.ppo.task import Tokenizer, position_rewards
from examples.ppo.training import Trained, join_group, mixed_precision, take_weights
from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.device import get_torch_device

__all__ = ["Actor", "Critic", "Reference", "Reward", "Rollout"]

F = TypeVar("F", bound=Callable[..., Any])


def timed(method: F) -> F:
    """Add to what a rank returns when it began and ended, by its node's clock."""

    @functools.wraps(method)
    def run(self: Worker, *data: DataProto) -> Any:
        began = time.perf_counter()
        output = method(self, *data)
        get_torch_device().synchronize()
        worked = began, time.perf_counter()
        if isinstance(output, DataProto):
            output.to("cpu").meta_info["metrics"] = {"worked": worked}
            return output
        return {**output, "worked": worked}

    return run  # type: ignore[return-value]


class Role(Worker):
    """What all roles have: the settings, and a place in the ranks' collectives."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.settings, self.tokenizer = settings, tokenizer
        join_group(self, settings.threads)

    def pieces(self, data: DataProto, rows_of_all: int) -> Iterator[tuple[DataProto, int]]:
        """This rank's rows, at most `micro_rows` at a time, each with its number of rows.

        All ranks get equally many pieces, since their collectives must match: enough for
        `rows_of_all` ranks together, or fewer. One without rows is made of a blank row instead,
        which counts nowhere.
        """
        most = -(-rows_of_all // self.world_size)
        size = self.settings.micro_rows or most
        count = max(1, -(-most // size))
        rows = len(data)
        for i in range(count):
            piece = data.slice(rows * i // count, rows * (i + 1) // count)
            yield (piece if len(piece) else _blank_row(data)).to(self.device), len(piece)

    def in_precision(self) -> Any:
        return mixed_precision(self.device, self.settings.precision)

    def mapped(self, data: DataProto, function: Callable[[Any], Tensor]) -> Tensor:
        """A function of a piece's tensors, of all rows of this rank."""
        pieces = self.pieces(data, self.settings.rows)
        with torch.no_grad(), self.in_precision():
            return torch.cat([function(piece.batch)[:rows].cpu() for piece, rows in pieces])

    def log_probs_and_logits(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        responses, temperature = batch["responses"], self.settings.temperature
        logits = response_logits(model, *_sequences(batch), responses.shape[1], temperature)
        chosen = logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)
        return chosen, logits


def _blank_row(data: DataProto) -> DataProto:
    """A row without weight whose masks let everything be attended to."""
    return DataProto.from_dict(
        {
            key: torch.full((1, *column.shape[1:]), int(key.endswith("mask")), dtype=column.dtype)
            for key, column in data.batch.items()
        }
    )


def _sequences(batch: Any) -> tuple[Tensor, Tensor]:
    """Prompts with their responses, and what can be attended to: a response's tokens come after
    one another, so those behind its end, which count nowhere, need no mask.
    """
    responses = batch["responses"]
    return (
        torch.cat([batch["prompts"], responses], dim=1),
        torch.cat([batch["prompt_mask"], torch.ones_like(responses)], dim=1),
    )


class Reference(Role):
    """The model as it was before training; KL is measured from it."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.model = language_model(settings, len(tokenizer)).to(self.device).requires_grad_(False)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    @timed
    def log_probs(self, data: DataProto) -> DataProto:
        """Of the responses under the reference: ref_log_probs (rows, tokens)."""
        found = self.mapped(data, lambda b: self.log_probs_and_logits(self.model, b)[0])
        return DataProto.from_dict({"ref_log_probs": found})


class Reward(Role):
    """The rule: which positions of an answer are right."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    @timed
    def score(self, data: DataProto) -> DataProto:
        """rewards (rows, tokens)."""
        batch = data.batch
        rewards = position_rewards(batch["responses"], batch["targets"])
        return DataProto.from_dict({"rewards": rewards * batch["response_mask"]})


class Answering(Role):
    """A role that answers prompts, with its `model`."""

    model: Any

    def gathered(self) -> Any:
        """A context with the model in which ranks need not call it equally often."""
        return contextlib.nullcontext(self.model)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True, blocking=False)
    @timed
    def generate(self, data: DataProto) -> DataProto:
        """The prompts with answers: responses, response_mask and log_probs, each (rows, tokens).

        They stay here, and whoever needs some of it takes that.
        """
        rows = len(data)
        batch = (data if rows else _blank_row(data)).to(self.device).batch
        tokenizer = self.tokenizer
        with self.gathered() as model, self.in_precision():
            responses, response_mask = generate(
                model,
                batch["prompts"],
                batch["prompt_mask"],
                batch["noise"],
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
                self.settings.temperature,
            )
        answers = {"responses": responses[:rows], "response_mask": response_mask[:rows]}
        answered = data.to("cpu").union(DataProto.from_dict(answers).to("cpu"))
        log_probs = self.mapped(answered, lambda b: self.log_probs_and_logits(self.model, b)[0])
        return answered.union(DataProto.from_dict({"log_probs": log_probs}))


class Rollout(Answering):
    """The policy in processes of its own, with the weights that it was last given."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.model = language_model(settings, len(tokenizer)).to(self.device).requires_grad_(False)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, reads_only=True)
    def load(self, *parts: dict[str, Tensor]) -> None:
        """Go on with an actor's `weights`: of one rank with a replica, or of all that have rows."""
        take_weights(self.model, parts)


class Trainable(Role):
    """A role that learns."""

    trained: Trained

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, uneven=True)
    @timed
    def update(self, *mini_batches: DataProto) -> dict[str, float]:
        """One optimizer step on each mini-batch, all ranks together.

        `weights` (rows, tokens) say how much each token's loss counts; over all ranks' rows, the
        weighted sum is the loss. The metrics are this rank's shares of such sums, on average over
        the mini-batches.
        """
        totals: dict[str, float] = {}
        for data in mini_batches:
            for key, value in self.update_on(data).items():
                totals[key] = totals.get(key, 0.0) + value / len(mini_batches)
        return totals

    def update_on(self, data: DataProto) -> dict[str, float]:
        metrics: dict[str, float] = {}
        pieces = list(self.pieces(data, min(self.settings.mini_batch, self.settings.rows)))
        for i, (piece, _) in enumerate(pieces):
            last = i == len(pieces) - 1
            with self.trained.accumulating(last):
                with self.in_precision():
                    losses = self.losses(piece.batch)
                sums = {key: (x * piece.batch["weights"]).sum() for key, x in losses.items()}
                self.trained.backward(sums["loss"], last)
            for key, value in sums.items():
                metrics[key] = metrics.get(key, 0.0) + float(value.detach())
        norm = self.trained.step(self.settings.max_grad_norm)
        return {**metrics, "grad_norm": norm / self.world_size}

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The "loss" of each token, and what else is worth knowing: (rows, tokens) each."""
        raise NotImplementedError

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save(self, path: str) -> None:
        """Write this role's state to a folder."""
        self.trained.save(path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load(self, path: str) -> None:
        """Read what `save` wrote."""
        self.trained.load(path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False, transport="device")
    def weights(self) -> dict[str, Tensor]:
        """What this rank has of the weights; they stay here until somebody takes them."""
        return self.trained.weights()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def parameters(self) -> dict[str, Tensor]:
        """The whole parameters by name, from each rank."""
        return self.trained.parameters()


class Actor(Trainable, Answering):
    """The policy."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        model = language_model(settings, len(tokenizer))
        blocks = set(model._no_split_modules or ())
        self.trained = Trained(model, blocks, settings.shard, self.device, settings.actor_lr)
        self.model = self.trained.bare

    def gathered(self) -> Any:
        return self.trained.gathered()

    def losses(self, batch: Any) -> dict[str, Tensor]:
        settings = self.settings
        log_probs, logits = self.log_probs_and_logits(self.trained.module, batch)
        surrogate, clipped = clipped_policy_loss(
            log_probs, batch["log_probs"], batch["advantages"], settings.clip
        )
        entropy = entropy_from_logits(logits)
        loss = surrogate - settings.entropy * entropy
        if settings.algorithm == "grpo":
            loss = loss + settings.kl * kl_estimate(log_probs, batch["ref_log_probs"])
        return {"loss": loss, "entropy": entropy, "clipped": clipped.float()}


class Critic(Trainable):
    """The value function."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        model = ValueModel(language_model(settings, len(tokenizer)))
        blocks = set(model.body._no_split_modules or ())
        self.trained = Trained(model, blocks, settings.shard, self.device, settings.critic_lr)

    def values_of(self, model: Any, batch: Any) -> Tensor:
        return response_values(model, *_sequences(batch), batch["responses"].shape[1])

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, uneven=True)
    @timed
    def values(self, data: DataProto) -> DataProto:
        """What is still to come before each token: values (rows, tokens)."""
        found = self.mapped(data, lambda b: self.values_of(self.trained.bare, b))
        return DataProto.from_dict({"values": found})

    def losses(self, batch: Any) -> dict[str, Tensor]:
        values = self.values_of(self.trained.module, batch)
        return {"loss": value_loss(values, batch["returns"])}
