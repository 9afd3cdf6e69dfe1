"""The examples of one file, as programs in a short form on the session's cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the examples extra is not installed")

from ray.util.placement_group import PlacementGroup, placement_group_table

from examples import native_ray_groups, pipeline, two_groups
from examples.ppo.models import language_model
from examples.ppo.settings import Settings
from examples.ppo.task import CharTokenizer
from examples.ppo.train import make_batch
from tests.waiting import eventually


@pytest.mark.parametrize(
    "main", [native_ray_groups.main, two_groups.main, pipeline.main, Settings.parse]
)
def test_every_example_says_how_to_use_it(
    main: Callable[[list[str]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


RESULTS = re.compile(r"^\w+: losses .*norm .*$|^the groups' gradients differ$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["SPREAD", *(pytest.param(name, marks=pytest.mark.long) for name in ("PACK", "STRICT_PACK"))],
)
def test_both_ways_to_run_two_groups_compute_the_same(
    strategy: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert native_ray_groups.main(["--strategy", strategy]) == 0
    native = RESULTS.findall(capsys.readouterr().out)
    assert len(native) == 3
    two_groups.main(["--strategy", strategy])
    assert RESULTS.findall(capsys.readouterr().out) == native


def test_a_reservation_that_does_not_come_is_given_back(
    cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PlacementGroup, "wait", lambda *_: False)
    before = placement_group_table().keys()
    assert native_ray_groups.main([]) == 1
    assert "the cluster has no room" in capsys.readouterr().out
    [asked] = placement_group_table().keys() - before
    assert eventually(lambda: placement_group_table()[asked]["state"] == "REMOVED", 10)


@pytest.mark.slow
def test_the_pipeline_shows_when_each_role_was_at_work_and_moves_no_weights_through_the_driver(
    cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bytes_per_step = []

    def watched(rollout: Any, learner: Any, steps: int, overlap: bool) -> Any:
        before = [group.stats().driver_bytes for group in (rollout, learner)]
        seen = run(rollout, learner, steps, overlap)
        after = [group.stats().driver_bytes for group in (rollout, learner)]
        bytes_per_step.append((sum(after) - sum(before)) / steps)
        return seen

    run = pipeline.run
    monkeypatch.setattr(pipeline, "run", watched)
    picture = tmp_path / "folder" / "timelines.png"
    pipeline.main(["--steps", "2", "--turns", "1", "--picture", str(picture)])
    shown = capsys.readouterr().out
    assert len(re.findall(r"^  (?:rollout |training) \|.*█.*▒.*\|$", shown, re.MULTILINE)) == 4
    assert re.search(r"^pipelined is \d\.\d\d × as fast$", shown, re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")
    prompts = make_batch(pipeline.SETTINGS, CharTokenizer(), 0).batch.bytes()
    rewards = pipeline.SETTINGS.rows * pipeline.SETTINGS.answer_tokens * 4
    model = language_model(pipeline.SETTINGS, len(CharTokenizer()))
    weights = sum(value.nbytes for value in model.parameters())
    assert max(bytes_per_step) < prompts + rewards + weights / 10
