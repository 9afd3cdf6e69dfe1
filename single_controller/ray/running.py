"""Which groups run on a cluster, found from the cluster's own table of actors, and ending them.

The driver that started a group need not be this one, nor alive.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import ray
from ray._private.state import actors

from single_controller.base.table import aligned
from single_controller.errors import SingleControllerError
from single_controller.ray.holders import shown_bundles
from single_controller.ray.host import AsyncHost, Host
from single_controller.ray.nodes import beside
from single_controller.ray.process import ProcessInfo, read_stacks_by_pid
from single_controller.ray.reservations import (
    Reservation,
    await_death,
    give_back,
    remove,
    reservations,
)
from single_controller.ray.stacks import readable

__all__ = [
    "RunningGroup",
    "RunningHost",
    "find_group",
    "group_stacks",
    "groups_table",
    "kill_group",
    "kill_reservation",
    "reservations_table",
    "running_groups",
    "unused_reservations",
]

_CLASSES = {Host.__name__, AsyncHost.__name__}
_NAME = re.compile(r"(.+)_(\d+):(\d+)")  # as hosts are named: group, placement group, bundle


@dataclass(frozen=True)
class RunningHost:
    """One rank's process. `state` is Ray's, but for those alive: "idle", or "busy" where the host
    did not answer because a call is running.
    """

    rank: int
    node: str
    pid: int
    state: str
    age_s: float
    actor_id: str
    node_id: str


@dataclass(frozen=True)
class RunningGroup:
    """The hosts of a group by rank. `roles` are known where any host could be asked for them."""

    name: str
    namespace: str
    detached: bool
    roles: tuple[str, ...]
    hosts: tuple[RunningHost, ...]


def running_groups(patience_s: float = 1.0) -> list[RunningGroup]:
    """The groups of the cluster that this process is connected to, by name.

    Args:
        patience_s: how long hosts get to say what they hold; one that does not is busy. 0 asks
            none, so that nothing is added to what they do.
    """
    found = []
    for actor in actors().values():
        match = _NAME.fullmatch(actor["Name"])  # pyright: ignore[reportArgumentType]
        if actor["ActorClassName"] in _CLASSES and actor["State"] != "DEAD" and match:  # pyright: ignore[reportArgumentType]
            name, *place = match.groups()
            found.append((name, _job(actor), tuple(map(int, place)), actor))  # pyright: ignore[reportArgumentType]
    found.sort(key=lambda item: item[:3])
    answers = _ask([actor for *_, actor in found], patience_s)
    return [
        _group(name, [actor for *_, actor in members], answers)
        for (name, _), members in groupby(found, key=lambda item: item[:2])
    ]


def _job(actor: Mapping[str, Any]) -> str:
    """Detached actors outlive their job, and a name is unique among them."""
    return "" if actor["IsDetached"] else str(actor["JobID"])


def _namespaces() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        found.setdefault(actor["name"], []).append(actor["namespace"])  # pyright: ignore[reportArgumentType]
    return found


def _handle(actor: Mapping[str, Any], namespaces: Mapping[str, Sequence[str]]) -> tuple[Any, str]:
    """The actor's handle and namespace; None and "" where it is gone."""
    for namespace in namespaces.get(actor["Name"], ()):
        try:
            handle = ray.get_actor(actor["Name"], namespace)
        except ValueError:
            continue
        if handle._actor_id.hex() == actor["ActorID"]:
            return handle, namespace
    return None, ""


def _ask(
    table: Sequence[Mapping[str, Any]], patience_s: float
) -> dict[str, tuple[str, tuple[str, ...] | None]]:
    """For each actor's id, its namespace and roles; None where it did not say in time."""
    namespaces = _namespaces()
    places, refs = {}, {}
    for actor in table:
        handle, places[actor["ActorID"]] = _handle(actor, namespaces)
        if patience_s and handle is not None and actor["State"] == "ALIVE":
            refs[actor["ActorID"]] = handle.whoami.remote()
    waiting = list(refs.values())
    if waiting:
        ray.wait(waiting, num_returns=len(waiting), timeout=patience_s)
    return {key: (place, _roles(refs.get(key))) for key, place in places.items()}


def _roles(ref: Any) -> tuple[str, ...] | None:
    if ref is None:
        return None
    try:
        info, *_ = ray.get(ref, timeout=0)
    except Exception:  # busy, dying, or not set up yet
        return None
    roles: tuple[str, ...] = info.roles
    return roles


def _group(
    name: str,
    table: Sequence[Mapping[str, Any]],
    answers: Mapping[str, tuple[str, tuple[str, ...] | None]],
) -> RunningGroup:
    hosts = []
    for rank, actor in enumerate(table):
        state = actor["State"].lower()
        if state == "alive":
            state = "busy" if answers[actor["ActorID"]][1] is None else "idle"
        since = (actor["StartTime"] or actor["Timestamp"]) / 1_000
        age = max(0.0, time.time() - since) if since else 0.0
        where, node = actor["Address"]["IPAddress"], actor["Address"]["NodeID"]
        hosts.append(RunningHost(rank, where, actor["Pid"], state, age, actor["ActorID"], node))
    said = [answers[actor["ActorID"]] for actor in table]
    roles = next((roles for _, roles in said if roles), ())
    namespace = next((place for place, _ in said if place), "")
    return RunningGroup(name, namespace, table[0]["IsDetached"], roles, tuple(hosts))


def groups_table(groups: Sequence[RunningGroup]) -> str:
    """The groups as a table with a line per rank."""
    rows: list[Sequence[object]] = [("group", "rank", "node", "pid", "roles", "state", "age")]
    for group in groups:
        roles = ",".join(group.roles) or "?"
        rows += [
            (group.name, host.rank, host.node, host.pid, roles, host.state, _age(host.age_s))
            for host in group.hosts
        ]
    return aligned(rows)


def reservations_table(unused: Sequence[Reservation]) -> str:
    """Reservations as a table; `creator` is who made them, whose end gives none but its own back
    before the job ends.
    """
    rows: list[Sequence[object]] = [("reservation", "bundles", "state", "creator")]
    for one in unused:
        creator = "detached" if one.is_detached else "ended" if one.ended else "alive"
        rows.append((one.name, shown_bundles(one.bundles), one.state.lower(), creator))
    return aligned(rows)


def _age(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def unused_reservations() -> list[Reservation]:
    """What is reserved for pools in which no actor runs."""
    return [one for one in reservations() if not one.used]


def kill_reservation(name: str) -> bool:
    """Give the reservation of that name back, with what runs in it; whether there is one."""
    found = [one.group for one in reservations() if one.name == name]
    remove(found)
    return bool(found)


def kill_group(name: str, namespace: str | None = None, timeout_s: float = 30) -> RunningGroup:
    """End all hosts of a group, with whatever they are doing, and wait until they are gone.

    A detached reservation that no other actor runs in goes with them; any other stays with the
    driver that made it.

    Raises:
        ValueError: there is no such group, or several. SingleControllerError: a host is still
            there after `timeout_s`.
    """
    group = find_group(name, namespace)
    namespaces = _namespaces()
    for host in group.hosts:
        actor = actors(host.actor_id)
        handle, _ = _handle(actor, namespaces) if actor else (None, "")
        if handle is not None:
            ray.kill(handle)
    ids = [host.actor_id for host in group.hosts]
    left = await_death(ids, timeout_s)
    if left:
        ranks = [host.rank for host in group.hosts if host.actor_id in left]
        raise SingleControllerError(
            f"ranks {ranks} of {name!r} are not gone after {timeout_s:g} s: end their processes "
            "on their nodes"
        )
    give_back(ids)
    return group


def group_stacks(name: str, namespace: str | None = None, timeout_s: float = 15) -> dict[int, str]:
    """By rank, the Python stacks of a group's hosts, now, also of busy and stuck ones.

    Raises:
        ValueError: there is no such group, or several.
    """
    hosts = find_group(name, namespace).hosts
    processes = [ProcessInfo(host.node_id, host.node, host.pid, 0, -1, "") for host in hosts]
    found = beside(read_stacks_by_pid, processes, timeout_s)
    return {
        host.rank: "no stack: its node does not answer" if dump is None else readable(dump)
        for host, dump in zip(hosts, found, strict=True)
    }


def find_group(name: str, namespace: str | None = None) -> RunningGroup:
    """The group of that name.

    Args:
        namespace: which one, where groups of several drivers have the same name.

    Raises:
        ValueError: there is none, or there are several.
    """
    groups = running_groups(patience_s=0)
    named = [g for g in groups if g.name == name and namespace in (None, g.namespace)]
    if not named:
        names = sorted({group.name for group in groups})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"no group {name!r} runs here{hint} Running: {', '.join(names) or '-'}")
    if len(named) > 1:
        spaces = [group.namespace for group in named]
        raise ValueError(f"{len(named)} groups are called {name!r}: name a namespace of {spaces}")
    return named[0]
