"""Arguments that nothing could use are refused by name where they are given, before anything is
started or sent."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ray

from single_controller import (
    ClassWithInitArgs,
    RegistrationError,
    ResourceError,
    ResourcePool,
    Worker,
    inline,
)
from single_controller import ray as on_ray
from single_controller.inline import InlineWorkerGroup, colocate
from single_controller.ray import placement

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"call_timeout_s": "x"}, ValueError, "call_timeout_s must be seconds, .*; got 'x'"),
    ({"call_timeout_s": -1}, ValueError, "call_timeout_s must be seconds, at least 0, .*; got -1"),
    ({"call_timeout_s": True}, ValueError, "call_timeout_s must be seconds, .*; got True"),
    ({"startup_timeout_s": "x"}, ValueError, "startup_timeout_s must be seconds, .*; got 'x'"),
    ({"worker_env": ["A"]}, TypeError, r"worker_env must be a dict of strings .*: \['A'\]"),
    ({"worker_env": {"A": 1}}, TypeError, "worker_env must be a dict of strings .*; got 'A': 1"),
    ({"worker_env": {1: "A"}}, TypeError, "worker_env must be a dict of strings .*; got 1: 'A'"),
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
        ((0,), ValueError, "every_n_seconds must be above 0 and finite; got 0"),
        ((1, 5), TypeError, "on_death must be a function, or None; got 5"),
    ],
)
def test_a_watch_that_could_not_look_or_tell_is_refused(
    inline_group: Any, arguments: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        inline_group(Worker).start_worker_aliveness_check(*arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cpus_per_process": 0}, "cpus_per_process must be a number, more than 0; got 0"),
        ({"cpus_per_process": "x"}, "cpus_per_process must be a number, more than 0; got 'x'"),
        ({"gpus_per_process": None}, "gpus_per_process must be a number, more than 0; got None"),
        ({"resources_per_process": {"a": 0}}, r"resources_per_process\['a'\] must be a .*; got 0"),
        ({"resources_per_process": {"a": "x"}}, "resources_per_process.* must be .*; got 'x'"),
        ({"resources_per_process": {"CPU": 1}}, "must be amounts of custom resources"),
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
    for size in ("x", 1.5, None, [1, "x"], [2.0], 0, 3):
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


@pytest.mark.parametrize("class_dict", [5, {}, [Worker]])
def test_what_names_no_role_is_refused(class_dict: Any) -> None:
    for create in (on_ray.create_colocated_worker_cls, inline.create_colocated_worker_cls):
        with pytest.raises(
            RegistrationError, match=r"class_dict must be .* at least one role; got"
        ):
            create(class_dict)


class Named(Worker):
    def __init__(self, name: str, *, size: int = 1) -> None: ...


def forgiving(function: Any) -> Any:
    @functools.wraps(function)
    def init(self: Any, *_: Any, **__: Any) -> None:
        function(self, "x")

    return init


class Forgiving(Worker):
    @forgiving
    def __init__(self, name: str) -> None: ...


class Doubled(type):
    def __call__(cls, *args: Any) -> Any:
        return super().__call__(*args, *args)


class Twice(Worker, metaclass=Doubled):
    def __init__(self, a: int, b: int) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (("a",), {"zz": 1}, "got an unexpected keyword argument 'zz'"),
        ((), {}, "missing a required argument: 'name'"),
        (("a", 2), {}, "too many positional arguments"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_what_a_constructor_does_not_take_is_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, args: Any, kwargs: Any, match: str, remote: bool
) -> None:
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    cls: Any = ray.remote(Named) if remote else Named
    one: Any = on_ray.RayClassWithInitArgs(cls, *args, **kwargs)
    known = r"Named\(name: str, \*, size: int = 1\): "
    for role, made in {"Named": one, "a": on_ray.create_colocated_worker_cls({"a": one})}.items():
        for start in (
            lambda made=made: on_ray.RayWorkerGroup(on_ray.RayResourcePool([1]), made),
            lambda made=made: InlineWorkerGroup(None, made),
        ):
            with pytest.raises(
                RegistrationError, match=f"role '{role}' cannot be built: {known}{match}"
            ):
                start()


@pytest.mark.parametrize("spec", [(Forgiving, "a", 2), (Twice, 1), (Named, "a"), (Worker,)])
def test_a_constructor_whose_parameters_cannot_be_told_is_left_to_the_worker(spec: Any) -> None:
    with InlineWorkerGroup(None, ClassWithInitArgs(*spec)) as group:
        assert type(group.workers[0]) is spec[0]
