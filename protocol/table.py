"""Table: columns of equal rows with shared meta_info, and how one reads them. The verbs that make
one batch from others are left to `data_proto`."""

from __future__ import annotations

import copy
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase

from protocol import checks, columns, dense, indices, summary, wire
from protocol.columns import Column
from protocol.errors import BatchError, BatchTypeError, RowCountError, RowIndexError
from protocol.indices import Index
from protocol.keyed import leaves, require_keys
from protocol.shards import check_sizes

__all__ = ["Array", "DataProtoItem", "Table"]

_logger = logging.getLogger(__name__)
_building = threading.RLock()

Array: TypeAlias = "np.ndarray[Any, Any]"
_Self = TypeVar("_Self", bound="Table")


class _Unbuilt(NamedTuple):
    """What a TensorDict is built from once someone asks for it; cutting a batch does not."""

    tensors: Mapping[Any, Column]
    batch_size: tuple[int, ...]
    device: torch.device | None


@dataclass
class _Fields:
    batch: TensorDict | None = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


class _Parts(_Fields):
    """Tensors, arrays and meta_info, with the TensorDict built when it is first asked for."""

    _batch: TensorDict | _Unbuilt | None

    @property
    def batch(self) -> TensorDict | Any:  # Any, so that who knows that there are some need not ask
        """The tensors; None if there are none."""
        if isinstance(self._batch, _Unbuilt):
            with _building:  # what one thread writes into it must not be lost to another's
                if isinstance(self._batch, _Unbuilt):
                    tensors, size, device = self._batch
                    self._batch = TensorDict(dict(tensors), size, device=device)
        return self._batch

    @batch.setter
    def batch(self, batch: TensorDict | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not isinstance(batch, (_Unbuilt, type(None), TensorDictBase)):
            raise BatchTypeError(
                f"batch must be a TensorDict or None; got {type(batch).__name__} "
                f"{checks.short(batch)}: DataProto.from_dict takes a dict of tensors"
            )
        self._batch = batch

    def _tensors(self) -> dict[Any, Any]:
        if isinstance(self._batch, _Unbuilt):
            return dict(self._batch.tensors)
        return {} if self._batch is None else leaves(self._batch)

    def _replace(self, tensors: Mapping[Any, Any], size: tuple[int, ...]) -> None:
        """Hold these tensors instead, in the same TensorDict where there is one: others may have
        asked for it. One that is locked keeps what it has.
        """
        held = self._batch
        if not isinstance(held, TensorDict) or held.is_locked:
            self._batch = self._unbuilt(tensors, size)
            return
        for key in [*held.keys()]:
            del held[key]
        held.update(dict(tensors))

    def _unbuilt(self, tensors: Mapping[Any, Any], size: tuple[int, ...]) -> Any:
        """Other tensors on the same device; None if there are none here nor there."""
        if self._batch is None:
            return _Unbuilt(tensors, size, None) if tensors else None
        return _Unbuilt(tensors, size, self._batch.device)


@dataclass(eq=False)
class DataProtoItem(_Parts):
    """One row: tensors without the batch dim, one object per array, the whole meta_info.

    Two are equal if all of that is; NaN equals NaN, devices do not matter.
    """

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DataProtoItem):
            return NotImplemented
        mine, theirs = ((i._tensors(), i.non_tensor_batch, i.meta_info) for i in (self, other))
        return columns.equal(mine, theirs)


@dataclass(eq=False, repr=False)
class Table(_Parts):
    """Columns of equal rows, of two kinds (tensors and arrays), and meta_info about all rows."""

    def __post_init__(self) -> None:
        arrays = checks.mapping("non_tensor_batch", self.non_tensor_batch)
        files = {k: np.asarray(a) for k, a in arrays.items() if isinstance(a, np.memmap)}
        self.non_tensor_batch = {**arrays, **files} if files else arrays
        self.meta_info = checks.mapping("meta_info", self.meta_info)
        self.check_consistency()

    def check_consistency(self) -> None:
        """Check that all columns are tensors or arrays with the same number of rows.

        Raises:
            BatchError: they are not, or the TensorDict has not exactly one batch dim.
        """
        if self._batch is not None and len(self._batch.batch_size) != 1:
            raise BatchError(
                "a batch has one batch dim (num_batch_dims=1); "
                f"got a TensorDict of batch_size {list(self._batch.batch_size)}"
            )
        if isinstance(self._batch, LazyStackedTensorDict):
            leaves(self._batch)
        for key, array in self.non_tensor_batch.items():
            if type(array) is not np.ndarray and isinstance(array, np.ndarray):
                raise BatchTypeError(
                    f"non_tensor_batch[{key!r}] must be a plain ndarray, got "
                    f"{type(array).__name__}, of which only the numbers would be joined and sent: "
                    "np.asarray(x) are these; the mask of an array can be a column of its own"
                )
            if not isinstance(array, np.ndarray):
                raise BatchTypeError(
                    f"non_tensor_batch[{key!r}] must be an ndarray, got {type(array).__name__}: "
                    "DataProto.from_dict converts lists"
                )
            if columns.rows(array) != len(self):
                raise RowCountError(
                    f"key {key} length {len(array)} is not equal to batch size {len(self)}"
                )

    def _new(
        self: _Self, tensors: Mapping[Any, Column], arrays: Mapping[str, Column], rows: int
    ) -> _Self:
        """A batch like this one, with a copy of its meta_info and other columns."""
        return type(self)(self._unbuilt(tensors, (rows,)), arrays, self.meta_info)  # type: ignore

    def _map(self: _Self, function: Callable[[Any], Column], rows: int) -> _Self:
        """Apply a function to every column; each result has `rows` rows."""
        before = self._tensors()
        tensors = columns.combinable({key: function(c) for key, c in before.items()}, before)
        arrays = {key: function(column) for key, column in self.non_tensor_batch.items()}
        return self._new(tensors, arrays, rows)

    def __len__(self) -> int:
        if self._batch is not None:
            return int(self._batch.batch_size[0])
        return columns.rows(next(iter(self.non_tensor_batch.values()), np.empty(0)))

    def __iter__(self) -> Iterator[DataProtoItem]:
        tensors = {key: columns.unbind(column) for key, column in self._tensors().items()}
        arrays = dict(self.non_tensor_batch)
        return (self._item(tensors, arrays, row) for row in range(len(self)))

    @overload
    def __getitem__(self, item: int | np.integer[Any]) -> DataProtoItem: ...

    @overload
    def __getitem__(self: _Self, item: Index) -> _Self: ...

    def __getitem__(self: _Self, item: int | np.integer[Any] | Index) -> DataProtoItem | _Self:
        """One row as `DataProtoItem` for an int; a batch for a slice, list, array, tensor, mask.

        Raises:
            RowIndexError: there is no such row; `for row in batch` and torch see an IndexError.
            BatchTypeError: an index of another type.
        """
        is_scalar = isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 0
        row: Any = item.item() if is_scalar else item  # type: ignore[union-attr]
        if isinstance(row, (int, np.integer)) and not isinstance(row, bool):
            return self._row(int(row))
        return self._rows(row)  # pyright: ignore[reportArgumentType]

    def _row(self, row: int) -> DataProtoItem:
        rows = len(self)
        if not -rows <= row < rows:
            raise RowIndexError(f"row {row} is out of range for a batch of {rows} rows")
        row %= rows
        tensors = {key: (columns.row(column, row),) for key, column in self._tensors().items()}
        arrays = {key: array[row : row + 1] for key, array in self.non_tensor_batch.items()}
        return self._item(tensors, arrays, 0)

    def _item(
        self, tensors: Mapping[Any, Sequence[Any]], arrays: Mapping[str, Array], row: int
    ) -> DataProtoItem:
        one = {key: rows[row] for key, rows in tensors.items()}
        objects = {key: array[row] for key, array in arrays.items()}
        return DataProtoItem(self._unbuilt(one, ()), objects, dict(self.meta_info))

    def _rows(self: _Self, index: Index) -> _Self:
        at = indices.normalize_index(index, len(self))
        if isinstance(at, slice):
            bounds = at.start, at.stop, at.step
            return self._map(
                lambda column: columns.slice_rows(column, *bounds), len(range(*bounds))
            )
        return self._map(lambda column: columns.take(column, at), len(at))

    def slice(
        self: _Self, start: int | None = None, end: int | None = None, step: int | None = None
    ) -> _Self:
        """Rows `start:end:step`, as views where possible."""
        return self._rows(slice(start, end, step))

    def select_idxs(self: _Self, idxs: Index) -> _Self:
        """Copies of the rows that a list, array or tensor of positions or a mask names."""
        return self._rows(idxs)

    def select(
        self: _Self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> _Self:
        """Some of the keys, all where None. Array and meta_info keys that are absent are skipped.

        Raises:
            MissingKeyError: there is no such tensor.
        """
        tensors, arrays = self._tensors(), self.non_tensor_batch
        if batch_keys is not None:
            wanted = checks.key_list("batch_keys", batch_keys)
            require_keys(wanted, tensors, "batch")
            tensors = {key: tensors[key] for key in wanted}
        if non_tensor_batch_keys is not None:
            wanted = checks.key_list("non_tensor_batch_keys", non_tensor_batch_keys)
            arrays = {key: arrays[key] for key in wanted if key in arrays}
        selected = self._new(tensors, arrays, len(self))
        if meta_info_keys is not None:
            wanted = checks.key_list("meta_info_keys", meta_info_keys)
            selected.meta_info = {
                key: self.meta_info[key] for key in wanted if key in self.meta_info
            }
        return copy.deepcopy(selected) if checks.flag("deepcopy", deepcopy) else selected

    def split_sizes(self: _Self, sizes: Sequence[int]) -> list[_Self]:
        """One batch of consecutive rows per size, as views; a size may be zero.

        Raises:
            RowCountError: the sizes do not sum to the rows.
        """
        given = checks.list_of(object, "sizes", sizes)
        sizes = [checks.count(f"sizes[{i}]", size, None) for i, size in enumerate(given)]
        check_sizes(sizes, len(self))
        return self._split(sizes)

    def _split(self: _Self, sizes: Sequence[int]) -> list[_Self]:
        before = self._tensors()
        tensors = {key: columns.split(column, sizes) for key, column in before.items()}
        arrays = {key: columns.split(c, sizes) for key, c in self.non_tensor_batch.items()}
        return [
            self._new(
                columns.combinable({key: parts[i] for key, parts in tensors.items()}, before),
                {key: parts[i] for key, parts in arrays.items()},
                size,
            )
            for i, size in enumerate(sizes)
        ]

    def pad_rows(self: _Self, count: int) -> _Self:
        """A new batch, with the last row repeated `count` more times.

        Raises:
            RowCountError: the batch is empty, so there is no row to repeat, or count is negative.
        """
        return self._padded(count, len(self) - 1)

    def _padded(self: _Self, count: int, row: int) -> _Self:
        count = checks.count("the number of padding rows", count, least=None)
        if count < 0 or (count and not len(self)):
            raise RowCountError(f"cannot add {count} padding rows to a batch of {len(self)} rows")
        index = torch.cat([torch.arange(len(self)), torch.full((count,), row)])
        return self._map(lambda column: columns.take(column, index), len(index))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        payload = wire.pack(
            self.batch, self.non_tensor_batch, self.meta_info, operator.index(protocol)
        )
        return _restore, (type(self), payload)

    def __copy__(self: _Self) -> _Self:
        return self._new(self._tensors(), self.non_tensor_batch, len(self))

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        twin = self._map(lambda column: _deepcopy(column, memo), len(self))
        twin.meta_info = dense.deepcopy(self.meta_info, memo)
        return twin

    def detached(self: _Self) -> _Self:
        """The same tensors without autograd's graph, with arrays and a meta_info of their own."""
        twin = self._map(dense.detached, len(self))
        twin.non_tensor_batch = {key: a.copy() for key, a in self.non_tensor_batch.items()}
        twin.meta_info = dense.deepcopy(self.meta_info)
        return twin

    def get_data_info(self) -> str:
        """Keys, shapes and types in readable lines, without data."""
        return summary.data_info(self._tensors(), self.non_tensor_batch, self.meta_info)

    def print_size(self, prefix: str = "") -> None:
        """Log, at level INFO, how much memory the columns take."""
        tensors = sum(columns.nbytes(column) for column in self._tensors().values())
        arrays = sum(columns.nbytes(column) for column in self.non_tensor_batch.values())
        start = f"{prefix}, " if checks.instance(str, "prefix", prefix) else ""
        _logger.info(
            "%sSize of tensordict: %s GB, size of non_tensor_batch: %s GB",
            *(start, tensors / 2**30, arrays / 2**30),
        )

    def __repr__(self) -> str:
        return summary.overview(
            type(self).__name__, len(self), self._tensors(), self.non_tensor_batch, self.meta_info
        )

    def __eq__(self, other: object) -> bool:
        return self.equal(other) if isinstance(other, Table) else NotImplemented

    def equal(self, other: Table) -> bool:
        """Whether both hold the same keys and values; NaN equals NaN, devices do not matter."""
        return not self.diff(other)

    def diff(self, other: Table) -> list[str]:
        """One readable line per difference from `other`; none if they are equal."""
        other = checks.instance(Table, "other", other)
        return [
            *([] if len(self) == len(other) else [f"rows: {len(self)} here, {len(other)} there"]),
            *summary.diff("batch", self._tensors(), other._tensors()),
            *summary.diff("non_tensor_batch", self.non_tensor_batch, other.non_tensor_batch),
            *summary.diff("meta_info", self.meta_info, other.meta_info),
        ]


def _deepcopy(column: Column, memo: dict[int, Any]) -> Column:
    """A copy in its own memory; of a tensor, without the graph that computed it."""
    if not isinstance(column, torch.Tensor):
        own: Column = dense.deepcopy(column, memo)
        return own
    twin = columns.cat([column.detach()])
    return twin.requires_grad_(column.requires_grad) if isinstance(twin, torch.Tensor) else twin


def _restore(cls: type[_Self], payload: tuple[Any, ...]) -> _Self:
    return cls(*wire.unpack(payload))
