"""Nodes that are lost, and nodes on which other versions are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import ray

from single_controller import GroupBrokenError, ResourceError, WorkerDiedError
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, process
from single_controller.ray.process import ProcessInfo, check_versions
from tests.faults.victim import Victim
from tests.nodes.conftest import Driver, Nodes
from tests.waiting import eventually

pytestmark = pytest.mark.slow

NAMES = {"127.0.0.9": "left", "127.0.0.10": "right", "127.0.0.11": "spare"}
HERE: dict[str, Any] = {}  # of the driver's process


@pytest.fixture(scope="module")
def driver(nodes: Nodes) -> Iterator[Driver]:
    """On the head, which has no ranks; there is room for one on each of three nodes."""
    nodes.add(1, **{name: address for address, name in NAMES.items()})
    driver = Driver(nodes)
    yield driver
    driver.close()


def start() -> list[str]:
    """A group of two ranks; the address of each one's node."""
    HERE["pool"] = RayResourcePool([1, 1])
    HERE["group"] = RayWorkerGroup(HERE["pool"], RayClassWithInitArgs(Victim))
    return places()


def places() -> list[str]:
    return [row.node for row in HERE["group"].describe().rows]


def sleep() -> None:
    group = HERE["group"]
    HERE["call"] = group.act.submit("sleep")
    assert eventually(lambda: all("in _sleep" in text for text in group.stacks().values()))


def result() -> None:
    HERE["call"].result(timeout=100)


def restart(wait_s: float) -> list[str]:
    HERE["pool"].placement_timeout_s = wait_s
    HERE["group"].restart()
    assert HERE["group"].act("fine") == ["fine", "fine"]
    return places()


def all_reduce() -> list[float]:
    return HERE["group"].all_reduce()  # type: ignore[no-any-return]


def watch() -> None:
    HERE["deaths"] = []
    HERE["group"].start_worker_aliveness_check(0.1, on_death=HERE["deaths"].append)


def death() -> WorkerDiedError:
    assert eventually(lambda: bool(HERE["deaths"]), 60)
    return HERE["deaths"][0]  # type: ignore[no-any-return]


def look() -> Any:
    return HERE["group"].look()


def test_a_node_lost_in_a_call_is_named_and_a_restart_takes_what_is_left(
    nodes: Nodes, driver: Driver
) -> None:
    first, second = driver(start)
    driver(sleep)
    nodes.lose(NAMES.pop(second))
    with pytest.raises(WorkerDiedError, match=rf"rank 1 \(node {second}, pid \d+\)") as caught:
        driver(result)
    assert (caught.value.rank, caught.value.node_ip) == (1, second)
    assert driver(restart, 60) == [first, *(NAMES.keys() - {first})]
    assert driver(all_reduce) == [3.0, 3.0]


def test_a_node_lost_idle_is_named_by_the_watcher_and_the_next_call_and_may_leave_too_little_room(
    nodes: Nodes, driver: Driver
) -> None:
    driver(watch)
    first, second = driver(places)
    nodes.lose(NAMES.pop(first))
    found = driver(death)
    assert (found.rank, found.node_ip) == (0, first)
    with pytest.raises(GroupBrokenError, match=rf"lost a rank: .*rank 0 \(node {first}, pid \d+"):
        driver(look)
    with pytest.raises(ResourceError, match="lost a node, and no other could take its place"):
        driver(restart, 1)
    nodes.add(1, late="127.0.0.12")
    assert driver(restart, 60) == ["127.0.0.12", second]


def log_of_a_start(counts: list[int], options: dict[str, Any]) -> list[str]:
    with TestCase().assertLogs("single_controller", "INFO") as told:
        try:
            with RayResourcePool(counts, **options) as pool:
                RayWorkerGroup(pool, RayClassWithInitArgs(Victim), name_prefix="odd_").close()
        finally:
            assert not [name for name in ray.util.list_named_actors() if name.startswith("odd_")]
    return told.output


def pretend(folder: Path, package: str, version: str) -> None:
    """Have whoever looks there first find another version of a package."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")


def test_versions_that_differ_between_nodes_are_named_and_refused_where_calls_would_break(
    nodes: Nodes, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.add(3, same="127.0.0.20")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    nodes.add(3, odd="127.0.0.21")
    on_both: Any = [1, 1], {"cpus_per_process": 3}
    on_odd: Any = [2], {"resources_per_process": {"odd": 1}}
    pretend(tmp_path, "torch", "1.99")
    (line,) = driver(log_of_a_start, *on_odd)
    here = metadata.version("torch")
    assert f"torch 1.99 instead of {here} on 127.0.0.21 (ranks [0, 1])" in line
    (line,) = driver(log_of_a_start, *on_both)
    assert "on 127.0.0.21 (ranks [1])" in line
    pretend(tmp_path, "ray", "2.0.0")
    with pytest.raises(ResourceError, match=r"ray 2\.0\.0 instead of .*; torch 1\.99"):
        driver(log_of_a_start, *on_odd)


@pytest.mark.parametrize(
    ("theirs", "told", "refused"),
    [
        ({"python": "2.7"}, "python 2.7 instead of 3.11 on 10.0.0.1 (ranks [1])", True),
        ({"ray": "2.60.1"}, "ray 2.60.1 instead of 2.60.0 on 10.0.0.1 (ranks [1])", True),
        ({"numpy": "1.0.1"}, "numpy 1.0.1 instead of 2.4.6 on 10.0.0.1 (ranks [1])", False),
        ({"torch": "2.13.0"}, "", False),
    ],
)
def test_what_calls_would_break_on_is_refused_and_all_else_is_logged(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    theirs: dict[str, str],
    told: str,
    refused: bool,
) -> None:
    own = {"python": "3.11", "ray": "2.60.0", "numpy": "2.4.6"}
    monkeypatch.setattr(process, "versions", lambda: own)
    processes = [ProcessInfo("", f"10.0.0.{rank}", rank) for rank in (0, 1)]
    with pytest.raises(ResourceError) if refused else nullcontext() as error:
        check_versions([own, {**own, **theirs}], processes)
    said = f"{caplog.text}{error.value if error else ''}"
    assert told in said
    assert bool(told) == bool(said)
