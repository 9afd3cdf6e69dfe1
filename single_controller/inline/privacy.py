"""Copies that cross from one rank to another, or to the driver, as they would between processes.

A value is pickled, so that it arrives as it would from another process and nobody writes into
anybody's memory. Classes, functions and handles of this process are passed as they are.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from contextvars import ContextVar
from io import BytesIO
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["Handle", "Package", "dumps"]

_ATOMS = (int, float, bool, complex, str, bytes, type(None))
_held: ContextVar[list[Any]] = ContextVar("_held")


class Handle:
    """What stands for something in this process, and is passed to ranks as it is."""


_AS_THEY_ARE = (type, FunctionType, ModuleType, Handle)


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, buffers: Callable[[pickle.PickleBuffer], Any] | None) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers)
        self.held: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _AS_THEY_ARE) and value is not _take:
            self.held.append(value)
            return _take, (len(self.held) - 1,)
        tensordict = sys.modules.get("tensordict")
        if tensordict is not None and type(value) is tensordict.TensorDict:
            from protocol import wire

            batch: Any = value
            return wire.unpack_tensordict, (wire.pack_tensordict(batch),)
        return NotImplemented


def _take(index: int) -> Any:
    return _held.get()[index]


class Package:
    """A value on its way to any number of receivers, each of which opens it for itself.

    Raises:
        TypeError, pickle.PicklingError: the value cannot leave this process.
    """

    __slots__ = ("_buffers", "_data", "_held")

    def __init__(self, value: Any) -> None:
        self._buffers: list[memoryview] = []
        self._held: list[Any] = []
        self._data: Any = value
        if not isinstance(value, _ATOMS):
            buffers: list[pickle.PickleBuffer] = []
            self._data, self._held = _dump(value, buffers.append)
            # taken now: the sender may write into its memory before the package is opened
            self._buffers = [memoryview(bytearray(buffer)) for buffer in buffers]

    def open(self) -> Any:
        """The value, in memory of the receiver's own. Raises what reading it raised."""
        if not isinstance(self._data, bytearray):
            return self._data
        token = _held.set(self._held)
        try:
            return pickle.loads(self._data, buffers=[bytearray(b) for b in self._buffers])
        finally:
            _held.reset(token)


def _dump(value: Any, buffers: Callable[[pickle.PickleBuffer], Any] | None) -> Any:
    file = BytesIO()
    pickler = _Pickler(file, buffers)
    pickler.dump(value)
    return bytearray(file.getbuffer()), pickler.held


def dumps(value: Any) -> bytes:
    """Pickle as `Package` does. Only a `loads` within the same call finds what was held."""
    data, held = _dump(value, None)
    _held.set(held)
    return bytes(data)
