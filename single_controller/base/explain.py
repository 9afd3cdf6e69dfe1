"""What a call would do: which rank gets what, how it travels, how outputs become one result.

Deciding that is left to the modes, and what travels how to the backends; nothing is sent here.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from single_controller.base.plan import Call, Layout, Plan
from single_controller.base.rows import is_future
from single_controller.base.table import Printed, aligned

__all__ = ["Carrier", "Explanation", "RankArgument", "explain_arguments"]


class Carrier:
    """How a backend moves the arguments of one call. This one gives each rank its own copy."""

    def way(self, value: Any) -> str:
        """In a few words, how an argument travels."""
        return "fetched by the rank" if is_future(value) else "by value"

    def size(self, value: Any) -> int | None:
        """The bytes of an argument on its way; None where that cannot be told."""
        return _pickled_size(value)


def _pickled_size(value: Any) -> int | None:
    """The bytes of a value as pickled, its out-of-band buffers included; None if it cannot be."""
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
    batch, or one that is still in the workers; `bytes` where they cannot be told. `shared_with`
    are the other ranks that get the same object.
    """

    rank: int
    name: str
    type: str
    rows: int | None
    padding: int
    keys: tuple[str, ...] | None
    bytes: int | None
    travels: str
    shared_with: tuple[int, ...]

    def cells(self) -> tuple[str, ...]:
        rows = "-" if self.rows is None else str(self.rows - self.padding)
        if self.padding:
            rows += f" + {self.padding} padding"
        shared = f", shared with {_ranks(self.shared_with)}" if self.shared_with else ""
        return (
            str(self.rank),
            f"{self.name}: {self.type}",
            rows,
            "-" if self.keys is None else ", ".join(self.keys) or "none",
            "?" if self.bytes is None else f"{self.bytes:,}",
            self.travels + shared,
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
        lines = [f"{self.title} [{self.mode}]"]
        if self.arguments:
            head = ("rank", "argument", "rows", "keys", "bytes", "travels")
            lines.append(aligned([head, *(argument.cells() for argument in self.arguments)]))
        pads = any(argument.padding for argument in self.arguments)
        cut = ", less the padding" if pads else ""
        lines += [
            f"calls {_ranks(self.ranks)}; returns {self.returns} of {_ranks(self.answers)}{cut}"
        ]
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
    named = [
        (rank, shard, name, value)
        for rank, shard, call in zip(ranks, layout.dp_ranks, calls, strict=True)
        for name, value in _named(call, signature)
    ]
    receivers: dict[int, list[int]] = {}
    sizes: dict[int, int | None] = {}
    for rank, _, _, value in named:
        receivers.setdefault(id(value), []).append(rank)
        if id(value) not in sizes:
            sizes[id(value)] = None if is_future(value) else carrier.size(value)
    waits = any(is_future(value) for *_, value in named)
    padding = None if waits or plan.padding is None else plan.padding()
    arguments = []
    for rank, shard, name, value in named:
        rows, keys = _contents(value)
        real = rows if padding is None else padding.real_rows(shard)
        arguments.append(
            RankArgument(
                rank=rank,
                name=name,
                type=type(value).__name__,
                rows=rows,
                padding=0 if rows is None or real is None else rows - real,
                keys=keys,
                bytes=sizes[id(value)],
                travels=carrier.way(value),
                shared_with=_others(rank, value, receivers[id(value)]),
            )
        )
    return tuple(arguments)


def _named(call: Call | None, signature: inspect.Signature | None) -> Iterator[tuple[str, Any]]:
    """A call's values under the names that the worker's method has for them."""
    if call is None:
        return
    names, rest = [], "argument"
    for parameter in signature.parameters.values() if signature else ():
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = parameter.name
        elif parameter.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            names.append(parameter.name)
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


def _others(rank: int, value: Any, receivers: Sequence[int]) -> tuple[int, ...]:
    """Small values that are one object by chance are not shared."""
    if isinstance(value, int | float | bool | str | bytes | type(None)):
        return ()
    return tuple(dict.fromkeys(other for other in receivers if other != rank))


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} … {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
