"""Giving placement groups back: those of a pool, and detached ones that nothing runs in any more.

Making them is left to `placement`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray._private.state import actors, state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

__all__ = ["await_death", "give_back", "remove"]

_logger = logging.getLogger(__name__)

_REMOVAL_S = 10.0
_DEATH_S = 10.0
_pb: Any = gcs_pb2


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
    dead = _pb.ActorTableData.DEAD
    for actor in map(_pb.ActorTableData.FromString, _accessor().get_actor_table(None, None)):
        if actor.state != dead and actor.actor_id.hex() not in ended:
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


def _placement_group_of(actor_id: str) -> bytes:
    """Where an actor runs, or ran; b"" for one that Ray does not know."""
    found = _accessor().get_actor_info(ray.ActorID.from_hex(actor_id))
    return b"" if found is None else bytes(_pb.ActorTableData.FromString(found).placement_group_id)


def _is_detached(group: bytes) -> bool:
    found = _accessor().get_placement_group_info(ray.PlacementGroupID(group))
    return found is not None and bool(_pb.PlacementGroupTableData.FromString(found).is_detached)


def _accessor() -> Any:
    """Reads the cluster's tables whole: Ray's own readers leave out which placement group."""
    opened: Any = state
    if hasattr(opened, "_connect_and_get_accessor"):
        return opened._connect_and_get_accessor()
    opened._check_connected()  # as ray 2.41 has it
    return opened.global_state_accessor
