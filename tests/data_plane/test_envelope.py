"""What goes to a host with a call goes as bytes, unless a receiver could read these differently."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from single_controller.base.dispatch import OneToAll
from single_controller.base.plan import Layout
from single_controller.base.spans import CallMark
from single_controller.ray.envelope import Envelope, Late, opened, sealed
from single_controller.ray.parcel import Slot


class Stage(str, enum.Enum):
    FIRST = "first"


def envelope(*values: Any, names: tuple[str, ...] = (), method: str = "update") -> Envelope:
    mark = CallMark(1, 2, 3)
    return Envelope(
        "actor", method, values, names, True, False, True, ("me", 4), "t:0", False, ("u",), mark
    )


def test_plain_values_and_slots_travel_as_bytes_and_arrive_as_they_were() -> None:
    sent = envelope(1, 2.5, True, None, "text", b"raw", Slot(0, 1), names=("raw", "slot"))
    packed = sealed(sent)
    assert isinstance(packed, bytes)
    assert opened(packed) == sent
    assert type(opened(packed).values[-1]) is Slot


@pytest.mark.parametrize("value", [Late("a reference"), Stage.FIRST])
def test_references_and_values_of_other_classes_are_left_to_ray(value: Any) -> None:
    for sent in (envelope(value), envelope(7, value, names=("by_name",))):
        assert sealed(sent) is sent
        assert opened(sent) is sent


@pytest.mark.parametrize(
    ("differs", "by_title"),
    [
        ({}, True),
        ({"values": (1,)}, False),
        ({"answers": False}, False),
        ({"turn": ("me", 0)}, False),
        ({"keeps": "t:0"}, False),
        ({"publishes": False}, False),
        ({"claims": ("u",)}, False),
        ({"mark": CallMark(1, 2, 3)}, False),
    ],
)
def test_the_title_of_its_task_says_a_call_where_there_is_no_more_to_say(
    monkeypatch: pytest.MonkeyPatch, differs: dict[str, Any], by_title: bool
) -> None:
    bare = Envelope("the.actor", "update", (), (), True, False, True, None, None, None, (), None)
    sent = bare._replace(**differs)
    task = SimpleNamespace(get_task_name=lambda: "the.actor.update")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: task)
    assert (sealed(sent) is None) == by_title
    assert opened(sealed(sent)) == sent


def test_names_of_other_classes_are_left_to_ray() -> None:
    for sent in (envelope(method=Stage.FIRST), envelope(1, names=(Stage.FIRST,))):
        assert sealed(sent) is sent


def test_a_call_without_arguments_is_one_value_for_all_ranks() -> None:
    _, (first, *others) = OneToAll().dispatch(Layout.flat(8), (), {})
    assert first is not None
    assert first.values() == ()
    assert len(others) == 7
    assert all(call is first for call in others)
