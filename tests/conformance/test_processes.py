"""What only Ray's groups do with several roles: processes, other drivers, options of actors."""

from __future__ import annotations

import gc
import os
import sys
import threading
from concurrent.futures import CancelledError

import pytest
import ray

from single_controller import RegistrationError, WorkerDiedError
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, create_colocated_worker_cls
from tests.conformance.conftest import Backend
from tests.conformance.team import Actor, specs
from tests.waiting import eventually

pytestmark = pytest.mark.parametrize("backend", ["ray"], indirect=True)


def test_a_cancelled_call_holds_up_no_later_one(roles: dict[str, RayWorkerGroup]) -> None:
    @ray.remote(num_cpus=0)
    def slow() -> str:
        return str(threading.Event().wait(1))

    roles["critic"].note(slow.remote())
    dropped = roles["critic"].note.submit("never")
    assert dropped.cancel()
    with pytest.raises(CancelledError, match=r"critic\.note"):
        dropped.result(timeout=30)
    assert "never" not in roles["critic"].notes()[0]


def test_a_group_may_be_called_from_another_process_too(roles: dict[str, RayWorkerGroup]) -> None:
    @ray.remote(num_cpus=0)
    def elsewhere(group: RayWorkerGroup) -> list[str]:
        return group.name()

    assert ray.get(elsewhere.remote(roles["critic"]), timeout=60) == ["critic"] * 2
    assert roles["critic"].name() == ["critic"] * 2


def test_a_dropped_group_ends_its_processes_without_waiting_for_the_collector(
    backend: Backend,
) -> None:
    gc.disable()
    try:
        group = backend.group(specs(backend)["actor"])
        pids = group.pid()
        del group
        assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    finally:
        gc.enable()


def test_roles_that_disagree_on_an_option_are_refused(backend: Backend) -> None:
    first, second = RayClassWithInitArgs(cls=Actor), RayClassWithInitArgs(cls=Actor)
    first.update_options({"max_restarts": 1})
    second.update_options({"max_restarts": 2})
    with pytest.raises(RegistrationError, match="'max_restarts' is 1 and, for role 'b', 2"):
        create_colocated_worker_cls({"a": first, "b": second})


def test_a_spec_is_not_changed_by_starting_from_it(backend: Backend, group: RayWorkerGroup) -> None:
    spec = group.ray_cls_with_init
    assert spec.kwargs == {"meshes": True}
    assert spec.actor_spec() == spec.actor_spec()
    assert dict(spec.actor_spec().options) == {}


def test_an_async_role_that_exits_is_a_death_and_no_hang(backend: Backend) -> None:
    class Leaving(Worker):
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        async def leave(self) -> None: ...

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def exit(self) -> None:
            sys.exit(3)

    with (
        backend.group(backend.spec(Leaving), call_timeout_s=60) as group,
        pytest.raises(WorkerDiedError, match=r"Leaving\.exit"),
    ):
        group.exit()


def test_all_roles_of_a_rank_share_one_process(roles: dict[str, RayWorkerGroup]) -> None:
    assert roles["actor"].pid() == roles["critic"].pid()
    assert len(set(roles["actor"].pid())) == 2
