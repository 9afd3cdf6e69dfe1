"""Arguments that nothing could use are refused by name where they are given, before anything is
started or sent."""

from __future__ import annotations

from typing import Any

import pytest

from single_controller import (
    ClassWithInitArgs,
    RegistrationError,
    ResourceError,
    ResourcePool,
    Worker,
    inline,
)
from single_controller import ray as on_ray
from single_controller.inline import InlineWorkerGroup
from single_controller.ray import placement

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"call_timeout_s": "x"}, ValueError, "call_timeout_s must be seconds, .*; got 'x'"),
    ({"call_timeout_s": -1}, ValueError, "call_timeout_s must be seconds, at least 0, .*; got -1"),
    ({"call_timeout_s": True}, ValueError, "call_timeout_s must be seconds, .*; got True"),
    ({"startup_timeout_s": "x"}, ValueError, "startup_timeout_s must be seconds, .*; got 'x'"),
    ({"worker_env": ["A"]}, TypeError, r"worker_env must be a dict of strings .*got \['A'\]"),
    ({"worker_env": {"A": 1}}, TypeError, r"worker_env must be a dict of strings .*\{'A': 1\}"),
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


def test_a_watch_that_could_not_look_is_refused(inline_group: Any) -> None:
    with pytest.raises(ValueError, match="every_n_seconds must be above 0 and finite; got 0"):
        inline_group(Worker).start_worker_aliveness_check(0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cpus_per_process": 0}, "cpus_per_process, .* must be numbers, more than 0; got 0, 1 "),
        ({"gpus_per_process": None}, "must be numbers, more than 0; got 1, None and {}"),
        ({"resources_per_process": {"a": "x"}}, "must be numbers, .* and {'a': 'x'}"),
        ({"resources_per_process": {"CPU": 1}}, "custom resources must be .* and {'CPU': 1}"),
        ({"placement_timeout_s": None}, "placement_timeout_s must be seconds, at least 0; got No"),
        ({"max_colocate_count": "x"}, "max_colocate_count must be a whole number, .*; got 'x'"),
    ],
)
def test_amounts_that_no_bundle_could_ask_for_are_refused(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        on_ray.RayResourcePool([1], **options)


def test_a_pool_is_split_into_whole_numbers_of_processes() -> None:
    pool: Any = on_ray.RayResourcePool([2])
    for size in ("x", [1, "x"], [2.0], 0, 3):
        with pytest.raises(ValueError, match="split_size must be whole numbers, at least 1, "):
            on_ray.split_resource_pool(pool, size)  # type: ignore[arg-type]


@pytest.mark.parametrize("use_gpu", [True, False])
def test_a_pool_or_group_before_ray_was_started_says_so(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool
) -> None:
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    spec = on_ray.RayClassWithInitArgs(Worker)
    pool = on_ray.RayResourcePool([2], use_gpu=use_gpu)
    manager = on_ray.ResourcePoolManager({"all": [2]}, {})
    for use in (
        pool.get_placement_groups,
        manager.create_resource_pool,
        lambda: on_ray.split_resource_pool(pool, 1),
        lambda: on_ray.RayWorkerGroup(pool, spec),
        lambda: on_ray.RayWorkerGroup(worker_names=["a"]),
        lambda: on_ray.RayWorkerGroup.from_detached(name_prefix="a"),
        lambda: on_ray.colocate(pool, actor=Worker),
    ):
        with pytest.raises(
            ResourceError, match=r"ray.init\(\) must come before a pool is reserved"
        ):
            use()


def test_what_names_no_role_is_refused() -> None:
    for create in (on_ray.create_colocated_worker_cls, inline.create_colocated_worker_cls):
        with pytest.raises(RegistrationError, match="at least one role is needed"):
            create({})
