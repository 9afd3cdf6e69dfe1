"""That examples/ppo learns, and that how it is placed and cut makes no difference: minutes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

pytest.importorskip("transformers", reason="the examples extra is not installed")

from examples.ppo.settings import Settings
from examples.ppo.train import make_tokenizer, started
from tests.examples.runs import (
    TOLERANCE,
    check_learned,
    finish,
    largest_difference,
    run,
    trained,
    until_good,
)

pytestmark = pytest.mark.long

UNEVEN = Settings(prompts=9, mini_batch=4, epochs=1, hidden_size=32, device="cpu", threads=1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_to_sort_from_reward_alone(seed: int, cluster: None) -> None:
    check_learned(until_good(Settings.parse(["--seed", str(seed)])))


def test_grpo_learns_to_sort_from_reward_alone(cluster: None) -> None:
    check_learned(until_good(Settings.parse(["--algorithm", "grpo"])))


@pytest.fixture(scope="module")
def expected(cluster: None) -> Any:
    with started(UNEVEN, make_tokenizer(UNEVEN)) as roles:
        return trained(UNEVEN, roles, range(3))


@pytest.mark.parametrize("other", [{"shard": "fsdp2", "micro_rows": 2}, {"placement": "separate"}])
def test_other_ways_to_shard_and_to_place_the_roles_learn_the_same(
    other: dict[str, Any], expected: Any
) -> None:
    settings = replace(UNEVEN, **other)
    with started(settings, make_tokenizer(settings)) as roles:
        got = trained(settings, roles, range(3))
    for role in ("actor", "critic"):
        assert largest_difference(got[role], expected[role]) < TOLERANCE


def curves(output: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "reward", "kl", "actor/loss", "critic/loss", "actor/grad_norm")
    return [tuple(line[key] for key in keys) for line in lines]


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
