"""Values that print as tables: which rank is where, and what `describe` returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

__all__ = ["GroupTable", "Place", "RankRow", "RankState", "aligned"]

RankState: TypeAlias = Literal["alive", "dead", "broken"]


def aligned(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


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
class GroupTable:
    """One row per rank and role."""

    rows: tuple[RankRow, ...]

    @classmethod
    def of(
        cls, places: Sequence[Place], roles: Sequence[str], states: Sequence[RankState]
    ) -> GroupTable:
        return cls(
            tuple(
                RankRow(place.rank, role, place.node_ip, place.device, place.pid, state)
                for place, state in zip(places, states, strict=True)
                for role in roles
            )
        )

    def __str__(self) -> str:
        return aligned(
            [tuple(RankRow.__annotations__), *(tuple(vars(row).values()) for row in self.rows)]
        )
