"""BatchData: veRL's question whether a value can be split or joined by rows. How is left to the
kinds of batches themselves."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

from protocol.batches import concat_batches, is_batch
from protocol.data_proto import DataProto
from protocol.errors import BatchTypeError
from protocol.future import DataProtoFuture
from protocol.tensordict_utils import chunk_tensordict

__all__ = ["BatchData"]


class BatchData:
    """veRL's wrapper that asks of any value whether it can be split or joined by rows.

    `data` is a DataProto, TensorDict or DataProtoFuture to chunk, or a list of one kind to concat.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def is_chunkable(self) -> bool:
        """Whether `chunk` works: the value is one batch or future."""
        return is_batch(self.data) or isinstance(self.data, DataProtoFuture)

    def is_concatable(self) -> bool:
        """Whether `concat` works: the value is a list of batches, or of futures."""
        if not isinstance(self.data, list | tuple) or not self.data:
            return False
        elements = self.data
        return all(map(is_batch, elements)) or all(isinstance(e, DataProtoFuture) for e in elements)

    def chunk(self, chunks: int) -> list[Any]:
        """`chunks` equal parts. Fetches nothing of a future.

        Raises:
            BatchTypeError: the value is not chunkable.
            ChunkError: the rows do not divide by `chunks`.
        """
        if isinstance(self.data, DataProto | DataProtoFuture):
            return [*self.data.chunk(chunks)]
        if isinstance(self.data, TensorDict):
            return [*chunk_tensordict(self.data, chunks)]
        raise BatchTypeError(
            "only a DataProto, TensorDict or DataProtoFuture can be chunked; "
            f"got {type(self.data).__name__}"
        )

    def concat(self) -> Any:
        """All rows of all elements. Fetches nothing of futures.

        Raises:
            BatchError: the elements do not go together.
            BatchTypeError: the value is not concatable.
        """
        if not self.is_concatable():
            raise BatchTypeError(
                "only a list of DataProto, of TensorDict or of DataProtoFuture can be "
                f"concatenated; got {type(self.data).__name__} {self.data!r:.80}"
            )
        if is_batch(self.data[0]):
            return concat_batches(self.data)
        return DataProtoFuture.concat(self.data)
