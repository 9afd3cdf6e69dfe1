"""Copies that cross from one rank to another, or to the driver, as they would between processes.

A value arrives as it would from another process, pickled but where that is plain to see without,
and nobody writes into anybody's memory. Classes, functions and handles of this process are passed
as they are.
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
        wire: Any = sys.modules.get("protocol.wire")
        if wire is not None and isinstance(value, (wire.torch.Tensor, wire.TensorDict)):
            packed = wire.pack_value(value)
            if packed is not None:
                return wire.unpack_value, (packed,)
        return NotImplemented


def _take(index: int) -> Any:
    return _held.get()[index]


class Package:
    """A value on its way to any number of receivers, each of which opens it for itself.

    `receivers`: how many there will be, where that is known; the last one needs no further copy.

    Raises:
        TypeError, pickle.PicklingError: the value cannot leave this process.
    """

    __slots__ = ("_buffers", "_data", "_held", "_left", "_plain")

    def __init__(self, value: Any, receivers: int | None = None) -> None:
        self._left = receivers
        self._plain: Any = None  # the value's copy, where none of it needs pickling
        self._data: Any = value
        if isinstance(value, _ATOMS):
            return
        if "protocol.batches" in sys.modules:
            self._plain = _arrival(value, "own")
        if self._plain is None:
            buffers: list[pickle.PickleBuffer] = []
            self._data, self._held = _dump(value, buffers.append)
            # taken now: the sender may write into its memory before the package is opened
            self._buffers = [memoryview(bytearray(buffer)) for buffer in buffers]

    def open(self) -> Any:
        """The value, in memory of the receiver's own, or as it asked to read it
        (`protocol.wire.read_as`). Raises what reading it raised.
        """
        if self._plain is None and not isinstance(self._data, bytearray):
            return self._data
        how = _reading()
        if self._plain is not None:
            if self._left is not None:
                self._left -= 1
            last = self._left == 0 and how == "own"
            return self._plain if last else _arrival(self._plain, how)
        token = _held.set(self._held)
        try:
            shown = [b.toreadonly() if how == "view" else bytearray(b) for b in self._buffers]
            return pickle.loads(self._data, buffers=shown)
        finally:
            _held.reset(token)


def _arrival(value: Any, how: Any) -> Any:
    from protocol.plain import arrival

    return arrival(value, how)


def _reading() -> str:
    """As a receiver asked; without batches in this process, nobody could."""
    wire: Any = sys.modules.get("protocol.wire")
    return "own" if wire is None else wire.reading()


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
