"""Options that no group can use are refused when it is made, before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from single_controller import ClassWithInitArgs, ResourcePool, Worker
from single_controller import ray as on_ray
from single_controller.inline import InlineWorkerGroup, colocate

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"call_timeout_s": "x"}, ValueError, "call_timeout_s must be seconds, .*; got 'x'"),
    ({"call_timeout_s": -1}, ValueError, "call_timeout_s must be seconds, at least 0, .*; got -1"),
    ({"call_timeout_s": True}, ValueError, "call_timeout_s must be seconds, .*; got True"),
    ({"startup_timeout_s": "x"}, ValueError, "startup_timeout_s must be seconds, .*; got 'x'"),
    ({"worker_env": ["A"]}, TypeError, r"worker_env must be a dict of strings .*; got \['A'\]"),
    ({"worker_env": {"A": 1}}, TypeError, "worker_env must be a dict of strings .*; got 'A': 1"),
    ({"worker_env": {1: "A"}}, TypeError, "worker_env must be a dict of strings .*; got 1: 'A'"),
    ({"name_prefix": 5}, TypeError, "name_prefix must be a string, or None; got 5"),
]


def on_ray_group(**options: Any) -> Any:
    """Where the options are not looked at first, it misses `ray.init()`."""
    spec = on_ray.RayClassWithInitArgs(Worker)
    return on_ray.RayWorkerGroup(on_ray.RayResourcePool([1]), spec, **options)


@pytest.mark.parametrize(("options", "error", "match"), WRONG)
def test_an_option_that_no_call_could_use_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        InlineWorkerGroup(ResourcePool([1]), ClassWithInitArgs(Worker), **options)
    with pytest.raises(error, match=match):
        on_ray_group(**options)


@pytest.mark.parametrize("option", ["call_timeout_s", "startup_timeout_s"])
def test_colocate_refuses_what_groups_refuse(option: str) -> None:
    for make in (colocate, on_ray.colocate):
        pool = ResourcePool([1]) if make is colocate else on_ray.RayResourcePool([1])
        with pytest.raises(ValueError, match=f"{option} must be seconds"):
            make(pool, actor=Worker, **{option: "x"})  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("x",), ValueError, "every_n_seconds must be a finite number above 0; got 'x'"),
        ((1, 5), TypeError, "on_death must be a function, or None; got 5"),
    ],
)
def test_a_watch_that_could_not_look_or_tell_is_refused(
    inline_group: Any, arguments: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        inline_group(Worker).start_worker_aliveness_check(*arguments)
