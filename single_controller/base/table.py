"""Values that print as tables: which rank is where, and what `describe` returns."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

__all__ = ["GroupTable", "Place", "Printed", "RankRow", "RankState", "aligned"]

RankState: TypeAlias = Literal["alive", "dead", "broken"]


def aligned(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


class Printed:
    """A value that says all it holds when it is printed; notebooks show it so, too."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Place(Protocol):
    """What is known of the process of a rank."""

    @property
    def rank(self) -> int: ...
    @property
    def node_ip(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def pid(self) -> int: ...


@dataclass(frozen=True)
class RankRow:
    """One role on one rank. `state` "broken": the rank lives, and its group takes no calls."""

    rank: int
    role: str
    node: str
    device: str
    pid: int
    state: RankState


@dataclass(frozen=True)
class GroupTable(Printed):
    """One row per rank and role. `cluster` is the address of Ray's, "" without one."""

    rows: tuple[RankRow, ...]
    cluster: str = ""

    @classmethod
    def of(
        cls,
        places: Sequence[Place],
        roles: Sequence[str],
        states: Sequence[RankState],
        cluster: str,
    ) -> GroupTable:
        return cls(
            tuple(
                RankRow(place.rank, role, place.node_ip, place.device, place.pid, state)
                for place, state in zip(places, states, strict=True)
                for role in roles
            ),
            cluster,
        )

    def __str__(self) -> str:
        ranks = aligned(
            [tuple(RankRow.__annotations__), *(tuple(vars(row).values()) for row in self.rows)]
        )
        return f"{ranks}\ncluster {self.cluster}" if self.cluster else ranks
