"""Giving placement groups back: those of a pool that is closed or dropped, those whose creator has
ended, and detached ones that nothing runs in any more.

Making them is left to `placement`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray._private.state import actors, state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

__all__ = [
    "Reservation",
    "await_death",
    "crowded",
    "give_back",
    "give_back_when_dropped",
    "new_name",
    "reclaim",
    "remove",
    "reservations",
    "was_killed",
]

_logger = logging.getLogger(__name__)

_REMOVAL_S = 10.0
_DEATH_S = 10.0
_LOOK_S = 0.25  # between looks whether a dropped reservation is empty, at first
_MOST_S = 5.0
_pb: Any = gcs_pb2

_NAME = re.compile(r".+_([0-9a-f]{12})_[0-9a-f]{6}_\d+")  # as `new_name` makes them


@dataclass(frozen=True)
class Reservation:
    """A placement group of some pool. `ended`: whether the process that made it has; `used`:
    whether an actor runs in it.
    """

    name: str
    state: str
    bundles: tuple[dict[str, float], ...]
    node_ids: tuple[str, ...]
    is_detached: bool
    ended: bool
    used: bool
    group: PlacementGroup


def new_name(prefix: str, node: int) -> str:
    """What to call a placement group: it says whose it is. Ray knows no creator but actors."""
    creator = ray.get_runtime_context().get_worker_id()[:12]
    return f"{prefix}_{creator}_{uuid.uuid4().hex[:6]}_{node}"


def reservations() -> list[Reservation]:
    """The placement groups of pools on this cluster, by name, whoever made them."""
    used, ended = {actor.placement_group_id for actor in _living_actors()}, _ended_workers()
    found = []
    for group in map(_pb.PlacementGroupTableData.FromString, _tables().get_placement_group_table()):
        named = _NAME.fullmatch(group.name)
        if named is None or group.state == _pb.PlacementGroupTableData.REMOVED:
            continue
        by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        found.append(
            Reservation(
                group.name,
                _pb.PlacementGroupTableData.PlacementGroupState.Name(group.state),
                tuple(dict(bundle.unit_resources) for bundle in group.bundles),
                tuple(dict.fromkeys(b.node_id.hex() for b in group.bundles if b.node_id)),
                group.is_detached,
                named[1] in ended or (by_actor and group.creator_actor_dead),
                group.placement_group_id in used,
                PlacementGroup(ray.PlacementGroupID(group.placement_group_id)),
            )
        )
    return sorted(found, key=lambda reservation: reservation.name)


def _ended_workers() -> set[str]:
    workers = map(_pb.WorkerTableData.FromString, _tables().get_worker_table())
    return {w.worker_address.worker_id.hex()[:12] for w in workers if not w.is_alive}


def _living_actors() -> Iterator[Any]:
    for actor in map(_pb.ActorTableData.FromString, _tables().get_actor_table(None, None)):
        if actor.state != _pb.ActorTableData.DEAD:
            yield actor


def crowded(bundles: Sequence[tuple[PlacementGroup, int]]) -> list[bool]:
    """By bundle, a placement group's and its index there: whether actors ask for more than it has,
    those among them that it has no room for yet.
    """
    asked: Counter[str] = Counter()
    for actor in _living_actors():
        asked.update(actor.required_resources)
    return [
        any(
            asked[f"{name}_group_{index}_{group.id.hex()}"] > amount + 1e-6
            for name, amount in group.bundle_specs[index].items()
        )
        for group, index in bundles
    ]


def reclaim() -> None:
    """Give back what an actor or a task reserved that has ended: Ray itself would keep it until
    the whole job ends. What still runs in it ends first.
    """
    for reservation in reservations():
        if reservation.ended and not reservation.is_detached:
            _dropped().put(reservation.group.id.binary())


def give_back_when_dropped(groups: Sequence[PlacementGroup]) -> None:
    """Remove each placement group once nobody in this process has it and no actor runs in it."""
    for group in groups:
        weakref.finalize(group, _dropped().put, group.id.binary()).atexit = False


_queue: SimpleQueue[bytes] = SimpleQueue()
_started = threading.Lock()


def _dropped() -> SimpleQueue[bytes]:
    """Takes ids of placement groups: garbage may be collected at any moment, with any lock held."""
    if _started.acquire(blocking=False):
        threading.Thread(target=_give_back_dropped, daemon=True, name="give-back").start()
    return _queue


def _give_back_dropped() -> None:
    left: set[bytes] = set()
    pause = _LOOK_S
    while True:
        with contextlib.suppress(Empty):
            left.add(_queue.get(timeout=pause if left else None))
            pause = _LOOK_S
        pause = min(pause * 1.5, _MOST_S)
        if not ray.is_initialized():
            left.clear()
            continue
        with contextlib.suppress(Exception):  # the cluster is gone, and they with it
            empty = left - {actor.placement_group_id for actor in _living_actors()}
            left -= empty
            for group in empty:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))


def remove(groups: Sequence[PlacementGroup]) -> None:
    """Remove placement groups and return when they are gone; workers in them end. What the cluster
    still has after 10 s is logged.
    """
    for group in groups:
        remove_placement_group(group)
    deadline = time.monotonic() + _REMOVAL_S
    left = list(groups)
    while left := [group for group in left if _state(group) != "REMOVED"]:
        if time.monotonic() > deadline:
            names = ", ".join(
                f"{placement_group_table(group).get('name') or group.id.hex()} "
                f"({_state(group).lower()})"
                for group in left
            )
            _logger.warning(
                "%d of %d placement groups are still there %g s after their removal was asked "
                "for: %s",
                len(left),
                len(groups),
                _REMOVAL_S,
                names,
            )
            return
        time.sleep(0.01)


def _state(group: PlacementGroup) -> str:
    return str(placement_group_table(group).get("state", "REMOVED"))


def give_back(ended: Collection[str]) -> None:
    """Remove the detached placement groups in which these actors ran and no other one does.

    One that is not detached is left to the driver that made it: it goes with that driver.

    Args:
        ended: ids of actors that were told to end. Waits for that: of several who end the last
            actors of a placement group, each then sees the others' end or is seen.
    """
    held = {group for key in ended if (group := _placement_group_of(key)) and _is_detached(group)}
    if not held:
        return
    await_death(ended, _DEATH_S)
    for actor in _living_actors():
        if actor.actor_id.hex() not in ended:
            held.discard(actor.placement_group_id)
    remove([PlacementGroup(ray.PlacementGroupID(group)) for group in held])


def await_death(ended: Collection[str], timeout_s: float) -> list[str]:
    """Wait for the end of actors; the ids of those that are not dead in time."""
    deadline = time.monotonic() + timeout_s
    left = list(ended)
    while left := [key for key in left if actors(key).get("State", "DEAD") != "DEAD"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def was_killed(actor_id: str) -> bool:
    """Whether an actor was ended by `ray.kill`, as groups end theirs."""
    found = _actor(actor_id)
    if found is None or found.state != _pb.ActorTableData.DEAD:
        return False
    context = found.death_cause.actor_died_error_context
    return bool(context.reason == type(context).RAY_KILL)


def _placement_group_of(actor_id: str) -> bytes:
    """Where an actor runs, or ran; b"" for one that Ray does not know."""
    found = _actor(actor_id)
    return b"" if found is None else bytes(found.placement_group_id)


def _actor(actor_id: str) -> Any:
    found = _tables().get_actor_info(ray.ActorID.from_hex(actor_id))
    return None if found is None else _pb.ActorTableData.FromString(found)


def _is_detached(group: bytes) -> bool:
    found = _tables().get_placement_group_info(ray.PlacementGroupID(group))
    return found is not None and bool(_pb.PlacementGroupTableData.FromString(found).is_detached)


def _tables() -> Any:
    """Reads the cluster's tables whole: Ray's own readers leave out which placement group."""
    opened: Any = state
    if hasattr(opened, "_connect_and_get_accessor"):
        return opened._connect_and_get_accessor()
    opened._check_connected()  # as ray 2.41 has it
    return opened.global_state_accessor
