"""The values of one call as they travel: small ones within it, the others in parcels, each value
once for all ranks that get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from single_controller.base.explain import Carrier
from single_controller.base.plan import Call
from single_controller.base.rows import is_future
from single_controller.ray.envelope import Late
from single_controller.ray.parcel import Parcel, Slot, size_of
from single_controller.ray.remote_batch import posted

__all__ = ["Outbox"]

_INLINE = (int, float, bool, type(None))
_INLINE_LENGTH = 1_000


class Outbox(Carrier):
    """Puts the values that the same ranks get into one parcel, and stores it once if these are
    several. Within a parcel, tensors that share memory share the bytes.
    """

    def __init__(
        self,
        calls: Sequence[Call | None],
        reads_only: bool = False,
        count: Callable[[int], None] = lambda size: None,
        offers: Mapping[str, Any] | None = None,
    ) -> None:
        self._reads_only, self._count, self._offers = reads_only, count, offers or {}
        ranks: dict[int, list[int]] = {}
        values: dict[int, Any] = {}
        for rank, call in enumerate(calls):
            for value in call.values() if call else ():
                if not _travels_inline(value):
                    values[id(value)] = value
                    ranks.setdefault(id(value), []).append(rank)
        self._values: dict[tuple[int, ...], list[Any]] = {}
        self._places: dict[int, tuple[tuple[int, ...], int]] = {}
        for key, readers in ranks.items():
            load = self._values.setdefault(tuple(dict.fromkeys(readers)), [])
            self._places[key] = tuple(dict.fromkeys(readers)), len(load)
            load.append(values[key])
        self._stored: dict[tuple[int, ...], Any] = {}

    def way(self, value: Any) -> str:
        if isinstance(value, ray.ObjectRef) or is_future(value):
            return "fetched by the rank"
        if id(value) not in self._places:
            return "within the call"
        readers, _ = self._places[id(value)]
        return "by value" if len(readers) == 1 else "by reference, stored once"

    def size(self, value: Any) -> int | None:
        return None if isinstance(value, ray.ObjectRef) else size_of(value)

    def outgoing(self, call: Call) -> tuple[tuple[Any, ...], list[Any]]:
        """A call's values with `Slot`s for those in parcels, and the parcels."""
        parcels: dict[tuple[int, ...], int] = {}

        def place(value: Any) -> Any:
            if isinstance(value, ray.ObjectRef):
                return Late(value)
            if is_future(value):
                return posted(value, self._offers)
            if id(value) not in self._places:
                return value
            readers, at = self._places[id(value)]
            return Slot(parcels.setdefault(readers, len(parcels)), at)

        placed = tuple(place(value) for value in call.values())
        return placed, [self._parcel(readers) for readers in parcels]

    def _parcel(self, readers: tuple[int, ...]) -> Any:
        if len(readers) == 1:
            return Parcel(self._values[readers], self._reads_only, self._count)
        if readers not in self._stored:
            parcel = Parcel(self._values[readers], self._reads_only, self._count)
            self._stored[readers] = ray.put(parcel)
        return self._stored[readers]


def _travels_inline(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return len(value) < _INLINE_LENGTH
    return isinstance(value, (*_INLINE, ray.ObjectRef)) or is_future(value)
