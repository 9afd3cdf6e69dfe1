"""An argument pickled apart from the call that carries it, so that one which cannot be read fails
that call with its role and rank, and not Ray's own reading of the task, which no host would see.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

from ray import cloudpickle

__all__ = ["ArrivedParcel", "Packed", "Parcel"]


class Packed:
    """A bare TensorDict that travels as a DataProto does; it arrives as a TensorDict."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        from protocol import wire

        return wire.unpack_tensordict, (wire.pack_tensordict(self._batch),)

    @classmethod
    def wrap(cls, value: Any) -> Any:
        """`value`, or a TensorDict packed. Where tensordict is not loaded, there is none."""
        module = sys.modules.get("tensordict")
        return cls(value) if module is not None and isinstance(value, module.TensorDict) else value


class Parcel:
    """A value to be sent; it arrives as an `ArrivedParcel`. Its buffers stay out of band."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        buffers: list[pickle.PickleBuffer] = []
        data = cloudpickle.dumps(
            Packed.wrap(self._value), protocol=5, buffer_callback=buffers.append
        )
        return ArrivedParcel, (data, *buffers)

    def size(self) -> int | None:
        """The bytes that go on the way; None where the value cannot be pickled."""
        try:
            _, (data, *buffers) = self.__reduce__()
        except Exception:
            return None
        return int(len(data) + sum(buffer.raw().nbytes for buffer in buffers))


class ArrivedParcel:
    """A value that has arrived in its receiver's own memory, or what reading it raised.

    It is read at once, within Ray's reading of the task, because that is where Ray notes the
    references it holds; the error waits until the call asks.
    """

    def __init__(self, data: bytes, *buffers: Any) -> None:
        self._value, self._error = None, None
        try:
            self._value = pickle.loads(data, buffers=[bytearray(buffer) for buffer in buffers])
        except Exception as error:
            self._error = error

    def value(self) -> Any:
        """The value. Raises what reading it raised."""
        if self._error is not None:
            raise self._error
        return self._value
