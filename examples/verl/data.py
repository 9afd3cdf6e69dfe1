"""What the trainer reads, made on the spot: a tokenizer, two Llamas of 2 layers, questions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

__all__ = ["EOS", "make"]

EOS = 1
_NUMBERS = [f"w{i}" for i in range(48)]
_WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", "system", "say", "after", "?", *_NUMBERS]
_CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make(folder: Path) -> None:
    """Write two models, and for each trainer questions to train on and others, the same always."""
    folder.mkdir(parents=True, exist_ok=True)
    _models(folder)
    chance = random.Random(0)
    for split, rows in (("train", 32), ("val", 8)):
        questions = [_question(chance, split, index) for index in range(rows)]
        pandas.DataFrame(questions).to_parquet(folder / f"ppo_{split}.parquet")
        answered = [{"messages": [*q["prompt"], _answer(q)]} for q in questions]
        pandas.DataFrame(answered).to_parquet(folder / f"sft_{split}.parquet")


def _models(folder: Path) -> None:
    words = models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    fast.chat_template = _CHAT
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "model")
    critic = LlamaForTokenClassification(LlamaConfig(**shape, num_labels=1))
    critic.save_pretrained(folder / "critic")
    for name in ("model", "critic"):
        fast.save_pretrained(folder / name)


def _answer(question: dict[str, Any]) -> dict[str, str]:
    return {"role": "assistant", "content": question["reward_model"]["ground_truth"]}


def _question(chance: random.Random, split: str, index: int) -> dict[str, Any]:
    number = chance.randrange(4, 40)
    given = " ".join([f"w{number}"] * chance.randrange(1, 5))
    return {
        "data_source": "toy",
        "prompt": [{"role": "user", "content": f"say after {given} ?"}],
        "ability": "toy",
        "reward_model": {"style": "rule", "ground_truth": f"w{number + 1}"},
        "extra_info": {"split": split, "index": index},
    }
