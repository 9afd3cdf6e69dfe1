"""Who holds a cluster's resources, for errors that say what is in the way. Closing is theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

__all__ = ["holders", "shown_bundles"]

_SHOWN = 10


def holders(but: Collection[str] = ()) -> str:
    """A line for each placement group that has, or waits for, resources; "" without any.

    `but` are ids of groups to leave out.
    """
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    table: dict[str, Any] = placement_group_table()
    lines = []
    for group in table.values():
        gone = group["state"] in ("REMOVED", "INFEASIBLE") or not group.get("bundles")
        if gone or group["placement_group_id"] in but:
            continue
        bundles = shown_bundles(group["bundles"].values())
        nodes = {addresses.get(node) for node in group.get("bundles_to_node_id", {}).values()}
        where = " and ".join(sorted(node for node in nodes if node)) or "no node yet"
        name = group["name"] or group["placement_group_id"]
        lines.append(f"  {name}: {bundles} on {where} ({group['state'].lower()})")
    if not lines:
        return ""
    more = f"\n  … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    shown = "\n".join(sorted(lines)[:_SHOWN])
    return f"Placement groups (`ray list actors` shows who runs outside of them):\n{shown}{more}"


def shown_bundles(bundles: Iterable[Mapping[str, float]]) -> str:
    """Such as "2 × {CPU: 1}"."""
    asked = Counter(
        ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items()) for bundle in bundles
    )
    return ", ".join(f"{count} × {{{bundle}}}" for bundle, count in asked.items())
