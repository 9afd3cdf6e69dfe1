"""examples/ppo on cards: it learns in bfloat16, a larger model trains, two cards learn as one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("transformers", reason="the examples extra is not installed")

from examples.ppo.__main__ import report
from examples.ppo.records import Records
from examples.ppo.settings import Settings
from examples.ppo.train import make_tokenizer, started, train_step
from tests.examples.runs import TOLERANCE, check_learned, largest_difference, trained, until_good


def test_it_learns_on_a_card(gpus: int) -> None:
    seen = until_good(Settings.parse(["--ranks", "1"]))
    check_learned(seen)
    spent = sum(metrics["seconds"]["step"] for metrics in seen)
    pace = median(metrics["tokens_per_second"] for metrics in seen)
    print(f"\nreward {seen[0]['reward']:.3f} → {seen[-1]['reward']:.3f} in {len(seen)} steps")
    print(f"{spent:.1f} s; answer tokens per second, median: {pace:.0f}")


def test_half_a_billion_parameters_train_cut_over_the_cards(gpus: int, tmp_path: Path) -> None:
    size = ["--preset", "0.5b", "--shard", "fsdp2", "--ranks", str(min(2, gpus)), "--steps", "6"]
    rates = ["--actor-lr", "1e-5", "--critic-lr", "1e-5", "--output", str(tmp_path)]
    settings = Settings.parse([*size, *rates])
    records, tokenizer = Records(settings), make_tokenizer(settings)
    with started(settings, tokenizer) as roles:
        print(f"\n{roles['actor'].describe()}")
        for step in range(settings.steps):
            records.add(train_step(settings, roles, tokenizer, step))
    assert all(math.isfinite(line["actor/loss"] + line["kl"]) for line in records.history)
    del records.history[0]  # it warms up
    report(records)


def test_two_cards_learn_what_one_card_learns(gpus: int) -> None:
    if gpus < 2:
        pytest.skip(f"needs 2 CUDA devices; this machine has {gpus}")
    one = Settings(prompts=9, mini_batch=4, epochs=1, precision="float32", ranks=1)
    learned = []
    for settings in (one, replace(one, ranks=2), replace(one, placement="rollout")):
        with started(settings, make_tokenizer(settings)) as roles:
            learned.append(trained(settings, roles, range(3)))
    for role in ("actor", "critic"):
        for other in learned[1:]:
            assert largest_difference(learned[0][role], other[role]) < TOLERANCE
