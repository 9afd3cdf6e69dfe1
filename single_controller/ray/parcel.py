"""Values pickled apart from the call or result that carries them: their buffers stay out of band
and are counted, and one that cannot be read fails its own call, with its role and rank.

What a batch is on the wire is left to `protocol.wire`.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import ray
from ray import cloudpickle
from ray.actor import ActorHandle

from single_controller.base.spans import now_ns, recording
from single_controller.errors import SendError, SingleControllerError

__all__ = [
    "ArrivedParcel",
    "Parcel",
    "Result",
    "SizeOf",
    "Slot",
    "counting",
    "pickles",
    "received",
    "size_of",
]

_received: ContextVar[Callable[[int], None] | None] = ContextVar("_received", default=None)

_references: ContextVar[Sequence[Any]] = ContextVar("_references")

_REFERENCES = (ray.ObjectRef, ActorHandle)  # which Ray counts where it pickles them itself
_BARE = (int, float, bool, type(None))


class _Pickler(cloudpickle.Pickler):
    """Lets `protocol.wire` pack tensors and batches wherever they are in a value.

    It is imported when the first one is met: a worker that has none needs not wait for it.
    """

    def __init__(self, file: io.BytesIO, lends: bool, held: list[Any] | None) -> None:
        self._lends, self._held = lends, held
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)
        self.message: Any = None
        modules = (("torch", "Tensor"), ("tensordict", "TensorDict"), ("protocol.table", "Table"))
        self._numbers = tuple(
            getattr(sys.modules[module], name) for module, name in modules if module in sys.modules
        )

    def reducer_override(self, obj: Any) -> Any:
        if self._held is not None and isinstance(obj, _REFERENCES):
            self._held.append(obj)
            return _take, (len(self._held) - 1,)
        if self._numbers and isinstance(obj, self._numbers):
            from protocol import wire

            if self.message is None:
                self.message = wire.Message(self._lends).__enter__()
            packed = wire.pack_value(obj)
            if packed is not None:
                return wire.unpack_value, (packed,)
        return super().reducer_override(obj)


def _take(at: int) -> Any:
    return _references.get()[at]


class _Pickled(NamedTuple):
    """A value as it travels.

    `numbers`: it holds tensors or batches. `foreign`: the buffers that are not theirs, which
    whoever reads must make private. `lent`: the tensors that stay on their device. `held`: the
    references apart from `data`, for Ray to see them.
    """

    numbers: bool
    foreign: tuple[int, ...]
    data: bytes
    buffers: Sequence[Any]
    lent: Sequence[Any]
    held: Sequence[Any]

    @property
    def size(self) -> int:
        return _size(self.data, self.buffers)


def _pickled(value: Any, lends: bool = False, held: list[Any] | None = None) -> _Pickled:
    with io.BytesIO() as file:
        pickler = _Pickler(file, lends, held)
        try:
            pickler.dump(value)
        finally:
            message = pickler.message
            if message is not None:
                message.__exit__()
        buffers = pickler.buffers
        foreign = [i for i, b in enumerate(buffers) if message is None or not message.holds(b)]
        lent = message.lent if message is not None else ()
        data = file.getvalue()
        return _Pickled(message is not None, tuple(foreign), data, buffers, lent, held or ())


def _read(
    foreign: Sequence[int], data: bytes, buffers: Sequence[Any], held: Sequence[Any] = ()
) -> Any:
    """The value, with the buffers that `protocol.wire` leaves alone in private memory."""
    import numpy as np  # not at the top: a worker whose results are numbers needs none

    received = list(buffers)
    for i in foreign:
        view = memoryview(buffers[i])
        received[i] = np.array(np.frombuffer(view, np.uint8)) if view.nbytes else bytearray()
    token = _references.set(held)
    try:
        return pickle.loads(data, buffers=received)
    finally:
        _references.reset(token)


class Parcel:
    """Values to be sent; they arrive as an `ArrivedParcel`. `reads_only`: as views.

    They are pickled here and now, so that nothing of a call is sent where one cannot be. `count`
    is told the bytes whenever they leave.

    Raises:
        SendError: one of them cannot be pickled.
    """

    def __init__(
        self, values: Sequence[Any], reads_only: bool, count: Callable[[int], None]
    ) -> None:
        self._reads_only, self._count = reads_only, count
        try:
            self._sent = _pickled(tuple(values), held=[])
        except SingleControllerError:
            raise
        except Exception as error:
            raise SendError(f"its arguments cannot be sent: {error}") from error

    @property
    def size(self) -> int:
        """The bytes of the values."""
        return self._sent.size

    def __reduce__(self) -> tuple[Any, ...]:
        sent = self._sent
        self._count(sent.size)
        head = self._reads_only, sent.numbers, sent.foreign, sent.data, sent.held
        return ArrivedParcel, (*head, *sent.buffers)


class ArrivedParcel:
    """Values that have arrived in their receiver's own memory, or what reading them raised.

    They are read at once, within Ray's reading of the task, because that is where Ray notes the
    references they hold; the error waits until the call asks.
    """

    def __init__(
        self,
        reads_only: bool,
        numbers: bool,
        foreign: Sequence[int],
        data: bytes,
        held: Sequence[Any],
        *buffers: Any,
    ) -> None:
        self._values: Sequence[Any] = ()
        self._error: Exception | None = None
        began = now_ns()
        try:
            how: AbstractContextManager[None] = nullcontext()
            if reads_only and numbers:
                from protocol import wire

                how = wire.read_as("view")
            with how:
                self._values = _read(() if reads_only else foreign, data, buffers, held)
        except Exception as error:
            self._error = error
        self.read_ns = began, now_ns()

    def value(self, at: int) -> Any:
        """One of them. Raises what reading them raised."""
        if self._error is not None:
            raise self._error
        return self._values[at]


class Slot(NamedTuple):
    """Stands in a call for value number `at` of its parcel number `parcel`."""

    parcel: int
    at: int


class Result:
    """What a method returned, in call number `call` of a trace; it arrives as itself. With `lends`,
    tensors stay on their device.

    Once it has been pickled, `size` are its bytes, and `lent` the loans to be ended some time.
    """

    def __init__(self, value: Any, call: int = 0, lends: bool = False) -> None:
        self._value, self._call, self._lends = value, call, lends
        self.size = 0
        self.lent: Sequence[Any] = ()

    @classmethod
    def wrap(cls, value: Any, call: int = 0) -> Any:
        """`value` where pickling it apart would gain nothing."""
        return value if isinstance(value, _BARE) else cls(value, call)

    def __reduce__(self) -> tuple[Any, ...]:
        began = now_ns()
        sent = _pickled(self._value, self._lends)
        self.size, self.lent = sent.size, sent.lent
        if self._call and (buffer := recording()) is not None:
            details = {"bytes": self.size}
            buffer.add("serialise", "serialise", began, now_ns(), self._call, details)
        return _open, (sent.foreign, sent.data, *sent.buffers)


class SizeOf:
    """Returned after a `Result`, it arrives as the number of bytes that this one took."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self._result.size,)


def _open(foreign: Sequence[int], data: bytes, *buffers: Any) -> Any:
    received(_size(data, buffers))
    return _read(foreign, data, buffers)


def received(size: int) -> None:
    """Count bytes that have come to this process."""
    count = _received.get()
    if count is not None:
        count(size)


@contextmanager
def counting(count: Callable[[int], None]) -> Generator[None, None, None]:
    """Within this context, tell `count` the bytes of each result that arrives."""
    token = _received.set(count)
    try:
        yield
    finally:
        _received.reset(token)


def pickles(value: Any) -> int:
    """The bytes of a value on its way. Raises what pickling it raises."""
    return _pickled(value, held=[]).size


def size_of(value: Any) -> int | None:
    """The same; None where it cannot be pickled."""
    try:
        return pickles(value)
    except Exception:
        return None


def _size(data: bytes, buffers: Sequence[Any]) -> int:
    return len(data) + sum(memoryview(buffer).nbytes for buffer in buffers)
