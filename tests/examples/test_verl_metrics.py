"""The comparison of two runs of veRL's trainer says what differs."""

from __future__ import annotations

import math

import pytest

from examples.verl.metrics import compare

NAN = math.nan


@pytest.mark.parametrize(
    ("left", "right", "gap"),
    [
        (1.0, 1.0, 0),
        (1, 1.5, 0.5),
        (NAN, NAN, 0),
        (NAN, 1.0, math.inf),
        (1.0, NAN, math.inf),
        ("a", "a", 0),
        ("a", "b", math.inf),
        (None, 1.0, math.inf),
    ],
)
def test_a_metric_is_as_far_apart_as_its_values(left: object, right: object, gap: float) -> None:
    runs = [{"loss": value} if value is not None else {} for value in (left, right)]
    assert dict(compare([runs[0]], [runs[1]])) == {"0: loss": gap}


def test_times_are_left_out_and_steps_are_not() -> None:
    assert dict(compare([{"timing_s/step": 1, "perf/mfu": 2}], [{}])) == {}
    with pytest.raises(ValueError, match="zip"):
        list(compare([{}, {}], [{}]))
