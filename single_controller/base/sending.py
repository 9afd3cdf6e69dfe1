"""Which part of a call's arguments cannot be sent, looked for once sending them has failed.

Pickling is left to the backends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from single_controller.base.plan import Broadcast, PerRank, named_arguments
from single_controller.base.rows import is_future
from single_controller.errors import SendError

__all__ = ["Pickles", "arguments_not_sent", "not_sent"]

Pickles: TypeAlias = Callable[[Any], object]  # raises where a value cannot be pickled


def arguments_not_sent(
    title: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: SendError, pickles: Pickles
) -> SendError:
    """The same error for a method, with the argument, and the part of it, that is the cause."""
    named = ((n, v) for n, v in named_arguments(args, kwargs) if not is_future(v))
    return not_sent(title, named, pickles) or SendError(f"{title}: {error}")


def not_sent(title: str, named: Iterable[tuple[str, Any]], pickles: Pickles) -> SendError | None:
    """The error for the first of these values that cannot be pickled; None if all can."""
    for name, value in named:
        found = _search(value, pickles, ())
        if found is not None:
            path, cause = found
            why = str(cause) or type(cause).__name__
            where = f"{name}: {path.removeprefix('.')}" if path else name
            return SendError(f"{title}: {where} cannot be sent: {why}")
    return None


def _search(value: Any, pickles: Pickles, above: tuple[int, ...]) -> tuple[str, Exception] | None:
    """Where in a value the innermost part is that cannot be pickled, and why; None if all can.

    `above`: the values that hold this one, of which it may be one.
    """
    try:
        pickles(value)
    except Exception as error:
        above = (*above, id(value))
        for where, part in _parts(value, pickles):
            if id(part) not in above:
                found = _search(part, pickles, above)
                if found is not None:
                    return where + found[0], found[1]
        return "", error
    return None


def _parts(value: Any, pickles: Pickles) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Broadcast):
        yield "", value.value
    elif isinstance(value, PerRank):
        yield from ((f"rank {rank}", part) for rank, part in enumerate(value.values))
    elif hasattr(value, "non_tensor_batch"):
        for part in ("batch", "non_tensor_batch", "meta_info"):
            yield f".{part}", getattr(value, part)
    elif isinstance(value, list | tuple):
        if value:
            at = _first(value, pickles)
            yield f"[{at}]", value[at]
    elif getattr(value, "dtype", None) == "O" and value.ndim and len(value):
        at = _first(value, pickles)
        yield f", row {at}", value[at]
    elif isinstance(value, Mapping) or _is_tensordict(value):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif not isinstance(value, type):
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())


def _is_tensordict(value: Any) -> bool:
    module = sys.modules.get("tensordict")
    return module is not None and bool(module.is_tensor_collection(value))


def _first(items: Any, pickles: Pickles) -> int:
    """Where the first element is that cannot be pickled, if the elements are what cannot."""
    first, stop = 0, len(items)
    while stop - first > 1:
        middle = (first + stop) // 2
        try:
            pickles(items[first:middle])
        except Exception:
            stop = middle
        else:
            first = middle
    return first
