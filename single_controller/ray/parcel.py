"""An argument pickled apart from the call that carries it, so that one which cannot be read fails
that call with its role and rank, and not Ray's own reading of the task, which no host would see.
"""

from __future__ import annotations

import pickle
from typing import Any

from ray import cloudpickle

__all__ = ["ArrivedParcel", "Parcel"]


class Parcel:
    """A value to be sent; it arrives as an `ArrivedParcel`. Its buffers stay out of band."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        buffers: list[pickle.PickleBuffer] = []
        data = cloudpickle.dumps(self._value, protocol=5, buffer_callback=buffers.append)
        return ArrivedParcel, (data, *buffers)


class ArrivedParcel:
    """A value that has arrived, not read yet."""

    def __init__(self, data: bytes, *buffers: Any) -> None:
        self._data, self._buffers = data, buffers

    def value(self) -> Any:
        """Read it. Raises whatever its unpickling raises."""
        return pickle.loads(self._data, buffers=self._buffers)
