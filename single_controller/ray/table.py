"""What `describe` returns: a group's ranks as a value that prints as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from single_controller.ray.host import HostInfo

__all__ = ["GroupTable", "RankRow"]


@dataclass(frozen=True)
class RankRow:
    """One role on one rank."""

    rank: int
    role: str
    node: str
    device: str
    pid: int


@dataclass(frozen=True)
class GroupTable:
    """One row per rank and role."""

    rows: tuple[RankRow, ...]

    @classmethod
    def of(cls, infos: Sequence[HostInfo], roles: Sequence[str]) -> GroupTable:
        return cls(
            tuple(
                RankRow(info.rank, role, info.node_ip, info.device, info.pid)
                for info in infos
                for role in roles
            )
        )

    def __str__(self) -> str:
        cells = [tuple(RankRow.__annotations__)]
        cells += [tuple(str(value) for value in vars(row).values()) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in lines)
