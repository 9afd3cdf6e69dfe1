"""The task and the models of examples/ppo, in this process: prompts, rewards, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the examples extra is not installed")

from examples.ppo.models import (
    ValueModel,
    generate,
    language_model,
    response_values,
)
from examples.ppo.settings import Settings
from examples.ppo.task import CharTokenizer, make_prompts, position_rewards
from examples.ppo.train import advantages, make_batch, make_tokenizer, mini_batches
from protocol import DataProto

TOKENIZER = CharTokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
SETTINGS = Settings(hidden_size=32, prompts=6, response_length=7)


@pytest.fixture(scope="module")
def model() -> Any:
    return language_model(SETTINGS, len(TOKENIZER)).eval()


@pytest.fixture(scope="module")
def prompts() -> DataProto:
    return make_batch(SETTINGS, TOKENIZER, step=0)


def sampled(model: Any, prompts: DataProto) -> tuple[torch.Tensor, torch.Tensor]:
    batch = prompts.batch
    return generate(
        model, batch["prompts"], batch["prompt_mask"], batch["noise"], EOS, PAD, temp=1.0
    )


@pytest.mark.parametrize(
    ("task", "answer"), [("copy", "3127$"), ("reverse", "7213$"), ("sort", "1237$")]
)
def test_the_right_answer_earns_one_and_each_wrong_position_costs_its_share(
    task: str, answer: str
) -> None:
    draws = iter([torch.tensor([4]), torch.tensor([[3, 1, 2, 7]])])  # the length, the digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: next(draws))
        targets = make_prompts(task, TOKENIZER, 1, 4, torch.Generator()).batch["targets"]
    assert TOKENIZER.decode(targets[0].tolist()) == answer
    assert position_rewards(targets, targets).sum().item() == pytest.approx(1)
    wrong = targets.clone()
    wrong[0, 1] = PAD
    assert position_rewards(wrong, targets)[0].tolist() == pytest.approx([0.2, 0, 0.2, 0.2, 0.2])


def test_answers_shorter_or_longer_than_the_right_one_earn_what_is_right_of_them() -> None:
    targets = torch.tensor([[5, 6, EOS, -1, -1]])
    assert position_rewards(torch.tensor([[5]]), targets).sum().item() == pytest.approx(1 / 3)
    long = torch.tensor([[5, 6, 7, 7, 7, 7, 7]])
    assert position_rewards(long, targets).sum().item() == pytest.approx(2 / 3)


def test_a_step_has_the_same_prompts_of_some_digits_and_noise_whenever_it_is_run(
    prompts: DataProto,
) -> None:
    again, other = (make_batch(SETTINGS, TOKENIZER, step) for step in (0, 1))
    assert again.equal(prompts)
    assert not other.equal(prompts)
    lengths = set((other.batch["prompt_mask"].sum(1) - 1).tolist())
    assert lengths <= {2, 3, 4}
    assert len(lengths) > 1


def test_sampling_with_a_cache_draws_what_whole_passes_would_draw(
    model: Any, prompts: DataProto
) -> None:
    responses, response_mask = sampled(model, prompts)
    batch = prompts.batch
    for row in range(len(prompts)):
        tokens = batch["prompts"][row][batch["prompt_mask"][row].bool()].tolist()
        drawn: list[int] = []
        for number in batch["noise"][row].tolist():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens + drawn])).logits[0, -1]
            passed = logits.softmax(-1).cumsum(-1) > number
            drawn.append(int(passed.nonzero()[0]))
            if drawn[-1] == EOS:
                break
        length = int(response_mask[row].sum())
        assert responses[row, :length].tolist() == drawn
        assert responses[row, length:].tolist() == [PAD] * (7 - length)


def test_a_rows_answer_does_not_depend_on_the_rows_beside_it(
    model: Any, prompts: DataProto
) -> None:
    together, _ = sampled(model, prompts)
    alone = [sampled(model, prompts.slice(i, i + 1))[0] for i in range(len(prompts))]
    assert torch.equal(together, torch.cat(alone))


def test_values_are_of_the_state_before_each_token(prompts: DataProto) -> None:
    critic = ValueModel(language_model(SETTINGS, len(TOKENIZER)))
    torch.nn.init.ones_(critic.head.weight)
    sequences, mask = prompts.batch["prompts"], prompts.batch["prompt_mask"]
    longer = torch.cat([sequences, sequences[:, -1:]], dim=1)
    longer_mask = torch.cat([mask, mask[:, -1:]], dim=1)
    with torch.no_grad():
        before = response_values(critic, sequences, mask, 1)
        more = response_values(critic, longer, longer_mask, 2)
    assert torch.allclose(before[:, 0], more[:, 0], atol=1e-5)
    assert not torch.allclose(more[:, 0], more[:, 1], atol=1e-5)


def test_mini_batches_hold_every_row_once_per_pass_in_an_order_of_its_own() -> None:
    settings = Settings(prompts=10, mini_batch=2, epochs=4)
    rows = DataProto.from_dict({"row": torch.arange(10)})
    passes = torch.cat([m.batch["row"] for m in mini_batches(settings, rows, step=3)]).view(4, 10)
    assert all(sorted(one) == list(range(10)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) > 1
    again = torch.cat([m.batch["row"] for m in mini_batches(settings, rows, step=3)]).view(4, 10)
    assert torch.equal(again, passes)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_weights_of_each_mini_batch_sum_to_one_also_of_the_last_that_has_fewer_rows(
    algorithm: str,
) -> None:
    settings = Settings(algorithm=algorithm, prompts=5, answers=2, mini_batch=4, epochs=1)
    names = ("rewards", "log_probs", "ref_log_probs", "values")
    columns = {name: torch.rand(10, 3) for name in names}
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]] * 5).bool()
    groups = torch.arange(10) % 5
    seen = DataProto.from_dict({**columns, "response_mask": mask, "groups": groups})
    minis = mini_batches(settings, seen.union(advantages(settings, seen)), step=0)
    assert sorted(len(mini) for mini in minis) == [2, 4, 4]
    assert [m.batch["weights"].sum().item() for m in minis] == pytest.approx([1, 1, 1])
    assert all(not m.batch["weights"][~m.batch["response_mask"]].any() for m in minis)


def test_the_answers_to_one_prompt_are_spread_over_the_mini_batches_of_a_step() -> None:
    settings = Settings(algorithm="grpo", prompts=8, answers=4, mini_batch=8, epochs=1)
    batch = make_batch(settings, TOKENIZER, step=0)
    groups = batch.batch["groups"]
    assert torch.bincount(groups).tolist() == [4] * 8
    for group in range(8):
        of_group = batch.select(["prompts", "targets"]).select_idxs(groups == group)
        assert of_group.equal(of_group.slice(0, 1).repeat(4))
    assert all(len(set(part.tolist())) > 2 for part in groups.split(8))


def test_a_model_on_disk_is_used_with_its_own_tokenizer(model: Any, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({c: i for i, c in enumerate(TOKENIZER.characters)}, unk_token="_"))
    words.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="$").save_pretrained(tmp_path)

    settings = Settings(model=str(tmp_path), prompts=6, response_length=7)
    tokenizer = make_tokenizer(settings)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    theirs, ours = (make_batch(settings, t, 0).batch["targets"] for t in (tokenizer, TOKENIZER))
    assert torch.equal(theirs, ours)
    loaded = language_model(settings, len(tokenizer)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
