"""examples/ppo learns, and the same however it is cut, placed and resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

pytest.importorskip("transformers", reason="the examples extra is not installed")

from examples.ppo import train
from examples.ppo.records import Records
from examples.ppo.settings import Settings
from examples.ppo.train import (
    READS,
    Seconds,
    advantages,
    make_batch,
    make_tokenizer,
    mini_batches,
    started,
    train_step,
)
from examples.ppo.training import take_weights
from tests.examples.runs import (
    TOLERANCE,
    check_learned,
    finish,
    largest_difference,
    parameters,
    run,
    trained,
    until_good,
)

# 9 rows on 2 ranks, in mini-batches of 4, 4 and 1: the last leaves a rank without rows.
UNEVEN = Settings(
    prompts=9, mini_batch=4, epochs=1, hidden_size=32, device="cpu", threads=1, ranks=2
)


@pytest.fixture(scope="module")
def two_ranks(cluster: None) -> Iterator[tuple[Settings, Any]]:
    """Settings, and roles on two ranks, which cut their rows further, three at a time."""
    settings = replace(UNEVEN, micro_rows=3)
    with started(settings, make_tokenizer(settings)) as roles:
        yield settings, roles


@pytest.fixture(scope="module")
def one_rank(cluster: None) -> tuple[Any, Any]:
    """What one rank begins with, and what it has learned from three uneven batches."""
    settings = replace(UNEVEN, ranks=1)
    with started(settings, make_tokenizer(settings)) as roles:
        return trained(settings, roles, []), trained(settings, roles, range(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"micro_rows": 3},
        pytest.param({"shard": "fsdp2", "micro_rows": 2}, marks=pytest.mark.long),
        pytest.param({"placement": "separate"}, marks=pytest.mark.long),
        {"placement": "rollout", "rollout_ranks": 3},
    ],
)
def test_two_ranks_learn_what_one_rank_learns_however_they_are_cut_and_placed(
    other: dict[str, Any], one_rank: tuple[Any, Any]
) -> None:
    before, expected = one_rank
    settings = replace(UNEVEN, **other)
    with started(settings, make_tokenizer(settings)) as roles:
        got = trained(settings, roles, range(3))
    for role in ("actor", "critic"):
        assert largest_difference(before[role], expected[role]) > 100 * TOLERANCE
        assert largest_difference(got[role], expected[role]) < TOLERANCE


@pytest.fixture(scope="module")
def with_rollout(cluster: None) -> Iterator[tuple[Settings, Any, Any, Any]]:
    """Settings, and roles on two ranks over which models are cut, with a rollout on one; what three
    steps said, and what they taught.
    """
    settings = replace(UNEVEN, placement="rollout", rollout_ranks=1, shard="fsdp2")
    tokenizer = make_tokenizer(settings)
    with started(settings, tokenizer) as roles:
        steps = [train_step(settings, roles, tokenizer, step) for step in range(3)]
        learned = {role: parameters(roles[role]) for role in ("actor", "critic")}
        yield settings, roles, steps, learned


@pytest.mark.slow
def test_a_rollout_of_its_own_teaches_a_model_that_is_cut_over_ranks_the_same(
    with_rollout: Any, one_rank: tuple[Any, Any]
) -> None:
    *_, learned = with_rollout
    for role, expected in one_rank[1].items():
        assert largest_difference(learned[role], expected) < TOLERANCE


@pytest.mark.slow
def test_weights_go_to_the_rollout_past_the_driver(with_rollout: Any) -> None:
    *_, steps, learned = with_rollout
    size = sum(value.nbytes for value in learned["actor"].values())
    assert max(metrics["driver_bytes"] for metrics in steps) < size / 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_weights_that_are_cut_by_rows_are_put_in_their_places(ranks: int) -> None:
    given, taken = (torch.nn.BatchNorm1d(5) for _ in range(2))
    for value in given.state_dict().values():
        value.copy_(torch.arange(1, value.numel() + 1).reshape(value.shape))
    whole = {**given.state_dict(), "weight": None, "bias": None}  # buffers are not cut
    cut = {name: list(getattr(given, name).detach().chunk(ranks)) for name in ("weight", "bias")}
    for rows in cut.values():
        rows += [rows[0][:0]] * (ranks - len(rows))  # as a rank behind the last row has none
    take_weights(taken, [{**whole, **{name: cut[name][i] for name in cut}} for i in range(ranks)])
    for name, value in given.state_dict().items():
        assert torch.equal(taken.state_dict()[name], value)


def through_the_driver(settings: Settings, roles: Any, step: int) -> None:
    """A step in which each call waits, and gives the driver all that it makes."""
    batch = roles["actor"].generate(make_batch(settings, make_tokenizer(settings), step)).get()
    batch = batch.select(meta_info_keys=[])
    for call in (roles["reference"].log_probs, roles["reward"].score, roles["critic"].values):
        batch = batch.union(call(batch).select(meta_info_keys=[]))
    batch = batch.union(advantages(settings, batch))
    for role in ("critic", "actor"):
        roles[role].update(*mini_batches(settings, batch.select(READS[role]), step))


@pytest.mark.slow
def test_rows_that_stay_in_the_workers_teach_what_they_teach_by_way_of_the_driver(
    two_ranks: Any, tmp_path: Path
) -> None:
    settings, roles = two_ranks
    learners = {role: roles[role] for role in ("actor", "critic")}
    for role, group in learners.items():
        group.save(str(tmp_path / role))
    got = trained(settings, roles, [0, 1])
    for role, group in learners.items():
        group.load(str(tmp_path / role))
    for step in range(2):
        through_the_driver(settings, roles, step)
    for role, group in learners.items():
        assert largest_difference(got[role], parameters(group)) == 0


@pytest.mark.slow
def test_no_prompt_or_response_comes_to_the_driver_or_leaves_it_again(cluster: None) -> None:
    settings = replace(UNEVEN, prompts=512, mini_batch=256, response_length=16)
    tokenizer = make_tokenizer(settings)
    with started(settings, tokenizer) as roles:
        steps = [train_step(settings, roles, tokenizer, step) for step in range(2)]
        tables = [group.stats() for group in roles.values()]
    tokens = settings.rows * settings.answer_tokens
    prompts = make_batch(settings, tokenizer, 0).batch.bytes()
    seen = tokens * (1 + 4 + 4 + 4 + 4)  # the mask; log-probs of two roles, rewards, values
    computed = tokens * (4 + 4 + 4) + tokens * 4  # weights, advantages, returns; and ref_log_probs
    headers = tokens * 8 / 2  # half of what responses would add
    received = sum(row.bytes_in for table in tables for row in table) / len(steps)
    assert seen < received < seen + headers
    for metrics in steps:
        least = prompts + seen + computed
        assert least < metrics["driver_bytes"] < least + headers


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [["--seed", str(seed)] for seed in range(3)] + [["--algorithm", "grpo"]]
)
def test_it_learns_to_sort_from_reward_alone(options: list[str], cluster: None) -> None:
    check_learned(until_good(Settings.parse(options)))


@pytest.mark.slow
@pytest.mark.parametrize("placed", ["two_ranks", "with_rollout"])
def test_a_checkpoint_holds_all_that_the_next_steps_depend_on(
    placed: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings, roles = request.getfixturevalue(placed)[:2]
    settings = replace(settings, output=str(tmp_path), steps=5)
    records, tokenizer = Records(settings), make_tokenizer(settings)
    records.add(train_step(settings, roles, tokenizer, 0))
    records.save(roles)
    expected = trained(settings, roles, [1, 2])
    records.add(train_step(settings, roles, tokenizer, 3))

    resumed = Records(replace(settings, resume=True))
    assert resumed.steps_done == 1
    assert len(resumed.metrics_file.read_text().splitlines()) == 1
    resumed.load(roles)
    got = trained(settings, roles, [1, 2])
    for role in ("actor", "critic"):
        assert largest_difference(got[role], expected[role]) == 0


def test_the_seconds_of_phases_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock.__next__))
    seconds = Seconds()
    critic, actor = [(10.0, 10.1), (10.05, 10.75)], [(10.0, 10.1), (10.0, 10.5)]
    shares = {"update critic": critic, "values": [(10.6, 10.7)] * 2, "update actor": actor}
    for phase, worked in shares.items():
        seconds.metrics(phase, [{"worked": interval} for interval in worked])
    expected = {"update critic": 0.25, "values": 0, "update actor": 0.5}
    expected.update({"controller": 0.25, "step": 1})
    assert seconds.summary() == pytest.approx(expected)


def test_a_run_does_not_write_over_another_or_go_on_with_other_settings(tmp_path: Path) -> None:
    settings = replace(UNEVEN, output=str(tmp_path))
    records = Records(settings)
    records.add({"step": 0})
    records.save({})
    with pytest.raises(ValueError, match="pass --resume"):
        Records(settings)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        Records(replace(settings, resume=True, seed=1))
    assert Records(replace(settings, resume=True, ranks=1, steps=99)).steps_done == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray", "inline"])
def test_the_program_leaves_metrics_a_picture_and_a_checkpoint(
    backend: str, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINGLE_CONTROLLER_BACKEND", backend)
    address = str(ray.get_runtime_context().gcs_address)
    finish("--steps", "2", "--ranks", "1", "--epochs", "1", output=tmp_path, address=address)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "step-000002" / "state.json").exists()


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    settings = replace(UNEVEN, output=str(tmp_path))
    Records(settings).add({"step": 0})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .* without --resume"):
        Records(replace(settings, resume=True))
    again = Records(settings)
    assert again.steps_done == 0
    assert not again.metrics_file.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algorithm", "grpo", "--answers", "1"], "answers must be at least 2"),
        (["--mini-batch", "0"], "mini_batch must be at least 1"),
        (["--task", "guess"], "invalid choice"),
        (["--prompts", "1", "--ranks", "-1"], "ranks must be at least 1"),
        (["--rollout-ranks", "1"], "0 unless placement is rollout"),
    ],
)
def test_a_wrong_option_ends_the_program_with_what_was_asked_for(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        Settings.parse(options)
    assert message in capsys.readouterr().err


def test_a_preset_can_be_changed_in_part() -> None:
    settings = Settings.parse(["--preset", "0.5b", "--layers", "3"])
    assert (settings.hidden_size, settings.layers, settings.kv_heads) == (896, 3, 2)


def curves(output: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "reward", "kl", "actor/loss", "critic/loss", "actor/grad_norm")
    return [tuple(line[key] for key in keys) for line in lines]


@pytest.mark.long
def test_a_run_that_ctrl_c_ended_goes_on_as_if_it_had_not(cluster: None, tmp_path: Path) -> None:
    address = str(ray.get_runtime_context().gcs_address)
    finish("--steps", "30", output=tmp_path / "whole", address=address)

    with run("--steps", "30", output=tmp_path / "cut") as cut:
        assert cut.stderr is not None
        while "reward=" not in cut.stderr.read(80):
            assert cut.poll() is None
        os.killpg(cut.pid, signal.SIGINT)
        errors = cut.communicate(timeout=60)[1]
        assert cut.returncode == 130, errors
    assert "--resume goes on" in errors
    assert 0 < len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) < 30

    finish("--steps", "30", "--resume", output=tmp_path / "cut", address=address)
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")
