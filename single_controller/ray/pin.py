"""`pin`: a batch that is stored once, however often and to whichever groups it is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from single_controller.errors import GroupBrokenError
from single_controller.ray.parcel import Result
from single_controller.ray.patience import GONE, session
from single_controller.ray.placement import check_started

if TYPE_CHECKING:
    from protocol import DataProtoFuture
    from protocol.batches import Batch

__all__ = ["StoredBatch", "pin"]


def pin(data: Batch) -> DataProtoFuture:
    """Copy a batch into shared memory, as a future that is done.

        pinned = pin(data)
        log_probs = actor.log_probs(pinned)  # each rank takes its rows from shared memory
        values = critic.values(pinned)       # and no byte leaves the driver again

    It is the batch as it is now: what is written into `data` later does not show. The memory is
    free once the future, and what was made of it, are gone. Sent on, it is as any future: to groups
    of any size, by rows, `select`ed, and without a copy where the method is `reads_only`.

    Raises:
        BatchTypeError: neither a DataProto nor a TensorDict.
        ResourceError: Ray has not been started.
    """
    from protocol import BatchTypeError, DataProto, DataProtoFuture
    from protocol.batches import batch_rows, is_batch

    if not is_batch(data):
        raise BatchTypeError(f"data must be a DataProto or TensorDict; got {type(data).__name__}")
    check_started()
    stored = StoredBatch(ray.put(Result(data)), batch_rows(data))
    return DataProtoFuture([stored], isinstance(data, DataProto) and data.is_padding_enabled())


class StoredBatch:
    """A batch in shared memory: a `protocol.future.Source`."""

    def __init__(self, ref: Any, rows: int) -> None:
        self._ref, self._rows, self._session = ref, rows, session()

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_there()
        return StoredBatch, (self._ref, self._rows)

    def _check_there(self) -> None:
        if session() != self._session:
            raise GroupBrokenError(GONE)

    def rows(self, timeout: float | None) -> int:
        return self._rows

    def fetch(self, start: int, stop: int, timeout: float | None) -> Any:
        from protocol.batches import lend_rows
        from protocol.wire import read_as, reading

        self._check_there()
        how = reading()
        if (start, stop) == (0, self._rows):
            return ray.get(self._ref, timeout=timeout)
        with read_as("join" if how == "own" else how):
            batch: Any = ray.get(self._ref, timeout=timeout)
        return lend_rows(batch, start, stop)
