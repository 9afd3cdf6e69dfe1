"""The error tree of batches. Everything a user can get wrong with a batch is a `BatchError`."""

__all__ = [
    "BatchError",
    "BatchTypeError",
    "ChunkError",
    "ConflictError",
    "MissingKeyError",
    "RowCountError",
    "RowIndexError",
    "StorageError",
]


class BatchError(ValueError, AssertionError):
    """A batch was given something it cannot work with. Programs written for veRL catch it as an
    AssertionError.
    """


class BatchTypeError(BatchError, TypeError):
    """A value of a type that a batch cannot hold or be indexed with."""


class RowCountError(BatchError, RuntimeError):
    """Columns or batches to be combined differ in rows; a RuntimeError, as of tensordict."""


class ChunkError(RowCountError):
    """The rows of a batch do not divide into the shards asked for."""


class ConflictError(BatchError):
    """Two batches hold different values under one key."""


class MissingKeyError(BatchError, KeyError):
    """A key that the batch does not have."""

    __str__ = Exception.__str__  # KeyError would show the message as a quoted repr


class RowIndexError(BatchError, IndexError):
    """A row that the batch does not have. `for row in batch` ends on it, as on any IndexError."""


class StorageError(BatchError):
    """A file is not a batch, is damaged, or would run code when loaded."""
