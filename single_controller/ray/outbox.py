"""The values of one call as they travel: numbers and short texts within it, others in parcels, of
which a large one is stored once for all ranks that get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import inf
from typing import Any

import ray

from single_controller.base.explain import Carrier
from single_controller.base.plan import Call
from single_controller.base.rows import is_future
from single_controller.ray.envelope import Late
from single_controller.ray.parcel import Parcel, Slot, size_of
from single_controller.ray.remote_batch import posted

__all__ = ["Outbox"]

_INLINE = (int, float, bool, type(None), str, bytes)
_INLINE_LENGTH = 1_000
_SMALL = 16_384  # bytes that are sent several times sooner than stored once and fetched
_LARGE = 100_000  # bytes that Ray stores anyway, rather than send them within a task
_FEW = 100


class Outbox(Carrier):
    """Puts the values that the same ranks get into one parcel, and stores it once if these are
    several and it is not small. Within a parcel, tensors that share memory share the bytes.
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
        self._parcels: dict[tuple[int, ...], Any] = {}

    def way(self, value: Any) -> str:
        if isinstance(value, ray.ObjectRef) or is_future(value):
            return "fetched by the rank"
        if id(value) not in self._places:
            return "within the call"
        readers, _ = self._places[id(value)]
        return "by reference, stored once" if self._is_stored(readers) else "by value"

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
        parcels: dict[tuple[int, ...], int] = {}

        def place(value: Any) -> Any:
            if isinstance(value, ray.ObjectRef):
                return Late(value)
            if is_future(value):
                return posted(value, offers)
            if id(value) not in self._places:
                return value
            readers, at = self._places[id(value)]
            return Slot(parcels.setdefault(readers, len(parcels)), at)

        placed = tuple(place(value) for value in call.values())
        return placed, [self._parcel(readers) for readers in parcels]

    def _parcel(self, readers: tuple[int, ...]) -> Any:
        if readers not in self._parcels:
            parcel = Parcel(self._values[readers], self._reads_only, self._count)
            stored = self._is_stored(readers) or (self._late and parcel.size > _LARGE)
            sent = ray.put(parcel) if stored else parcel
            self._parcels[readers] = Late(sent) if stored and self._late else sent
        return self._parcels[readers]

    def _is_stored(self, readers: tuple[int, ...]) -> bool:
        return len(readers) > 1 and not _is_small(self._values[readers])


def _is_small(value: Any) -> bool:
    """Whether it is seen at once that a value takes few bytes."""
    try:
        return _left(value, _SMALL) >= 0
    except Exception:  # a sparse tensor says nothing of its bytes, a lazy stack not what is in it
        return False


def _left(value: Any, budget: float, depth: int = 5) -> float:
    """What is left of so many bytes; less than nothing where that is not seen at once."""
    if isinstance(value, str | bytes):
        return budget - len(value)
    if isinstance(value, _INLINE):
        return budget - 8
    if hasattr(value, "non_tensor_batch"):
        parts: Any = (value.batch, value.non_tensor_batch, value.meta_info)
    elif isinstance(value, Mapping):
        parts = list(chain.from_iterable(value.items()))
    elif isinstance(value, list | tuple):
        parts = value
    elif getattr(value, "dtype", None) == "O":
        parts = value.ravel()
    else:
        size = getattr(value, "nbytes", inf)
        return budget - (size if isinstance(size, int) else inf)
    if not depth or len(parts) > _FEW:
        return -inf
    for part in parts:
        if budget < 0:
            break
        budget = _left(part, budget, depth - 1)
    return budget


def _travels_inline(value: Any) -> bool:
    if type(value) in _INLINE:
        return not isinstance(value, str | bytes) or len(value) < _INLINE_LENGTH
    return isinstance(value, ray.ObjectRef) or is_future(value)
