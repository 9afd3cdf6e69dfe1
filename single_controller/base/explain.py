"""Values that print as tables: what a call would do, and where the ranks of a group are.

Deciding what a call does is left to the modes, and what travels how to the backends; nothing is
sent here.
"""

from __future__ import annotations

import html
import inspect
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, TypeAlias

from single_controller.base.plan import Call, Handle, Layout, Plan, holds_late

__all__ = [
    "Carrier",
    "Explanation",
    "GroupTable",
    "Printed",
    "RankArgument",
    "RankRow",
    "RankState",
    "aligned",
    "explain_arguments",
]

_MOST_NAMED = 8

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


class Carrier:
    """How a backend moves the arguments of one call. This one gives each rank its own copy."""

    def way(self, value: Any) -> str:
        """In a few words, how an argument travels."""
        return "fetched by the rank" if holds_late(value) else "by value"

    def size(self, value: Any) -> int | None:
        """The bytes of an argument on its way; None where that cannot be told."""
        buffers: list[pickle.PickleBuffer] = []
        try:
            data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        except Exception:
            return None
        return len(data) + sum(buffer.raw().nbytes for buffer in buffers)


@dataclass(frozen=True)
class RankArgument:
    """One argument as one rank gets it.

    `rows`, of which `padding` are copies of the last one, and `keys` are None where it is no
    batch, or one that is still in the workers; `bytes` where they cannot be told. `receivers` are
    the ranks that get the same object, which all of these have in one tuple.
    """

    rank: int
    name: str
    type: str
    rows: int | None
    padding: int
    keys: tuple[str, ...] | None
    bytes: int | None
    travels: str
    receivers: tuple[int, ...]

    @property
    def shared_with(self) -> tuple[int, ...]:
        """The other ranks that get the same object."""
        return tuple(rank for rank in self.receivers if rank != self.rank)

    def cells(self) -> tuple[object, ...]:
        peers = len(self.receivers)
        named = _ranks(self.receivers) if peers <= _MOST_NAMED else f"{peers} ranks"
        rows = "-" if self.rows is None else f"{self.rows - self.padding}"
        return (
            self.rank,
            f"{self.name}: {self.type}",
            f"{rows} + {self.padding} padding" if self.padding else rows,
            "-" if self.keys is None else ", ".join(self.keys) or "none",
            "?" if self.bytes is None else f"{self.bytes:,}",
            self.travels + (f", shared by {named}" if peers > 1 else ""),
        )


@dataclass(frozen=True)
class Explanation(Printed):
    """What a call would do; it prints as a table.

    `ranks` are called, `answers` are those whose outputs count, in this order.
    """

    title: str
    mode: str
    ranks: tuple[int, ...]
    answers: tuple[int, ...]
    returns: str
    arguments: tuple[RankArgument, ...]

    def __str__(self) -> str:
        head = ("rank", "argument", "rows", "keys", "bytes", "travels")
        table = [aligned([head, *(a.cells() for a in self.arguments)])] if self.arguments else []
        cut = ", less the padding" if any(a.padding for a in self.arguments) else ""
        result = f"returns {self.returns} of {_ranks(self.answers)}{cut}"
        lines = [f"{self.title} [{self.mode}]", *table, f"calls {_ranks(self.ranks)}; {result}"]
        return "\n".join(lines)


def explain_arguments(
    signature: inspect.Signature | None,
    layout: Layout,
    plan: Plan,
    calls: Sequence[Call | None],
    ranks: Sequence[int],
    carrier: Carrier,
) -> tuple[RankArgument, ...]:
    """What dispatch decided for each argument of each rank.

    `ranks` are those that `layout` and `calls` are of; `signature` has the arguments' names.
    """
    sent = [
        (rank, shard, name, value)
        for rank, shard, call in zip(ranks, layout.dp_ranks, calls, strict=True)
        if call is not None
        for name, value in _named(call, signature)
    ]
    values = {id(value): value for *_, value in sent}
    late = {key for key, value in values.items() if holds_late(value)}
    padding = None if late else plan.padding
    sizes = {key: None if key in late else carrier.size(v) for key, v in values.items()}
    ranks_of: dict[int, dict[int, None]] = {}
    for rank, _, _, value in sent:
        ranks_of.setdefault(id(value), {})[rank] = None
    receivers = {key: tuple(found) for key, found in ranks_of.items()}

    def argument(rank: int, shard: int, name: str, value: Any) -> RankArgument:
        rows, keys = _contents(value)
        padded = 0
        if rows and padding is not None and rows == padding.shard_rows:
            padded = rows - padding.real_rows(shard, rows)
        # Small values that are one object by chance are not shared.
        chance = isinstance(value, int | float | bool | str | bytes | type(None))
        same = (rank,) if chance else receivers[id(value)]
        size, way = sizes[id(value)], carrier.way(value)
        kind = (Handle if isinstance(value, Handle) else type(value)).__name__
        return RankArgument(rank, name, kind, rows, padded, keys, size, way, same)

    return tuple(argument(*one) for one in sent)


def _named(call: Call, signature: inspect.Signature | None) -> Iterator[tuple[str, Any]]:
    """A call's values under the names that the worker's method has for them."""
    parameters = signature.parameters.values() if signature else ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "argument")
    for i, value in enumerate(call.args):
        yield names[i] if i < len(names) else f"{rest}[{i - len(names)}]", value
    yield from call.kwargs.items()


def _contents(value: Any) -> tuple[int | None, tuple[str, ...] | None]:
    """Rows and keys of a batch. Where `protocol` is not loaded, there is none."""
    batches = sys.modules.get("protocol.batches")
    if batches is None or not batches.is_batch(value):
        return None, None
    tensors = value.batch if hasattr(value, "non_tensor_batch") else value
    keys = () if tensors is None else map(str, tensors.keys())
    return batches.batch_rows(value), (*keys, *getattr(value, "non_tensor_batch", ()))


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} … {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
