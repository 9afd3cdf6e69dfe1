"""`pin` without process boundaries: a batch that is copied once, however often it is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from single_controller.inline.privacy import Handle, Package

if TYPE_CHECKING:
    from protocol import DataProtoFuture
    from protocol.batches import Batch

__all__ = ["PinnedBatch", "pin"]


def pin(data: Batch) -> DataProtoFuture:
    """The batch as it is now, as a future that is done: what is written into `data` later does not
    show, and methods that are `reads_only` share its memory.

    Raises:
        BatchTypeError: neither a DataProto nor a TensorDict.
    """
    from protocol import BatchTypeError, DataProto, DataProtoFuture
    from protocol.batches import batch_rows, is_batch

    if not is_batch(data):
        raise BatchTypeError(f"data must be a DataProto or TensorDict; got {type(data).__name__}")
    pinned = PinnedBatch(Package(data), batch_rows(data))
    return DataProtoFuture([pinned], isinstance(data, DataProto) and data.is_padding_enabled())


class PinnedBatch(Handle):
    """A batch in memory of its own: a `protocol.future.Source`."""

    def __init__(self, package: Package, rows: int) -> None:
        self._package, self._rows = package, rows

    def rows(self, timeout: float | None) -> int:
        return self._rows

    def fetch(self, start: int, stop: int, timeout: float | None) -> Any:
        from protocol.batches import lend_rows
        from protocol.wire import read_as, reading

        how = reading()
        if (start, stop) == (0, self._rows):
            return self._package.open()
        with read_as("join" if how == "own" else how):
            batch = self._package.open()
        return lend_rows(batch, start, stop)
