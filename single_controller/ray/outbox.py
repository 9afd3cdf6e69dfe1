"""The values of one call as they travel: numbers and short texts within it, others in parcels, of
which a large one is stored once for all ranks that get it; so is what their batches have in common.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import ray

from single_controller.base.explain import Carrier
from single_controller.base.plan import Call
from single_controller.base.rows import is_future
from single_controller.errors import SendError
from single_controller.ray.envelope import Late
from single_controller.ray.parcel import Parcel, Slot, size_of
from single_controller.ray.remote_batch import posted

__all__ = ["Outbox"]

_INLINE = (int, float, bool, type(None), str, bytes)
_INLINE_LENGTH = 1_000
_SMALL = 16_384  # bytes that are sent several times sooner than stored once and fetched
_LARGE = 100_000  # bytes that Ray stores anyway, rather than send them within a task

_Readers = tuple[int, ...]


class Outbox(Carrier):
    """Puts the values that the same ranks get into one parcel, and stores it once if these are
    several and it is not small. Within a parcel, tensors that share memory share the bytes.

    What all ranks get within batches of their own (meta_info) is stored once likewise.
    """

    def __init__(
        self,
        calls: Sequence[Call | None],
        reads_only: bool = False,
        count: Callable[[int], None] = lambda size: None,
        late: bool = False,
    ) -> None:
        """`late`: hosts start their calls before these have their turn, and fetch what is stored
        once they have: what Ray gives a task with its start, it can neither spill nor free.
        """
        self._reads_only, self._count, self._late = reads_only, count, late
        self._called = sum(call is not None for call in calls)
        ranks: dict[int, list[int]] = {}
        values: dict[int, Any] = {}
        for rank, call in enumerate(calls):
            for value in call.values() if call else ():
                if not _travels_inline(value):
                    values[id(value)] = value
                    ranks.setdefault(id(value), []).append(rank)
        self._values: dict[_Readers, list[Any]] = {}
        self._places: dict[int, tuple[_Readers, int]] = {}
        for key, readers in ranks.items():
            load = self._values.setdefault(tuple(dict.fromkeys(readers)), [])
            self._places[key] = tuple(dict.fromkeys(readers)), len(load)
            load.append(values[key])
        self._pickled: dict[_Readers, Parcel] = {}
        self._parcels: dict[_Readers, Any] = {}

    def way(self, value: Any) -> str:
        if isinstance(value, ray.ObjectRef) or is_future(value):
            return "fetched by the rank"
        if id(value) not in self._places:
            return "within the call"
        readers, _ = self._places[id(value)]
        try:
            return "by reference, stored once" if self._is_stored(readers) else "by value"
        except SendError:  # there is no telling, and it will not leave
            return "by value"

    def size(self, value: Any) -> int | None:
        return None if isinstance(value, ray.ObjectRef) else size_of(value)

    def pack(self) -> None:
        """Pickle all that goes into parcels.

        Raises:
            SendError: a value cannot be pickled.
        """
        for readers in self._values:
            self._parcel(readers)

    def outgoing(self, call: Call, offers: Mapping[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """A call's values with `Slot`s for those in parcels, and the parcels; futures with
        `offers`, references to where their batches are published.
        """
        numbers: dict[_Readers, int] = {}
        first = [] if self._common is None else [self._common[1]]

        def place(value: Any) -> Any:
            if isinstance(value, ray.ObjectRef):
                return Late(value)
            if is_future(value):
                return posted(value, offers)
            if id(value) not in self._places:
                return value
            readers, at = self._places[id(value)]
            number = numbers.setdefault(readers, len(first) + len(numbers))
            return Slot(number, at, bool(self._slots(readers, value)))

        placed = tuple(place(value) for value in call.values())
        return placed, first + [self._parcel(readers) for readers in numbers]

    @cached_property
    def _common(self) -> tuple[dict[int, Slot], Any] | None:
        """By id, where what all ranks get within batches of their own is in a parcel that goes
        first with each call, and that parcel; None if it is small, or there is nothing.
        """
        holders: dict[int, set[int]] = {}
        items: dict[int, Any] = {}
        for readers, load in self._values.items():
            for value in load if len(readers) < self._called else ():
                for item in _shared(value).values():
                    if not _travels_inline(item):
                        items[id(item)] = item
                        holders.setdefault(id(item), set()).update(readers)
        common = [key for key in items if len(holders[key]) == self._called]
        parcel = self._packed([items[key] for key in common]) if common else None
        if parcel is None or parcel.size < _SMALL:
            return None
        return {key: Slot(0, at) for at, key in enumerate(common)}, self._put(parcel)

    def _slots(self, readers: _Readers, value: Any) -> dict[str, Slot]:
        """What goes in place of what a value has in common with those of all ranks."""
        if self._common is None or len(readers) == self._called:
            return {}
        slots, _ = self._common
        shared = _shared(value).items()
        return {key: slots[id(item)] for key, item in shared if id(item) in slots}

    def _parcel(self, readers: _Readers) -> Any:
        if readers not in self._parcels:
            parcel = self._parcel_of(readers)
            stored = self._is_stored(readers) or (self._late and parcel.size > _LARGE)
            self._parcels[readers] = self._put(parcel) if stored else parcel
        return self._parcels[readers]

    def _is_stored(self, readers: _Readers) -> bool:
        return len(readers) > 1 and self._parcel_of(readers).size >= _SMALL

    def _parcel_of(self, readers: _Readers) -> Parcel:
        if readers not in self._pickled:
            load = [_replaced(v, self._slots(readers, v)) for v in self._values[readers]]
            self._pickled[readers] = self._packed(load)
        return self._pickled[readers]

    def _put(self, parcel: Parcel) -> Any:
        stored = ray.put(parcel)
        return Late(stored) if self._late else stored

    def _packed(self, values: Sequence[Any]) -> Parcel:
        return Parcel(values, self._reads_only, self._count)


def _shared(value: Any) -> dict[str, Any]:
    """What all rows of a batch share, by key; nothing for any other value."""
    batches = sys.modules.get("protocol.batches")  # where it is not loaded, there are none
    return batches.shared_values(value) if batches and batches.is_batch(value) else {}


def _replaced(value: Any, slots: Mapping[str, Slot]) -> Any:
    if not slots:
        return value
    from protocol.batches import set_shared_values

    twin = copy.copy(value)
    set_shared_values(twin, slots)
    return twin


def _travels_inline(value: Any) -> bool:
    if type(value) in _INLINE:
        return not isinstance(value, str | bytes) or len(value) < _INLINE_LENGTH
    return isinstance(value, ray.ObjectRef) or is_future(value)
