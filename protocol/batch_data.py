"""BatchData: veRL's question whether a value can be split or joined by rows. How is left to the
kinds of batches themselves."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

from protocol.batches import concat_batches, is_batch, is_chunkable
from protocol.errors import BatchTypeError
from protocol.tensordict_utils import chunk_tensordict

__all__ = ["BatchData"]


class BatchData:
    """veRL's wrapper that asks of any value whether it can be split or joined by rows.

    `data` is a DataProto, TensorDict, DataProtoFuture, or anything else that has `chunk(n)` and a
    `concat` of its class, to chunk, or a list of one kind to concat.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def is_chunkable(self) -> bool:
        """Whether `chunk` works: the value is one batch or future."""
        return is_batch(self.data) or is_chunkable(self.data)

    def is_concatable(self) -> bool:
        """Whether `concat` works: the value is a list of batches, or of futures."""
        if not isinstance(self.data, list | tuple) or not self.data:
            return False
        elements = self.data
        kind = type(elements[0])
        return all(map(is_batch, elements)) or all(
            is_chunkable(element) and type(element) is kind for element in elements
        )

    def chunk(self, chunks: int) -> list[Any]:
        """`chunks` equal parts. Fetches nothing of a future.

        Raises:
            BatchTypeError: the value is not chunkable.
            ChunkError: the rows do not divide by `chunks`.
        """
        if isinstance(self.data, TensorDict):
            return [*chunk_tensordict(self.data, chunks)]
        if self.is_chunkable():
            return [*self.data.chunk(chunks)]
        raise BatchTypeError(
            "only a DataProto, TensorDict, DataProtoFuture or what has chunk(n) and a class with "
            f"concat can be chunked; got {type(self.data).__name__}"
        )

    def concat(self) -> Any:
        """All rows of all elements. Fetches nothing of futures.

        Raises:
            BatchError: the elements do not go together.
            BatchTypeError: the value is not concatable.
        """
        if not self.is_concatable():
            raise BatchTypeError(
                "only a list of DataProto, of TensorDict, of DataProtoFuture or of one class that "
                f"has concat can be concatenated; got {type(self.data).__name__} {self.data!r:.80}"
            )
        if is_batch(self.data[0]):
            return concat_batches(self.data)
        return type(self.data[0]).concat(self.data)
