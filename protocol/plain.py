"""What a value would be on arrival in another process, made without pickling it where that is plain
to see: batches of dense CPU tensors and arrays, and containers of these, of numbers and of text.

Everything else is left to `wire` and the pickler.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from protocol.data_proto import DataProto
from protocol.errors import BatchTypeError
from protocol.tensordict_rows import build
from protocol.wire import Reading

__all__ = ["arrival"]

_ATOMS = frozenset((int, float, bool, complex, str, bytes, type(None)))


class _NotPlainError(Exception):
    """Only pickling can tell what would arrive."""


def arrival(value: object, how: Reading) -> Any:
    """What a reader would get, or None where only pickling can tell.

    Args:
        how: as for `wire.read_as`: memory of the reader's own, or of `value`.
    """
    try:
        return _Reader(how).read(value)
    except (_NotPlainError, BatchTypeError):
        return None


class _Reader:
    def __init__(self, how: Reading) -> None:
        self._how: Reading = how
        self._seen: set[int] = set()  # a second time, only a pickler knows it for the same

    def read(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._seen:
            raise _NotPlainError
        self._seen.add(id(value))
        if kind is DataProto:
            return self._batch(value)
        if kind is dict:
            if not _ATOMS.issuperset(map(type, value)):
                raise _NotPlainError
            return {key: self.read(item) for key, item in value.items()}
        if kind is list or kind is tuple:
            return kind(map(self.read, value))
        if kind is TensorDict:
            return self._tensordict(value)
        if kind is np.ndarray and not value.flags.c_contiguous:
            raise _NotPlainError  # a pickler keeps the order of its dimensions
        return self._column(value, self._how if self._how == "view" else "own")

    def _batch(self, data: DataProto) -> DataProto:
        tensors = data._tensors()
        if any(type(key) is tuple for key in tensors) or _named(data._batch):
            raise _NotPlainError
        twin = data._map(lambda column: self._column(column, self._how), len(data))
        twin.meta_info = self.read(data.meta_info)
        return twin

    def _tensordict(self, batch: TensorDict) -> TensorDict:
        if _named(batch):
            raise _NotPlainError
        columns = {key: self._column(column, self._how) for key, column in batch.items()}
        return build(columns, batch.batch_size, batch.device)

    def _column(self, value: Any, how: Reading) -> Any:
        if type(value) is torch.Tensor:
            return _tensor(value, how)
        if type(value) is np.ndarray:
            return self._objects(value) if value.dtype.hasobject else _array(value, how)
        raise _NotPlainError

    def _objects(self, column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if column.dtype.kind != "O":
            raise _NotPlainError
        twin: np.ndarray[Any, Any] = column.copy()
        if not _plain_objects(column.flat):
            for index, item in np.ndenumerate(column):
                twin[index] = self.read(item)
        return twin


def _plain_objects(items: Iterable[Any]) -> bool:
    return _ATOMS.issuperset(map(type, items))


def _named(batch: Any) -> bool:
    return type(batch) is TensorDict and any(batch.names)


def _tensor(value: torch.Tensor, how: Reading) -> torch.Tensor:
    plain = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    if not plain or value.device.type != "cpu":
        raise _NotPlainError
    twin = value.detach()
    if how == "own":
        twin = twin.clone(memory_format=torch.contiguous_format)
    return twin.requires_grad_() if value.requires_grad else twin


def _array(value: np.ndarray[Any, Any], how: Reading) -> np.ndarray[Any, Any]:
    twin: np.ndarray[Any, Any] = value.copy() if how == "own" else value.view()
    twin.flags.writeable = how != "view"
    return twin
