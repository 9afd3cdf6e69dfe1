"""`ps`, `stacks` and `kill`: which groups run on a cluster, what they do, and ending them.

The driver that started a group need not be this one, nor alive. No host is asked, so that nothing
is added to what it does: Ray's table of actors and the processes themselves say enough.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from single_controller.base.explain import aligned
from single_controller.cli.doctor import connect
from single_controller.ray.placement import (
    at_once,
    await_death,
    give_back,
    in_use,
    living_actors,
    remove,
    reservations,
)
from single_controller.ray.process import ProcessInfo, beside, read_stacks

__all__ = ["kill", "ps", "stacks"]

_HOSTS = ("Host", "AsyncHost")
_NAME = re.compile(r"(.+)_(\d+):(\d+)")  # as hosts are named: group, placement group, bundle
_LOOK_S = 15.0
_END_S = 30.0


def _groups() -> dict[tuple[str, str], list[Any]]:
    """By name and namespace, the hosts of each group by rank, as Ray's table has them."""
    groups: dict[tuple[str, str], dict[tuple[int, int], Any]] = {}
    for actor in living_actors():
        match = _NAME.fullmatch(actor.name)
        if actor.class_name in _HOSTS and match:
            ranks = groups.setdefault((match[1], actor.ray_namespace), {})
            ranks[int(match[2]), int(match[3])] = actor
    return {key: [ranks[at] for at in sorted(ranks)] for key, ranks in sorted(groups.items())}


def _seen(hosts: Sequence[Any], function: Callable[..., list[str]]) -> list[str]:
    """Of each host, what `function(processes)` sees on its node."""
    there = [host for host in hosts if host.pid]
    places = [(h.node_id.hex(), h.address.ip_address, h.pid) for h in there]
    found = beside(function, [ProcessInfo(*place) for place in places], _LOOK_S)
    seen = {h.actor_id: text for h, text in zip(there, found, strict=True)}
    return [seen.get(h.actor_id, "starting") or "node does not answer" for h in hosts]


def _titles(processes: Sequence[ProcessInfo]) -> list[str]:
    """What processes say of themselves, which is the method that they run."""
    found = ["ended" for _ in processes]
    for i, process in enumerate(processes):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{process.pid}/cmdline").read_text().strip("\0")
            found[i] = title or found[i]
    return found


def ps(address: str | None) -> int:
    """Print a line for each rank of each group, and for what is reserved and not used."""
    sys.stdout.write(f"{connect(address or 'auto')}\n")
    ranks = [(name, *item) for (name, _), hosts in _groups().items() for item in enumerate(hosts)]
    rows: list[Sequence[object]] = [("group", "rank", "node", "pid", "runs")]
    titles = _seen([host for *_, host in ranks], _titles)
    for (name, rank, host), title in zip(ranks, titles, strict=True):
        title = title.removeprefix("ray::")
        runs = "idle" if title in _HOSTS else title
        rows.append((name, rank, host.address.ip_address, host.pid, runs))
    sys.stdout.write(f"{aligned(rows)}\n" if ranks else "no groups are running\n")
    used = in_use()
    unused = [one for group, one in reservations().items() if group not in used]
    if unused:
        rows = [(one.name, one.bundles, one.state.lower(), one.creator) for one in unused]
        table = aligned([("reservation", "bundles", "state", "creator"), *rows])
        sys.stdout.write(f"\nreserved without a group (`kill` gives them back):\n{table}\n")
    return 0


def stacks(address: str | None, name: str, namespace: str | None) -> int:
    """Print the Python stacks of a group's hosts, now, also of busy and stuck ones."""
    sys.stdout.write(f"{connect(address or 'auto')}\n")
    for rank, told in enumerate(_seen(_hosts_of(name, namespace), read_stacks)):
        sys.stdout.write(f"rank {rank}\n{told}\n")
    return 0


def kill(address: str | None, name: str, namespace: str | None) -> int:
    """End all hosts of a group, with whatever they are doing, and wait until they are gone.

    A detached reservation that no other actor runs in goes with them; any other stays with the
    driver that made it. A reservation's own name gives it back, with what runs in it.
    """
    sys.stdout.write(f"{connect(address or 'auto')}\n")
    if found := [group for group, one in reservations().items() if one.name == name]:
        remove(found)
        sys.stdout.write(f"gave {name} back\n")
        return 0
    hosts = _hosts_of(name, namespace)
    ids = [host.actor_id.hex() for host in hosts]
    at_once(lambda host: ray.kill(ray.get_actor(host.name, host.ray_namespace)), hosts)
    if left := await_death(ids, _END_S):
        pids = [f"{h.pid} on {h.address.ip_address}" for h in hosts if h.actor_id.hex() in left]
        raise TimeoutError(f"not gone after {_END_S:g} s: {', '.join(pids)}")
    give_back(ids)
    sys.stdout.write(f"ended the {len(ids)} hosts of {name}\n")
    return 0


def _hosts_of(name: str, namespace: str | None) -> list[Any]:
    groups = _groups()
    found = [key for key in groups if key[0] == name and namespace in (None, key[1])]
    if len(found) != 1:
        running = ", ".join(f"{name} (namespace {space})" for name, space in groups) or "-"
        raise ValueError(
            f"{len(found)} groups are called {name!r}: give one's name, and its --namespace where "
            f"several have it. Running: {running}"
        )
    return groups[found[0]]
