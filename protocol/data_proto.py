"""DataProto: a batch of rows, and the verbs that make one batch from others. What a column does is
left to `columns`, how dicts of them combine to `combine`, bytes to `wire` and `storage`."""

from __future__ import annotations

import copy
import copyreg
import heapq
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
)

from protocol import checks, columns, combine, storage, wire
from protocol.checks import Index
from protocol.columns import Array, Column, Unbuilt
from protocol.errors import BatchError, BatchTypeError, ConflictError, RowCountError, RowIndexError

__all__ = ["DataProto", "DataProtoConfig", "DataProtoItem"]

_logger = logging.getLogger(__name__)
_building = threading.RLock()

Keys: TypeAlias = "Sequence[str] | None"


class _Config(type):
    _auto_padding: bool | None = None

    @property
    def auto_padding(cls) -> bool:
        """Whether every batch may be padded; VERL_AUTO_PADDING decides until this is set."""
        set_by = os.environ.get("VERL_AUTO_PADDING", "").lower() in ("1", "true")
        return set_by if cls._auto_padding is None else cls._auto_padding

    @auto_padding.setter
    def auto_padding(cls, enabled: bool | None) -> None:
        cls._auto_padding = enabled


class DataProtoConfig(metaclass=_Config):
    """Settings of all batches in this process: `DataProtoConfig.auto_padding = True`. What a driver
    has set when it calls a group, here or by VERL_AUTO_PADDING, holds in the group's workers too.
    """


class _Parts:
    """Tensors, arrays and meta_info, with the TensorDict built when it is first asked for."""

    _batch: TensorDict | Unbuilt | None

    def __init__(
        self,
        batch: TensorDict | None = None,
        non_tensor_batch: Mapping[str, Any] = {},
        meta_info: Mapping[str, Any] = {},
    ) -> None:
        self.batch = batch
        self.non_tensor_batch = dict(non_tensor_batch or {})
        self.meta_info = dict(meta_info or {})
        self.check_consistency()

    def check_consistency(self) -> None: ...

    @property
    def batch(self) -> TensorDict | Any:  # Any, so that who knows that there are some need not ask
        """The tensors; None if there are none."""
        if isinstance(self._batch, Unbuilt):
            with _building:  # what one thread writes into it must not be lost to another's
                if isinstance(self._batch, Unbuilt):
                    tensors, (_, size, device) = self._batch.tensors(), self._batch
                    self._batch = TensorDict(tensors, size, device=device)
        return self._batch

    @batch.setter
    def batch(self, batch: TensorDict | None) -> None:
        if not isinstance(batch, (Unbuilt, type(None), TensorDictBase)):
            raise BatchTypeError(
                f"batch must be a TensorDict or None; got {type(batch).__name__}: "
                "DataProto.from_dict takes a dict of tensors"
            )
        self._batch = batch

    def _tensors(self) -> dict[Any, Any]:
        if isinstance(held := self._batch, Unbuilt):
            return held.tensors()
        return {} if held is None else columns.leaves(held)

    def _columns(self) -> Mapping[Any, Any]:
        """The same, but for tensors that nobody has asked for yet."""
        return held.columns if isinstance(held := self._batch, Unbuilt) else self._tensors()

    def _unbuilt(self, tensors: Mapping[Any, Any], size: tuple[int, ...]) -> Any:
        """Other tensors on the same device; None if there are none here nor there."""
        if self._batch is None:
            return Unbuilt(tensors, size, None) if tensors else None
        return Unbuilt(tensors, size, self._batch.device)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Whether all three are equal; NaN equals NaN, devices do not matter."""
        if not isinstance(other, _Parts):
            return NotImplemented
        mine, theirs = ((p._tensors(), p.non_tensor_batch, p.meta_info) for p in (self, other))
        return type(self) is type(other) and combine.equal(mine, theirs)


class DataProtoItem(_Parts):
    """One row: tensors without the batch dim, one object per array, the whole meta_info."""

    def __repr__(self) -> str:
        parts = f"batch={self.batch}, non_tensor_batch={self.non_tensor_batch}"
        return f"DataProtoItem({parts}, meta_info={self.meta_info})"


class DataProto(_Parts):
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

    # Build

    def check_consistency(self) -> None:
        """BatchError unless all columns are tensors or arrays of the same number of rows."""
        if self._batch is not None and len(self._batch.batch_size) != 1:
            raise BatchError(f"a batch has one batch dim; got {list(self._batch.batch_size)}")
        if isinstance(self._batch, LazyStackedTensorDict):
            columns.leaves(self._batch)  # raises if its rows differ in shape
        for key, array in self.non_tensor_batch.items():
            if type(array) is not np.ndarray:
                raise BatchTypeError(
                    f"non_tensor_batch[{key!r}] must be an ndarray, got {type(array).__name__}: "
                    "from_dict converts lists, np.asarray(x) other kinds of arrays"
                )
            if columns.rows(array) != len(self):
                raise RowCountError(
                    f"key {key} length {len(array)} is not equal to batch size {len(self)}"
                )

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
        if num_batch_dims != 1:
            raise BatchError(f"only support num_batch_dims=1, got {num_batch_dims}")
        found: dict[str, Any] = {} if tensors is None else dict(tensors.items())
        arrays: dict[str, Any] = dict(non_tensors or {})
        sizes = {key: columns.rows(value, f"tensors[{key!r}]") for key, value in found.items()}
        if len({*sizes.values()}) > 1:
            raise RowCountError(
                "Not all the tensor in tensors have the same batch size with batch_dims=1. "
                f"Got {sizes}"
            )
        for key, values in arrays.items():
            if isinstance(values, (str, Mapping)):
                raise checks.wrong(f"non_tensors[{key!r}]", "an array, or a list by rows", values)
            if not isinstance(values, np.ndarray):
                arrays[key] = columns.as_object_array(values)
        batch = TensorDict(found, [next(iter(sizes.values()))]) if found else None
        padding = {combine.PADDING: True} if auto_padding else {}
        return cls(batch, arrays, {**(meta_info or {}), **padding})

    @classmethod
    def from_single_dict(
        cls,
        data: Mapping[str, torch.Tensor | Array],
        meta_info: Mapping[str, Any] | None = None,
        auto_padding: bool = False,
    ) -> DataProto:
        """A batch from one dict that holds tensors and arrays side by side; see `from_dict`."""
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        arrays: dict[str, Any] = {k: v for k, v in data.items() if k not in tensors}
        return cls.from_dict(tensors, arrays, meta_info, auto_padding=auto_padding)

    @classmethod
    def from_tensordict(
        cls,
        tensor_dict: TensorDict | None = None,
        meta_info: Mapping[str, Any] | None = None,
        num_batch_dims: int = 1,
    ) -> DataProto:
        """A batch from a TensorDict: per-row objects become arrays, shared ones go to meta_info.
        ConflictError if that has another value under the key.
        """
        if tensor_dict is None:
            return cls(meta_info=meta_info or {})
        values = dict[Any, Any](tensor_dict.items())
        tensors = {key: value for key, value in values.items() if not is_non_tensor(value)}
        batch = TensorDict(tensors, tensor_dict.batch_size, device=tensor_dict.device)
        objects = {k: v.tolist() for k, v in values.items() if isinstance(v, NonTensorStack)}
        arrays = {key: columns.as_object_array(rows) for key, rows in objects.items()}
        shared = {k: v.data for k, v in values.items() if k not in tensors and k not in arrays}
        return cls(
            batch, arrays, combine.union(meta_info or {}, shared, "meta_info and tensor_dict")
        )

    def to_tensordict(self) -> TensorDict:
        """Everything in one TensorDict, for `from_tensordict`; arrays become one object per row.
        ConflictError if a key occurs twice among tensors, arrays and meta_info.
        """
        values, size = self._tensors(), [len(self)]
        objects = {key: columns.stack(list(a)) for key, a in self.non_tensor_batch.items()}
        shared = {k: NonTensorData(v, batch_size=size) for k, v in self.meta_info.items()}
        for part in (objects, shared):
            if twice := sorted(values.keys() & part.keys()):
                raise ConflictError(
                    f"{twice} occur twice among batch, non_tensor_batch and meta_info: rename them"
                )
            values |= part
        return columns.build(values, size, None if self._batch is None else self._batch.device)

    def _new(self, tensors: Mapping[Any, Any], arrays: Mapping[str, Any], rows: int) -> DataProto:
        """A batch like this one, with a copy of its meta_info and other columns."""
        return type(self)(self._unbuilt(tensors, (rows,)), arrays, self.meta_info)

    def _cut(
        self, sizes: Sequence[int], op: Callable[[Column], Sequence[Column]]
    ) -> list[DataProto]:
        """One batch per size, of what `op` makes of every column."""
        tensors = columns.cut(self._tensors(), len(sizes), op)
        arrays = {key: op(column) for key, column in self.non_tensor_batch.items()}
        return [
            self._new(tensors[i], {key: parts[i] for key, parts in arrays.items()}, size)
            for i, size in enumerate(sizes)
        ]

    def __copy__(self) -> DataProto:
        return self.select()

    def __deepcopy__(self, memo: dict[int, Any]) -> DataProto:
        return self._twin(columns.twin)

    def _twin(self, function: Callable[[Any], Column]) -> DataProto:
        """Apply a function to every column; meta_info is copied, too."""
        twin = self._cut([len(self)], lambda column: [function(column)])[0]
        twin.meta_info = columns.deepcopy(self.meta_info)
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = self._batch, self.non_tensor_batch, self.meta_info
        return copyreg.__newobj__, (type(self),), wire.pack(*parts, protocol)  # type: ignore[attr-defined]

    def __setstate__(self, packed: tuple[Any, ...]) -> None:
        type(self).__init__(self, *wire.unpack(*packed))

    def save_to_disk(self, filepath: str | Path, allow_pickle: bool = False) -> None:
        """Write everything to one file; see `storage.save`."""
        parts = self.batch, self.non_tensor_batch, self.meta_info
        storage.save(filepath, *parts, allow_pickle=allow_pickle)

    @staticmethod
    def load_from_disk(filepath: str | Path, allow_pickle: bool = False) -> DataProto:
        """Read what `save_to_disk` wrote; see `storage.load`."""
        return DataProto(*storage.load(filepath, allow_pickle=allow_pickle))

    # Read

    def __len__(self) -> int:
        if self._batch is not None:
            return int(self._batch.batch_size[0])
        return columns.rows(next(iter(self.non_tensor_batch.values()), np.empty(0)))

    def is_padding_enabled(self) -> bool:
        """Whether this batch may be padded to a number of rows that divides."""
        return bool(self.meta_info.get(combine.PADDING, False)) or DataProtoConfig.auto_padding

    def __iter__(self) -> Iterator[DataProtoItem]:
        tensors = {key: column.unbind() for key, column in self._tensors().items()}
        for row in range(len(self)):
            own = self._unbuilt({key: rows[row] for key, rows in tensors.items()}, ())
            arrays = {key: array[row] for key, array in self.non_tensor_batch.items()}
            yield DataProtoItem(own, arrays, self.meta_info)

    @overload
    def __getitem__(self, item: int | np.integer[Any]) -> DataProtoItem: ...

    @overload
    def __getitem__(self, item: Index) -> DataProto: ...

    def __getitem__(self, item: int | np.integer[Any] | Index) -> DataProtoItem | DataProto:
        """One row as `DataProtoItem` for an int; a batch for a slice, list, array, tensor, mask.
        RowIndexError if there is no such row.
        """
        scalar = isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 0
        at: Any = item.item() if scalar else item  # type: ignore[union-attr]
        if type(at) is bool or not isinstance(at, (int, np.integer)):
            index: Any = at
            return self.select_idxs(index)
        row, rows = int(at), len(self)
        if not -rows <= row < rows:
            raise RowIndexError(f"row {row} is out of range for a batch of {rows} rows")
        tensors = {key: columns.row(column, row % rows) for key, column in self._tensors().items()}
        objects = {key: array[row] for key, array in self.non_tensor_batch.items()}
        return DataProtoItem(self._unbuilt(tensors, ()), objects, self.meta_info)

    def slice(
        self, start: int | None = None, end: int | None = None, step: int | None = None
    ) -> DataProto:
        """Rows `start:end:step`, as views where possible."""
        return self.select_idxs(slice(start, end, step))

    def select_idxs(self, idxs: Index) -> DataProto:
        """Copies of the rows that a list, array or tensor of positions or a mask names."""
        at = checks.normalize_index(idxs, len(self))
        if isinstance(at, torch.Tensor):
            return self._cut([len(at)], lambda column: [columns.take(column, at)])[0]
        bounds = at.start, at.stop, at.step
        return self._cut([len(range(*bounds))], lambda c: [columns.slice_rows(c, *bounds)])[0]

    def select(
        self,
        batch_keys: Keys = None,
        non_tensor_batch_keys: Keys = None,
        meta_info_keys: Keys = None,
        deepcopy: bool = False,
    ) -> DataProto:
        """Some of the keys, all where None. Array and meta_info keys that are absent are skipped;
        an absent tensor is a MissingKeyError.
        """
        tensors, arrays, meta = self._tensors(), self.non_tensor_batch, self.meta_info
        if batch_keys is not None:
            batch_keys = checks.key_list("batch_keys", batch_keys)
            combine.require_keys(batch_keys, tensors, "batch")
        selected = type(self)(
            self._unbuilt(_some("batch_keys", tensors, batch_keys), (len(self),)),
            _some("non_tensor_batch_keys", arrays, non_tensor_batch_keys),
            _some("meta_info_keys", meta, meta_info_keys),
        )
        return copy.deepcopy(selected) if deepcopy else selected

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
            dataloader_kwargs: for torch's DataLoader: shuffle, sampler, and drop_last, without
                which rows that do not divide are a BatchError.
        """
        options = mini_batch_size, epochs, seed, dataloader_kwargs
        return map(self.select_idxs, checks.mini_batches(len(self), *options))

    def get_data_info(self) -> str:
        """Keys, shapes and types in readable lines, as `repr` gives them."""
        return repr(self)

    def print_size(self, prefix: str = "") -> None:
        """Log, at level INFO, how much memory the columns take."""
        dense = (t.values() if columns.is_jagged(t) else t for t in self._tensors().values())
        tensors = sum(tensor.nbytes for tensor in dense) / 2**30
        arrays = sum(array.nbytes for array in self.non_tensor_batch.values()) / 2**30
        sizes = f"Size of tensordict: {tensors} GB, size of non_tensor_batch: {arrays} GB"
        _logger.info("%s", f"{prefix}, {sizes}" if prefix else sizes)

    def __repr__(self) -> str:
        lines = [f"DataProto(rows={len(self)}"]
        for name, part in (("batch", self._tensors()), ("non_tensor_batch", self.non_tensor_batch)):
            lines += [f"  {name}[{key!r}]: {columns.describe(part[key])}" for key in part]
        lines += [f"  meta_info[{key!r}]: {checks.short(v)}" for key, v in self.meta_info.items()]
        return "\n".join(lines) + ("\n)" if len(lines) > 1 else ")")

    def equal(self, other: DataProto) -> bool:
        """Whether both hold the same keys and values; NaN equals NaN, devices do not matter."""
        return not self.diff(other)

    def diff(self, other: DataProto) -> list[str]:
        """One readable line per difference from `other`; none if they are equal."""
        return [
            *([] if len(self) == len(other) else [f"rows: {len(self)} here, {len(other)} there"]),
            *combine.diff("batch", self._tensors(), other._tensors()),
            *combine.diff("non_tensor_batch", self.non_tensor_batch, other.non_tensor_batch),
            *combine.diff("meta_info", self.meta_info, other.meta_info),
        ]

    # In place

    def to(self, device: torch.device | str | int) -> DataProto:
        """Move the tensors of this batch; returns the batch."""
        if self.batch is not None:
            self.batch = self.batch.to(torch.device(device))
        return self

    def pop(
        self,
        batch_keys: Keys = None,
        non_tensor_batch_keys: Keys = None,
        meta_info_keys: Keys = None,
    ) -> DataProto:
        """Remove keys from this batch; returns a batch of what was removed. MissingKeyError if one
        is not there; then nothing is removed.
        """
        rows, tensors = len(self), self._tensors()
        wanted = [
            (checks.key_list(f"{name}_keys", keys), part, name)
            for name, keys, part in (
                ("batch", batch_keys, tensors),
                ("non_tensor_batch", non_tensor_batch_keys, self.non_tensor_batch),
                ("meta_info", meta_info_keys, self.meta_info),
            )
        ]
        for each in wanted:
            combine.require_keys(*each)
        popped: Any = [{key: part.pop(key) for key in keys} for keys, part, _ in wanted]
        self._replace(tensors, rows)
        return type(self).from_dict(*popped)

    def rename(self, old_keys: str | Keys = None, new_keys: str | Keys = None) -> DataProto:
        """Rename tensors of this batch; returns the batch. ConflictError if a new key is taken."""
        old, new = (
            [keys] if isinstance(keys, str) else keys or [] for keys in (old_keys, new_keys)
        )
        tensors, names = self._tensors(), dict(zip(old, new, strict=False))
        combine.require_keys(old, tensors, "batch")
        renamed = {names.get(key, key): tensor for key, tensor in tensors.items()}
        if len(old) != len(new) or len(renamed) != len(tensors) or len(names) != len(old):
            raise ConflictError(
                f"cannot rename {list(old)} to {list(new)}: as many keys, each once, and none taken"
            )
        self._replace(renamed, len(self))
        return self

    def _replace(self, tensors: Mapping[Any, Any], rows: int) -> None:
        """Hold these tensors instead, in the TensorDict that someone may have asked for."""
        held = self._batch
        if not isinstance(held, TensorDict) or held.is_locked:
            self.batch = self._unbuilt(tensors, (rows,))
            return
        for key in [*held.keys()]:
            del held[key]
        held.update(dict(tensors))

    def reorder(self, indices: Index) -> None:
        """Put the rows of this batch into the order of `indices`."""
        ordered = self.select_idxs(indices)
        self.batch, self.non_tensor_batch = ordered.batch, ordered.non_tensor_batch

    def padding(self, padding_size: int, padding_candidate: str = "") -> None:
        """Append `padding_size` copies of the last row, or of the first with candidate "first"."""
        index = checks.padded(len(self), padding_size, padding_candidate == "first")
        padded = self.select_idxs(index)
        self.batch, self.non_tensor_batch = padded.batch, padded.non_tensor_batch

    # Combine

    def union(self, other: DataProto) -> DataProto:
        """A new batch with the columns and meta_info of both, which must have the same rows.
        ConflictError if both have a key, with different values; NaN equals NaN.
        """
        mine, theirs = (bool(b._batch is not None or b.non_tensor_batch) for b in (self, other))
        if mine and theirs and len(self) != len(other):
            raise RowCountError(
                f"Two tensor dict must have identical batch size. Got {len(self)} and {len(other)}"
            )
        held = self if self._batch is not None else other
        batch = held._unbuilt(combine.union(self._tensors(), other._tensors()), (len(held),))
        arrays = combine.union(self.non_tensor_batch, other.non_tensor_batch)
        meta = combine.union(self.meta_info, other.meta_info, "the meta_info of the two batches")
        return type(self)(batch, arrays, meta)

    @staticmethod
    def concat(data: Sequence[DataProto]) -> DataProto:
        """All rows of all batches, in new memory; dtypes are promoted as torch and numpy do.

        Of a batch without rows only the meta_info counts, if others have rows. Of meta_info,
        "metrics" become one dict of lists; under every other key, all that have it must agree.

        Raises:
            BatchError: no batch, or they differ in keys, kinds or trailing shapes.
            ConflictError: their meta_info differs under a key other than "metrics".
        """
        data = checks.list_of(DataProto, "data", data)
        if not data:
            raise BatchError("cannot concatenate zero batches: pass at least one")
        keys = [[*shard._columns(), *shard.non_tensor_batch] for shard in data]
        shards = [data[i] for i in combine.deciding([*map(len, data)], keys)]
        held = next((shard for shard in shards if shard._batch is not None), shards[0])
        tensors = combine.cat_columns([shard._columns() for shard in shards], "batch")
        arrays = combine.cat_columns([s.non_tensor_batch for s in shards], "non_tensor_batch")
        batch = held._unbuilt(tensors, (sum(map(len, shards)),))
        return type(held)(batch, arrays, combine.merge_meta([shard.meta_info for shard in data]))

    def chunk(self, chunks: int) -> list[DataProto]:
        """`chunks` batches of equal rows, as views; sizes may differ by one if padding is enabled.
        ChunkError if the rows do not divide, and it is not.
        """
        sizes = checks.balanced_sizes if self.is_padding_enabled() else checks.equal_sizes
        return self._split(sizes(len(self), chunks))

    def split(self, split_size: int) -> list[DataProto]:
        """Batches of `split_size` rows, the last may have fewer; none if there are no rows."""
        rows, split_size = len(self), checks.count("split_size", split_size, least=1)
        return self._split([min(split_size, rows - i) for i in range(0, rows, split_size)])

    def _split(self, sizes: Sequence[int]) -> list[DataProto]:
        """One batch of consecutive rows per size, as views."""
        checks.check_sizes(sizes, len(self))
        return self._cut(sizes, lambda column: columns.split(column, sizes))

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
        load = self._per_row("weight", weights, torch.float64)
        loads = load.tolist()
        lightest = [(0.0, 0, shard) for shard in range(len(checks.equal_sizes(0, chunks)))]
        members: list[list[int]] = [[] for _ in lightest]
        for row in load.argsort(descending=True, stable=True).tolist():
            weight, taken, shard = lightest[0]  # of a heap
            members[shard].append(row)
            heapq.heapreplace(lightest, (weight + loads[row], taken + 1, shard))
        picks = [torch.tensor(sorted(rows), dtype=torch.int64) for rows in members]
        return [self.select_idxs(pick) for pick in picks], torch.cat(picks).argsort()

    def group_by(self, key: str) -> dict[Any, DataProto]:
        """One batch per value of a one-dimensional column, in order of first appearance; all
        NaN are one value, `math.nan`.
        """
        everything: dict[str, Column] = {**self._tensors(), **self.non_tensor_batch}
        combine.require_keys([key], everything, "batch or non_tensor_batch")
        column = everything[key]
        if column.ndim != 1:
            raise BatchError(
                f"group_by needs one value per row; column {key!r} is {columns.describe(column)}"
            )
        members: dict[Any, list[int]] = {}
        for row, value in enumerate(column.tolist()):
            nan = isinstance(value, (float, complex, np.inexact)) and value != value
            members.setdefault(math.nan if nan else value, []).append(row)
        return {value: self.select_idxs(rows) for value, rows in members.items()}

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> DataProto:
        """Every row `repeat_times` times: a a b b with `interleave`, else a b a b."""
        times, index = checks.count("repeat_times", repeat_times), torch.arange(len(self))
        return self.select_idxs(
            index.repeat_interleave(times) if interleave else index.repeat(times)
        )

    def sample_level_repeat(self, repeat_times: Sequence[int] | torch.Tensor | Array) -> DataProto:
        """Row i `repeat_times[i]` times, which may be zero."""
        counts = self._per_row("count", repeat_times, torch.int64)
        return self.select_idxs(torch.arange(len(self)).repeat_interleave(counts))

    def _per_row(self, what: str, values: Any, dtype: torch.dtype) -> torch.Tensor:
        numbers = torch.as_tensor(values, dtype=dtype, device="cpu")
        if numbers.shape == (len(self),) and bool((numbers >= 0).all()):
            return numbers
        got = checks.short(values)
        raise BatchError(f"needs one {what} >= 0 for each of {len(self)} rows; got {got}")

    def unfold_column_chunks(self, n_split: int, split_keys: Keys = None) -> DataProto:
        """Cut dim 1 of some columns into `n_split` rows each; repeat the rows of the others.

        A column of shape (rows, n_split * k, ...) becomes (rows * n_split, k, ...), and so does one
        of a list of n_split * k elements in each row.
        """
        n_split = checks.count("n_split", n_split, least=1)
        keys = checks.key_list("split_keys", split_keys)
        everything = {**self._tensors(), **self.non_tensor_batch}
        combine.require_keys(keys, everything, "batch or non_tensor_batch")
        repeated = torch.arange(len(self)).repeat_interleave(n_split)

        def unfold(key: Any, column: Any) -> Any:
            if key not in keys:
                return columns.take(column, repeated)
            lists = column.dtype == object and column.ndim == 1
            lists = lists and all(isinstance(row, list | tuple | np.ndarray) for row in column)
            widths = {len(row) for row in column} if lists else {*column.shape[1:2]}
            if columns.is_jagged(column) or len(widths) != 1 or (width := widths.pop()) % n_split:
                raise BatchError(
                    f"column {key!r} is {columns.describe(column)}: its dim 1 cannot be cut into "
                    f"n_split={n_split} equal parts"
                )
            step = width // n_split
            if not lists:
                return column.reshape(len(repeated), step, *column.shape[2:])
            cuts = [slice(i * step, (i + 1) * step) for i in range(n_split)]
            return columns.as_object_array([row[cut] for row in column for cut in cuts])

        tensors, arrays = (
            {key: unfold(key, column) for key, column in kind.items()}
            for kind in (self._tensors(), self.non_tensor_batch)
        )
        return self._new(columns.combinable(tensors, self._tensors()), arrays, len(repeated))


def _some(name: str, part: Mapping[Any, Any], keys: Keys) -> Mapping[Any, Any]:
    return part if keys is None else {k: part[k] for k in checks.key_list(name, keys) if k in part}
