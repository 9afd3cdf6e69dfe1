"""veRL's own trainer on both cores, and the names that veRL takes from its core, with the veRL that
`make verl` installs."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-verl/bin/python"

pytestmark = [pytest.mark.verl, pytest.mark.long, pytest.mark.timeout(900)]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [PYTHON, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(("trainer", "metrics", "records"), [("ppo", 249, 4), ("sft", 20, 5)])
def test_every_metric_of_verls_trainers_is_the_same_on_both_cores(
    tmp_path: Path, trainer: str, metrics: int, records: int
) -> None:
    output = run("-m", "examples.verl", "--trainer", trainer, "--output", str(tmp_path))
    assert f"metrics compared    {metrics}, of {records} records" in output
    assert "largest difference  0\n" in output
    latest = tmp_path / f"{trainer}_ours.checkpoint/latest_checkpointed_iteration.txt"
    assert latest.read_text() == "3"


def test_verls_trainer_with_a_queue_for_rows_runs_to_its_end(tmp_path: Path) -> None:
    """Two such runs draw other answers, on veRL's own core as well, so metrics are not compared."""
    run("-m", "examples.verl", "--core", "ours", "--output", str(tmp_path), "trainer.use_v1=True")
    lines = (tmp_path / "ppo_ours.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["data"] for line in lines]
    assert [m["training/global_step"] for m in metrics[1:]] == [1, 2, 3]
    assert all(math.isfinite(m["actor/loss"]) for m in metrics[1:])


def test_every_name_that_verl_takes_from_its_core_is_in_the_page_with_what_it_is_here() -> None:
    assert run("tests/compat/verl_names.py", "--check").strip() == ""
