"""Arguments that nothing could use are refused by name where they are given, before anything is
started or sent."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ray
import torch

from single_controller import (
    ClassWithInitArgs,
    DispatchError,
    PerRank,
    RegistrationError,
    ResourceError,
    ResourcePool,
    Worker,
    inline,
    trace,
)
from single_controller import ray as on_ray
from single_controller.inline import InlineWorkerGroup, colocate
from single_controller.ray import placement, switched

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


@pytest.mark.parametrize("name", [5, None, "a method of the group"])
def test_a_method_is_named_by_a_string(inline_group: Any, name: Any) -> None:
    group = inline_group(Worker)
    method = group.execute_func_rank_zero if isinstance(name, str) else name
    for use in (group.explain, group.execute_all, group.execute_all_sync, group.execute_rank_zero):
        with pytest.raises(TypeError, match="method_name must be a method's name, a string; got "):
            use(method, "x")


@pytest.mark.parametrize("values", [5, {0: 1}, {1, 2}, iter([1, 2]), torch.tensor(5)], ids=repr)
def test_what_has_no_value_for_each_rank_is_refused(values: Any) -> None:
    with pytest.raises(DispatchError, match="PerRank needs a list, one value per rank; got "):
        PerRank(values)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cpus_per_process": 0}, "cpus_per_process must be a number, more than 0; got 0"),
        ({"cpus_per_process": "x"}, "cpus_per_process must be a number, more than 0; got 'x'"),
        ({"gpus_per_process": None}, "gpus_per_process must be a number, more than 0; got None"),
        ({"resources_per_process": {"a": 0}}, r"resources_per_process\['a'\] must be a .*; got 0"),
        ({"resources_per_process": {"a": "x"}}, "resources_per_process.* must be .*; got 'x'"),
        ({"placement_timeout_s": None}, "placement_timeout_s must be seconds, at least 0; got No"),
        ({"max_colocate_count": "x"}, "max_colocate_count must be a whole number, .*; got 'x'"),
    ],
)
def test_amounts_that_no_bundle_could_ask_for_are_refused(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        on_ray.RayResourcePool([1], **options)


def test_pools_are_made_of_pools() -> None:
    pool: Any = on_ray.RayResourcePool([2])
    wrong: Any = 5
    for split in (on_ray.split_resource_pool, switched.split_unreserved):
        with pytest.raises(TypeError, match=r"resource_pool must be a .*ResourcePool; got 5"):
            split(wrong, 1)
        for size in ("x", 1.5, None, [1, "x"], [2.0], 0, 3):
            with pytest.raises(ValueError, match="split_size must be whole numbers, at least 1, "):
                split(pool, size)  # type: ignore[arg-type]
    for merge in (on_ray.merge_resource_pool, switched.merge_unreserved):
        with pytest.raises(TypeError, match=r"rp2 must be a .*ResourcePool; got 5"):
            merge(pool, wrong)
        with pytest.raises(TypeError, match=r"rp1 must be a .*ResourcePool; got 5"):
            merge(wrong, pool)


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


WRONG_TYPES: list[tuple[Any, str]] = [
    (lambda: on_ray.parallel_put(5), "data_list must be a list of values; got 5"),  # type: ignore[arg-type]
    (lambda: trace(5), "path must be the path of a file to write; got 5"),  # type: ignore[arg-type]
    (lambda: on_ray.create_colocated_worker_cls(5), "class_dict must be a dict of .*; got 5"),  # type: ignore[arg-type]
    (lambda: inline.create_colocated_worker_cls(5), "class_dict must be a dict of .*; got 5"),  # type: ignore[arg-type]
    (lambda: inline.create_colocated_worker_cls({}), "class_dict .* at least one role; got {}"),
    (lambda: spec().update_options(5), "options must be a dict of Ray's options by name; got 5"),
    (lambda: spec().set_additional_resource(5), "additional_resource must be a dict .*; got 5"),
    (lambda: on_ray.RayWorkerGroup(5, spec()), "resource_pool must be a RayResourcePool, .*; got"),  # type: ignore[arg-type]
    (lambda: InlineWorkerGroup(5, spec()), "resource_pool must be a ResourcePool, .*; got 5"),  # type: ignore[arg-type]
]


def spec() -> Any:
    return on_ray.RayClassWithInitArgs(Worker)


@pytest.mark.parametrize(("use", "match"), WRONG_TYPES)
def test_what_is_of_a_wrong_type_is_named(use: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        use()


@pytest.mark.parametrize("capacity", [0, "x"])
def test_a_trace_keeps_at_least_one_span(capacity: Any) -> None:
    with pytest.raises(ValueError, match="capacity must be a whole number, at least 1; got "):
        trace("never_written.json", capacity=capacity)


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
