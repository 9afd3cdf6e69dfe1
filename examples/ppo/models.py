"""The models of the roles: a causal language model and a value model, and what is read from them.
How they are trained and spread over ranks is left to `training`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from examples.ppo.settings import Settings

__all__ = ["ValueModel", "generate", "language_model", "response_logits", "response_values"]


def language_model(settings: Settings, vocabulary: int) -> Any:
    """A Hugging Face causal language model: `settings.model` if given, else a small Llama of the
    sizes asked for, with random weights that depend on `settings.seed` alone.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if settings.model:
        return AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=settings.vocab_size or vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size or 4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads or settings.heads,
        max_position_embeddings=settings.digits + 1 + settings.answer_tokens,
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


class ValueModel(nn.Module):
    """The body of a language model with one output per token: the reward still to come."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.body = causal_lm.base_model
        self.head = nn.Linear(causal_lm.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: Any) -> Tensor:
        """(rows, tokens)"""
        hidden = self.body(**inputs).last_hidden_state
        return self.head(hidden).squeeze(-1).float()


def _inputs(sequences: Tensor, mask: Tensor) -> dict[str, Any]:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": sequences,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
    }


def response_logits(
    model: nn.Module, sequences: Tensor, mask: Tensor, length: int, temperature: float
) -> Tensor:
    """What the model says at each of the last `length` tokens of (rows, tokens) sequences.

    Returns:
        (rows, length, vocabulary), float32, divided by the temperature.
    """
    inputs = _inputs(sequences, mask)
    logits = model(**inputs, logits_to_keep=length + 1).logits[:, :-1]
    return logits.float() / temperature


def response_values(model: nn.Module, sequences: Tensor, mask: Tensor, length: int) -> Tensor:
    """The value before each of the last `length` tokens: (rows, length), float32."""
    return model(**_inputs(sequences, mask))[:, -length - 1 : -1]


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Tensor, mask: Tensor, noise: Tensor, eos: int, pad: int, temp: float
) -> tuple[Tensor, Tensor]:
    """Sample an answer to each prompt, with a cache of keys and values.

    Args:
        prompts, mask: (rows, tokens), filled up on the left.
        noise: (rows, length) uniform numbers in [0, 1): the token drawn is where the cumulated
            probabilities pass the number, so that a row's answer does not depend on other rows.

    Returns:
        `(responses, response_mask)`, (rows, length): the end counts, what is behind it does not.
    """
    from transformers import DynamicCache

    taken = inspect.signature(model.forward).parameters
    keyword = "cache" if "cache" in taken else "past_key_values"  # its older name
    rows, length = noise.shape
    responses = torch.full((rows, length), pad, device=prompts.device)
    response_mask = torch.zeros_like(responses, dtype=torch.bool)
    going = torch.ones(rows, dtype=torch.bool, device=prompts.device)
    cache = DynamicCache()
    tokens, positions = prompts, (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(length):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{keyword: cache},
        ).logits[:, -1]
        cumulated = (logits.float() / temp).softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulated, noise[:, t : t + 1] * cumulated[:, -1:], right=True)
        drawn = drawn.squeeze(1).clamp(max=logits.shape[-1] - 1)
        responses[:, t] = torch.where(going, drawn, pad)
        response_mask[:, t] = going
        going = going & (drawn != eos)
        if not going.any():
            break
        tokens, positions = responses[:, t : t + 1], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return responses, response_mask
