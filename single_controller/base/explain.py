"""Values that print as tables: what a call would do, and where the ranks of a group are.

Deciding what a call does is left to the modes; nothing is sent here.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, TypeAlias

from single_controller.base.plan import Call, Handle, loaded

__all__ = [
    "Explanation",
    "GroupTable",
    "Printed",
    "RankRow",
    "RankState",
    "SentArgument",
    "aligned",
    "explain_arguments",
]

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
        cls, places: Sequence[Any], roles: Sequence[str], states: Sequence[RankState], cluster: str
    ) -> GroupTable:
        """The table of ranks at `places`, which have `rank`, `node_ip`, `device` and `pid`."""
        rows = (
            RankRow(place.rank, role, place.node_ip, place.device, place.pid, state)
            for place, state in zip(places, states, strict=True)
            for role in roles
        )
        return cls(tuple(rows), cluster)

    def __str__(self) -> str:
        ranks = aligned([[*RankRow.__annotations__], *(astuple(row) for row in self.rows)])
        return f"{ranks}\ncluster {self.cluster}" if self.cluster else ranks


@dataclass(frozen=True)
class SentArgument:
    """One argument, as some ranks get it.

    `rows`, padding included, and `keys` are None where it is no batch, or one that is still in the
    workers; `bytes`, of its pickle, where they cannot be told.
    """

    ranks: tuple[int, ...]
    name: str
    type: str
    rows: int | None
    keys: tuple[str, ...] | None
    bytes: int | None

    def cells(self) -> tuple[object, ...]:
        return (
            _shown(self.ranks),
            f"{self.name}: {self.type}",
            "-" if self.rows is None else self.rows,
            "-" if self.keys is None else ", ".join(self.keys) or "none",
            "?" if self.bytes is None else f"{self.bytes:,}",
        )


@dataclass(frozen=True)
class Explanation(Printed):
    """What a call would do; it prints as a table. `ranks` are called, and the outputs of `answers`
    count, in this order.
    """

    title: str
    ranks: tuple[int, ...]
    answers: tuple[int, ...]
    arguments: tuple[SentArgument, ...]

    def __str__(self) -> str:
        head = ("ranks", "argument", "rows", "keys", "bytes")
        table = aligned([head, *(argument.cells() for argument in self.arguments)])
        answers = f"; answers of: {_shown(self.answers)}" if self.answers != self.ranks else ""
        return f"{self.title}\n{table}\nranks called: {_shown(self.ranks)}{answers}"


def explain_arguments(
    signature: inspect.Signature,
    calls: Sequence[Call | None],
    size: Callable[[Any], int | None],
) -> tuple[SentArgument, ...]:
    """What dispatch decided for all ranks, each value once; `size` gives the bytes of one."""
    found: dict[tuple[str, int], tuple[Any, list[int]]] = {}
    for rank, call in enumerate(calls):
        if call is not None:
            for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
                found.setdefault((name, id(value)), (value, []))[1].append(rank)
    arguments = []
    for (name, _), (value, ranks) in found.items():
        kind = repr(value) if isinstance(value, Handle) else type(value).__name__
        arguments.append(SentArgument(tuple(ranks), name, kind, *_contents(value), size(value)))
    return tuple(arguments)


def _contents(value: Any) -> tuple[int | None, tuple[str, ...] | None]:
    """Rows and keys of a batch. Where `protocol` is not loaded, there is none."""
    batches = loaded("protocol.batches")
    if batches is None or not batches.is_batch(value):
        return None, None
    tensors = value.batch if hasattr(value, "non_tensor_batch") else value
    keys = () if tensors is None else map(str, tensors.keys())
    return batches.batch_rows(value), (*keys, *getattr(value, "non_tensor_batch", ()))


def _shown(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} … {ranks[-1]}"
    return ", ".join(map(str, ranks))
