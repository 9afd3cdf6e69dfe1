"""Whether nodes can hold a pool, and if not, what is short: arithmetic on resource tables.

Reserving is left to `placement`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from single_controller.device import DEVICE_KINDS

__all__ = ["NodeResources", "PoolRequest"]

_SEARCH_LIMIT = 10_000
_DEVICES = {kind.resource for kind in DEVICE_KINDS}


@dataclass(frozen=True)
class NodeResources:
    """What a node has, and what of it nobody holds."""

    ip: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class PoolRequest:
    """`counts[i]` bundles, each of `bundle`, form placement group i under `strategy`."""

    counts: tuple[int, ...]
    bundle: Mapping[str, float]
    strategy: str = "STRICT_PACK"

    def fits(self, nodes: Sequence[NodeResources]) -> bool:
        """Whether empty nodes could hold it; True as well where only Ray's own search can tell."""
        capacities = [self._capacity(node.total) for node in nodes]
        if self.strategy == "STRICT_PACK":
            return _packs(list(self.counts), capacities)
        if self.strategy == "STRICT_SPREAD":
            capacities = [min(capacity, len(self.counts)) for capacity in capacities]
            if max(self.counts, default=0) > sum(capacity > 0 for capacity in capacities):
                return False
        return sum(self.counts) <= sum(capacities)

    def _capacity(self, resources: Mapping[str, float]) -> int:
        """How many bundles these resources hold."""
        holds = (
            math.floor(resources.get(name, 0) / need + 1e-9)
            for name, need in self.bundle.items()
            if need > 0
        )
        return min(holds, default=sum(self.counts))

    def explain(self, nodes: Sequence[NodeResources]) -> str:
        """Asked, total and free per resource and per node, and the smallest changes that fit."""
        processes = sum(self.counts)
        rows = [("resource", "asked", "total", "free")]
        for name, need in self.bundle.items():
            total = sum(node.total.get(name, 0) for node in nodes)
            free = sum(node.free.get(name, 0) for node in nodes)
            rows.append((name, f"{need * processes:g}", f"{total:g}", f"{free:g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines = [
            f"process_on_nodes={list(self.counts)} under {self.strategy} asks for {processes} × "
            + _show(self.bundle),
            *(f"  {line}".rstrip() for line in table),
        ]
        for node in nodes:
            lines.append(
                f"  node {node.ip} holds {self._capacity(node.total)} processes, "
                f"{self._capacity(node.free)} now"
            )
        lines.append("Smallest change that fits: " + "; or ".join(self._changes(nodes)))
        return "\n".join(lines)

    def _changes(self, nodes: Sequence[NodeResources]) -> list[str]:
        if self.fits(nodes):
            return ["close what holds the resources, or raise placement_timeout_s"]
        changes = []
        fewer = self._fewer_processes(nodes)
        if fewer:
            changes.append(f"process_on_nodes={list(fewer)}")
        for name, need in self.bundle.items():
            without = PoolRequest(
                self.counts, {k: v for k, v in self.bundle.items() if k != name}, self.strategy
            )
            if not without.fits(nodes):
                continue
            share = self._largest_share(name, need, nodes)
            if share and not name.startswith("accelerator_type"):
                changes.append(_asking(name, share))
            largest = max(self.counts) * need
            if name == "CPU":
                if cpus := self._larger_node(nodes):
                    changes.append(f"a node with {cpus:g} CPUs (ray.init(num_cpus={cpus:g}))")
            elif name.startswith("accelerator_type:"):
                changes.append(self._other_types(name, nodes))
            elif name not in _DEVICES:
                changes.append(f"nodes with {largest:g} {name}, or no {name} in the pool")
            else:
                changes.append(f"use_gpu=False; or nodes with {largest:g} {name}s")
        return changes or ["more nodes: each resource alone would do, but not together"]

    def _other_types(self, name: str, nodes: Sequence[NodeResources]) -> str:
        prefix = "accelerator_type:"
        found = {key for node in nodes for key in node.total if key.startswith(prefix)}
        fitting = []
        for key in sorted(found):
            bundle = {key if k == name else k: need for k, need in self.bundle.items()}
            if PoolRequest(self.counts, bundle, self.strategy).fits(nodes):
                fitting.append(f"accelerator_type={key.removeprefix(prefix)!r}")
        return " or ".join([*fitting, "accelerator_type=None"])

    def _larger_node(self, nodes: Sequence[NodeResources]) -> float:
        """CPUs of a node that, in place of a single one or beside several, makes it fit; or 0."""
        for processes in range(1, sum(self.counts) + 1):
            cpus = processes * self.bundle["CPU"]
            total = {**(nodes[0].total if nodes else {}), "CPU": cpus}
            node = NodeResources("", total, total)
            if self.fits([node, *(nodes if len(nodes) > 1 else ())]):
                return cpus
        return 0

    def _fewer_processes(self, nodes: Sequence[NodeResources]) -> tuple[int, ...]:
        """The counts, in their order, less as few processes as it takes."""
        if self.strategy == "STRICT_PACK":
            kept = _most(self.counts, [self._capacity(node.total) for node in nodes])
            return tuple(count for count in kept if count)
        counts = list(self.counts)
        while counts and not PoolRequest(tuple(counts), self.bundle, self.strategy).fits(nodes):
            largest = counts.index(max(counts))
            counts[largest] -= 1
            counts = [count for count in counts if count]
        return tuple(counts)

    def _largest_share(self, name: str, need: float, nodes: Sequence[NodeResources]) -> float:
        """The largest 1/2, 1/3, … of `need` that fits; 0 if even a sixteenth does not."""
        for parts in range(2, 17):
            share = math.floor(need / parts * 1_000) / 1_000
            smaller = PoolRequest(self.counts, {**self.bundle, name: share}, self.strategy)
            if smaller.fits(nodes):
                return share
        return 0


def _asking(name: str, amount: float) -> str:
    """How a pool asks for an amount of a resource per process."""
    if name == "CPU":
        return f"cpus_per_process={amount:g}"
    if name in _DEVICES:
        return f"gpus_per_process={amount:g}"
    return f"resources_per_process={{{name!r}: {amount:g}}}"


def _show(bundle: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {need:g}" for name, need in bundle.items()) + "}"


def _packs(counts: list[int], capacities: list[int]) -> bool:
    """Whether each count fits whole into one of the capacities, several into one as well.

    Exact up to `_SEARCH_LIMIT` steps; beyond, the answer is yes and Ray decides.
    """
    steps = 0

    def place(left: list[int], room: tuple[int, ...]) -> bool:
        nonlocal steps
        steps += 1
        if not left or steps > _SEARCH_LIMIT:
            return True
        for capacity in sorted({c for c in room if c >= left[0]}):
            rest = list(room)
            rest.remove(capacity)
            if place(left[1:], (*rest, capacity - left[0])):
                return True
        return False

    return sum(counts) <= sum(capacities) and place(sorted(counts, reverse=True), tuple(capacities))


def _most(counts: Sequence[int], capacities: Sequence[int]) -> tuple[int, ...]:
    """What to keep of each count so that each fits whole into one of the capacities and the sum is
    the largest; among equal sums the earlier counts keep more.

    Exact up to `_SEARCH_LIMIT` steps; beyond, each count takes the first good place.
    """
    steps = 0

    @functools.cache
    def keep(at: int, room: tuple[int, ...]) -> tuple[int, ...]:
        nonlocal steps
        steps += 1
        places = sorted({capacity for capacity in room if capacity})
        if at == len(counts) or not places:
            return (0,) * (len(counts) - at)
        if steps > _SEARCH_LIMIT:
            places = [next((p for p in places if p >= counts[at]), places[-1])]
        found = []
        for place in places:
            taken, rest = min(counts[at], place), list(room)
            rest.remove(place)
            found.append((taken, *keep(at + 1, tuple(sorted((*rest, place - taken))))))
        return max(found, key=lambda kept: (sum(kept), kept))

    return keep(0, tuple(sorted(capacities)))
