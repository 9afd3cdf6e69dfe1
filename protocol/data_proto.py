"""DataProto: a batch of rows, and the verbs that make one batch from others. What a column does is
left to `columns`, how meta_info combines to `meta`, bytes to `wire` and `storage`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from protocol import checks, columns, indices, keyed, meta, storage
from protocol.columns import Column
from protocol.config import DataProtoConfig
from protocol.errors import BatchError, BatchTypeError, ConflictError, RowCountError
from protocol.indices import Index
from protocol.sampling import balance, mini_batches
from protocol.shards import balanced_sizes, equal_sizes
from protocol.table import Array, Table
from protocol.tensordict_build import join_kinds, split_kinds

__all__ = ["DataProto"]


@dataclass(eq=False, repr=False)
class DataProto(Table):
    """A batch of rows: tensors, one array entry per row for anything else, and shared meta_info.

    Methods return a new batch that shares tensors with this one and has its own dicts. Only `to`,
    `pop`, `rename`, `reorder` and `padding` change the batch itself.

        data = DataProto.from_dict({"ids": torch.zeros(4, 8)}, {"text": ["a", "b", "c", "d"]})
        first, second = data.chunk(2)
        assert DataProto.concat([first, second]).equal(data)

    Attributes:
        batch: tensors of shape (rows, ...), jagged ones included; None if there are none.
        non_tensor_batch: arrays of shape (rows, ...), usually of dtype object.
        meta_info: facts about all rows.

    Raises:
        BatchError: columns differ in rows, or one is not a tensor or an array.
    """

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor] | None = None,
        non_tensors: Mapping[str, Array | Sequence[Any]] | None = None,
        meta_info: Mapping[str, Any] | None = None,
        num_batch_dims: int = 1,
        auto_padding: bool = False,
    ) -> DataProto:
        """A batch from columns of equal rows. A list becomes an array of one object per element.

        Args:
            auto_padding: allow that the batch is padded when its rows do not divide over ranks.
        """
        _only_one_batch_dim(num_batch_dims)
        batch = None
        columns_of, arrays = keyed.checked_tensors(tensors), keyed.checked_arrays(non_tensors)
        if columns_of:
            sizes = {key: columns.rows(tensor) for key, tensor in columns_of.items()}
            if len(set(sizes.values())) > 1:
                raise RowCountError(
                    "Not all the tensor in tensors have the same batch size with batch_dims=1. Got "
                    + ", ".join(f"{key} has {size} rows" for key, size in sizes.items())
                )
            batch = TensorDict(columns_of, [next(iter(sizes.values()))])
        padding = {meta.PADDING: True} if checks.flag("auto_padding", auto_padding) else {}
        return cls(batch, arrays, {**checks.mapping("meta_info", meta_info), **padding})

    @classmethod
    def from_single_dict(
        cls,
        data: Mapping[str, torch.Tensor | Array],
        meta_info: Mapping[str, Any] | None = None,
        auto_padding: bool = False,
    ) -> DataProto:
        """A batch from one dict that holds tensors and arrays side by side."""
        data = checks.mapping("data", data)
        for key, value in data.items():
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                raise BatchTypeError(
                    f"Unsupported type in data {type(value)} under key {key!r}: "
                    "pass a tensor or an ndarray"
                )
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        arrays = {key: value for key, value in data.items() if isinstance(value, np.ndarray)}
        return cls.from_dict(tensors, arrays, meta_info, auto_padding=auto_padding)

    @classmethod
    def from_tensordict(
        cls,
        tensor_dict: TensorDict | None = None,
        meta_info: Mapping[str, Any] | None = None,
        num_batch_dims: int = 1,
    ) -> DataProto:
        """A batch from a TensorDict: per-row objects become arrays, shared ones go to meta_info.

        Raises:
            ConflictError: a key of `meta_info` has another value in the TensorDict.
        """
        _only_one_batch_dim(num_batch_dims)
        given = checks.mapping("meta_info", meta_info)
        if tensor_dict is None:
            return cls(meta_info=dict(given))
        tensors, arrays, shared = split_kinds(checks.tensordict("tensor_dict", tensor_dict))
        batch = TensorDict(tensors, tensor_dict.batch_size, device=tensor_dict.device)
        return cls(batch, arrays, meta.union(given, shared))

    def to_tensordict(self) -> TensorDict:
        """Everything in one TensorDict, from which `from_tensordict` builds this batch again, but
        for arrays: these become one object per row, and so are of dtype object then.

        Raises:
            ConflictError: a key occurs twice among tensors, arrays and meta_info.
        """
        rows, device = len(self), None if self.batch is None else self.batch.device
        return join_kinds(self._tensors(), self.non_tensor_batch, self.meta_info, rows, device)

    def is_padding_enabled(self) -> bool:
        """Whether this batch may be padded to a number of rows that divides."""
        return bool(self.meta_info.get(meta.PADDING, False)) or DataProtoConfig.auto_padding

    def save_to_disk(self, filepath: str | Path, allow_pickle: bool = False) -> None:
        """Write everything to one file; see `storage.save`."""
        parts = self.batch, self.non_tensor_batch, self.meta_info
        storage.save(filepath, *parts, allow_pickle=allow_pickle)

    @staticmethod
    def load_from_disk(filepath: str | Path, allow_pickle: bool = False) -> DataProto:
        """Read what `save_to_disk` wrote; see `storage.load`."""
        return DataProto(*storage.load(filepath, allow_pickle=allow_pickle))

    # In place

    def to(self, device: torch.device | str | int) -> DataProto:
        """Move the tensors of this batch; returns the batch.

        Raises:
            BatchError: this process has no such device.
        """
        found = checks.device("device", device, used=self.batch is not None)
        if self.batch is not None:
            self.batch = self.batch.to(found)
        return self

    def pop(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
    ) -> DataProto:
        """Remove keys from this batch; returns a batch of what was removed.

        Raises:
            MissingKeyError: a key is not there; then nothing is removed.
        """
        rows, tensors = len(self), self._tensors()
        arrays, shared = self.non_tensor_batch, self.meta_info
        batch_keys = checks.key_list("batch_keys", batch_keys)
        non_tensor_batch_keys = checks.key_list("non_tensor_batch_keys", non_tensor_batch_keys)
        meta_info_keys = checks.key_list("meta_info_keys", meta_info_keys)
        keyed.require_keys(batch_keys, tensors, "batch")
        keyed.require_keys(non_tensor_batch_keys, arrays, "non_tensor_batch")
        keyed.require_keys(meta_info_keys, shared, "meta_info")
        popped = type(self).from_dict(
            {key: tensors.pop(key) for key in batch_keys},
            {key: arrays.pop(key) for key in non_tensor_batch_keys},
            {key: shared.pop(key) for key in meta_info_keys},
        )
        self._replace(tensors, (rows,))
        return popped

    def rename(
        self,
        old_keys: str | Sequence[str] | None = None,
        new_keys: str | Sequence[str] | None = None,
    ) -> DataProto:
        """Rename tensors of this batch; returns the batch.

        Raises:
            MissingKeyError: an old key is not there.
            ConflictError: a new key is already taken, or a key is named twice.
        """
        old, new = ([keys] if isinstance(keys, str) else keys for keys in (old_keys, new_keys))
        if not isinstance(old, (list, tuple)) or not isinstance(new, (list, tuple)):
            raise BatchTypeError(
                f"keys must be a list or a string, but got {type(old)} and {type(new)}"
            )
        old, new = ([checks.named("a key", key) for key in keys] for keys in (old, new))
        if len(old) != len(new):
            raise BatchError(
                f"new_keys and old_keys must have the same length, but got {len(new)} "
                f"and {len(old)}"
            )
        tensors, names = self._tensors(), dict(zip(old, new, strict=True))
        keyed.require_keys(old, tensors, "batch")
        renamed = {names.get(key, key): tensor for key, tensor in tensors.items()}
        if len(renamed) != len(tensors) or len(names) != len(old):
            raise ConflictError(
                f"cannot rename {list(old)} to {list(new)}: a new key is taken, or a key is named "
                "twice"
            )
        self._replace(renamed, (len(self),))
        return self

    def reorder(self, indices: Index) -> None:
        """Put the rows of this batch into the order of `indices`, one index per row."""
        ordered = self._rows(indices)
        if len(ordered) != len(self):
            raise RowCountError(
                f"reorder needs one index for each of {len(self)} rows, got {len(ordered)}: "
                "use select_idxs to pick rows"
            )
        self.batch, self.non_tensor_batch = ordered.batch, ordered.non_tensor_batch

    def padding(self, padding_size: int, padding_candidate: str = "") -> None:
        """Append `padding_size` copies of the last row, or of the first with candidate "first"."""
        if checks.instance(str, "padding_candidate", padding_candidate) not in (
            "",
            "first",
            "last",
        ):
            raise BatchError(
                f'padding_candidate must be "first" or "last", got {padding_candidate!r}'
            )
        padded = self._padded(padding_size, 0 if padding_candidate == "first" else len(self) - 1)
        self.batch, self.non_tensor_batch = padded.batch, padded.non_tensor_batch

    # Combine

    def union(self, other: DataProto) -> DataProto:
        """A new batch with the columns and meta_info of both, which must have the same rows.

        Raises:
            RowCountError: both have columns, and different numbers of rows.
            ConflictError: both have a key, with different values.
        """
        other = checks.instance(DataProto, "other", other)
        mine, theirs = (bool(b._batch is not None or b.non_tensor_batch) for b in (self, other))
        if mine and theirs and len(self) != len(other):
            raise RowCountError(
                f"Two tensor dict must have identical batch size. Got {len(self)} and {len(other)}"
            )
        tensors = keyed.union_columns(self._tensors(), other._tensors())
        held = self if self._batch is not None else other
        batch = held._unbuilt(tensors, (len(held),))
        arrays = keyed.union_columns(self.non_tensor_batch, other.non_tensor_batch)
        return type(self)(batch, arrays, meta.union(self.meta_info, other.meta_info))

    @staticmethod
    def concat(data: Sequence[DataProto]) -> DataProto:
        """All rows of all batches, in new memory; see `meta.merge` for the meta_info.

        Numbers of several dtypes become those that torch or numpy promote them to. Of a batch
        without rows only the meta_info counts, if others have rows.

        Raises:
            BatchError: no batch, or they differ in keys, kinds or trailing shapes.
            ConflictError: their meta_info differs under a key other than "metrics".
        """
        if not checks.list_of(DataProto, "data", data):
            raise BatchError("cannot concatenate zero batches: pass at least one")
        columns_of = [{**shard._tensors(), **shard.non_tensor_batch} for shard in data]
        shards = [data[i] for i in keyed.deciding([*map(len, data)], columns_of)]
        held = next((shard for shard in shards if shard._batch is not None), shards[0])
        tensors = keyed.cat_columns([shard._tensors() for shard in shards], "batch")
        arrays = keyed.cat_columns([shard.non_tensor_batch for shard in shards], "non_tensor_batch")
        batch = held._unbuilt(tensors, (sum(map(len, shards)),))
        return type(held)(batch, arrays, meta.merge([shard.meta_info for shard in data]))

    def chunk(self, chunks: int) -> list[DataProto]:
        """`chunks` batches of equal rows, as views; sizes may differ by one if padding is enabled.

        Raises:
            ChunkError: the rows do not divide, and padding is not enabled.
        """
        sizes = balanced_sizes if self.is_padding_enabled() else equal_sizes
        return [*self._split(sizes(len(self), chunks))]

    def split(self, split_size: int) -> list[DataProto]:
        """Batches of `split_size` rows, the last may have fewer; none if there are no rows."""
        rows, split_size = len(self), checks.count("split_size", split_size, least=1)
        return [*self._split([min(split_size, rows - i) for i in range(0, rows, split_size)])]

    def balanced_chunk(
        self, chunks: int, weights: Sequence[float] | torch.Tensor | Array
    ) -> tuple[list[DataProto], torch.Tensor]:
        """`chunks` batches of about equal weight (token counts, say), and the way back.

        Rows go to the lightest shard, heaviest first; shards may differ in rows and may be empty.

            shards, inverse = data.balanced_chunk(4, lengths)
            DataProto.concat(shards).select_idxs(inverse)  # the rows of data, in its order

        Args:
            weights: one non-negative number per row.
        """
        load = indices.numbers("weights", weights, torch.float64)
        chunks = len(equal_sizes(0, chunks))
        if load.shape != (len(self),) or not bool((load >= 0).all()):
            raise BatchError(
                f"balanced_chunk needs one weight >= 0 for each of {len(self)} rows; got "
                f"{checks.short(weights)}"
            )
        picks = [torch.tensor(rows, dtype=torch.int64) for rows in balance(load.tolist(), chunks)]
        return [self._rows(pick) for pick in picks], torch.cat(picks).argsort()

    def group_by(self, key: str) -> dict[Any, DataProto]:
        """One batch per value of a one-dimensional column, in order of first appearance.

        All NaN are one value, `math.nan`.
        """
        everything: dict[str, Column] = {**self._tensors(), **self.non_tensor_batch}
        keyed.require_keys([checks.named("key", key)], everything, "batch or non_tensor_batch")
        if columns.is_nested(everything[key]) or everything[key].ndim != 1:
            raise BatchError(
                f"group_by needs one value per row; column {key!r} is "
                + columns.describe(everything[key])
            )
        members: dict[Any, list[int]] = {}
        try:
            for row, value in enumerate(everything[key].tolist()):
                nan = isinstance(value, (float, complex, np.inexact)) and value != value
                members.setdefault(math.nan if nan else value, []).append(row)
        except TypeError as error:
            raise BatchTypeError(f"group_by needs hashable values in {key!r}: {error}") from error
        return {value: self._rows(rows) for value, rows in members.items()}

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> DataProto:
        """Every row `repeat_times` times: a a b b with `interleave`, else a b a b."""
        if not isinstance(repeat_times, (int, np.integer)):
            raise BatchTypeError(
                f"repeat_times must be an int >= 0, got {checks.short(repeat_times)}: "
                "sample_level_repeat takes one count per row"
            )
        return self._rows(columns.repeat(torch.arange(len(self)), repeat_times, interleave))

    def sample_level_repeat(self, repeat_times: Sequence[int] | torch.Tensor | Array) -> DataProto:
        """Row i `repeat_times[i]` times, which may be zero."""
        if not isinstance(repeat_times, (list, tuple, torch.Tensor, np.ndarray)):
            raise BatchTypeError(
                "repeat_times type must be in [list, torch.Tensor, np.ndarray, tuple], "
                f"got {type(repeat_times)}"
            )
        return self._rows(columns.repeat(torch.arange(len(self)), repeat_times, interleave=True))

    def unfold_column_chunks(
        self, n_split: int, split_keys: Sequence[str] | None = None
    ) -> DataProto:
        """Cut dim 1 of some columns into `n_split` rows each; repeat the rows of the others.

        A column of shape (rows, n_split * k, ...) becomes (rows * n_split, k, ...), and so does one
        of a list of n_split * k elements in each row.
        """
        n_split = checks.count("n_split", n_split, least=1)
        keys = checks.key_list("split_keys", split_keys)
        everything = {**self._tensors(), **self.non_tensor_batch}
        keyed.require_keys(keys, everything, "batch or non_tensor_batch")
        total = len(self) * n_split

        def unfold(key: str, column: Column) -> Column:
            if key not in keys:
                return columns.repeat(column, n_split, interleave=True)
            if (cut := _cut_lists(column, n_split)) is not None:
                return cut
            if columns.is_nested(column) or column.ndim < 2 or column.shape[1] % n_split:
                raise BatchError(
                    f"column {key!r} is {columns.describe(column)}: its dim 1 cannot be cut into "
                    f"n_split={n_split} equal parts"
                )
            return column.reshape(total, column.shape[1] // n_split, *column.shape[2:])

        before = self._tensors()
        tensors = columns.combinable({key: unfold(key, c) for key, c in before.items()}, before)
        arrays = {key: unfold(key, column) for key, column in self.non_tensor_batch.items()}
        return self._new(tensors, arrays, total)

    def make_iterator(
        self,
        mini_batch_size: int,
        epochs: int,
        seed: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[DataProto]:
        """Mini-batches (copies) over `epochs` passes; in order unless `shuffle=True` is passed.

        Args:
            seed: makes a shuffled order reproducible, and the same as veRL's.
            dataloader_kwargs: for torch's DataLoader, which chooses the rows: shuffle, sampler,
                drop_last.

        Raises:
            BatchError: the rows do not divide, and `drop_last` is not given.
        """
        picks = mini_batches(len(self), mini_batch_size, epochs, seed, dataloader_kwargs)
        return map(self._rows, picks)


def _only_one_batch_dim(num_batch_dims: int) -> None:
    if checks.count("num_batch_dims", num_batch_dims) != 1:
        raise BatchError(f"only support num_batch_dims=1, got {num_batch_dims}")


def _cut_lists(column: Column, n_split: int) -> Column | None:
    """The column with every list cut into parts; None if its rows are not lists of equal length."""
    if not isinstance(column, np.ndarray) or column.dtype.kind != "O" or column.ndim != 1:
        return None
    lists = all(isinstance(row, (list, tuple, np.ndarray)) and np.ndim(row) for row in column)
    lengths = {len(row) for row in column} if lists else set()
    if len(lengths) != 1 or (length := lengths.pop()) % n_split:
        return None
    step, cuts = length // n_split, range(n_split)
    return columns.as_object_array([row[i * step : (i + 1) * step] for row in column for i in cuts])
