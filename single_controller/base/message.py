"""Message: a value pickled apart from what carries it, its buffers beside the pickle; and the parts
that the messages of one call have in common, which are stored or copied once.

Carrying them is left to the backends, and what a batch is on the wire to `protocol.wire`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from single_controller.base.plan import Call, is_late, loaded
from single_controller.errors import SendError, SingleControllerError

__all__ = [
    "NOTHING",
    "ONLY_PASSED",
    "READ_BEFORE",
    "RESULT_GONE",
    "Message",
    "Outbox",
    "Outgoing",
    "Packer",
    "Packing",
    "checked_output",
    "checked_pair",
    "held",
    "how_to_read",
    "is_packed",
    "not_sent",
    "packed",
    "read_rows",
]

# What a value holds and its pickle does not, what has arrived for what was late, and the parts that
# go beside it: functions that pickle calls can be told in no way.
held: ContextVar[Sequence[Sequence[Any]]] = ContextVar("held")
_LATE, _PARTS = 1, 2
_TINY = 1_000  # characters

ONLY_PASSED = (
    "what {0} yields goes in buckets, from process to process: pass the handle to a method of a "
    "group, which gets an iterator of the pairs"
)
RESULT_GONE = "what {0} returned is gone with its workers: {1}. Fetch what you need before that"
READ_BEFORE = (
    "what {0} yields on rank {1} was passed on before, and can be read once: call it again"
)
_MUST_YIELD = (
    "the method is registered with bucket_bytes and must yield pairs of a name and a tensor"
)


def _take(of: int, at: int) -> Any:
    return held.get()[of][at]


class Packing:
    """Makes a pickler leave `kept` values out of the pickle, and futures and handles too where they
    are to go into a list, `late`; lets `protocol.wire` pack tensors and batches wherever they are.

    That is imported when the first one is met: a worker that has none needs not wait for it.
    """

    kept: tuple[type, ...] = ()

    def __init__(
        self, file: io.BytesIO, lends: bool = False, late: list[Any] | None = None
    ) -> None:
        self.buffers: list[Any] = []
        self.held: list[Any] = []
        self.sent: Any = None
        self.late, self._lends = late, lends
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)  # type: ignore[call-arg]

    def without(self, value: Any) -> Any:
        """The reduction of a value that is left out."""
        self.held.append(value)
        return _take, (0, len(self.held) - 1)

    def reducer_override(self, value: Any) -> Any:
        if self.late is not None and is_late(value):
            self.late.append(value)
            return _take, (_LATE, len(self.late) - 1)
        if isinstance(value, self.kept) and value is not _take:
            return self.without(value)
        ours = is_packed(value)
        if self.sent is not None:
            self.sent.paused = not ours
        if ours:
            from protocol import wire

            if self.sent is None:
                self.sent = wire.Message(self._lends).__enter__()
            packed = wire.pack_value(value)
            if packed is not None:
                return wire.unpack_value, (packed,)
        further = getattr(super(), "reducer_override", None)
        return NotImplemented if further is None else further(value)


def is_packed(value: Any) -> bool:
    """Whether it is a tensor or a batch. Where their module is not loaded, there is none."""
    kind: Any = type(value)
    return _is_packed(kind)


@functools.lru_cache(256)
def _is_packed(kind: Any) -> bool:
    bases = (
        ("torch", "Tensor"),
        ("tensordict", "TensorDict"),
        ("protocol.data_proto", "DataProto"),
        ("protocol.wire", "Tensors"),
    )
    found = [getattr(sys.modules.get(module), name, None) for module, name in bases]
    return issubclass(kind, tuple(filter(None, found)))


Packer: TypeAlias = "Callable[..., Any]"  # a pickler's class that is `Packing`


@dataclass(slots=True, eq=False, repr=False)
class Message:
    """A pickled value. `foreign` are the buffers that no batch takes care of, which whoever reads
    must make private; `held` is what the pickle has not; `lent` are tensors that others
    map, to be kept until they have read them.
    """

    data: bytes
    buffers: Sequence[Any] = ()
    foreign: Sequence[int] = ()
    held: Sequence[Any] = ()
    lent: Sequence[Any] = ()

    @classmethod
    def of(cls, value: Any, packer: Packer, **options: Any) -> Message:
        """Raises what pickling the value raises."""
        with io.BytesIO() as file:
            pickler = packer(file, **options)
            try:
                pickler.dump(value)
            finally:
                if pickler.sent is not None:
                    pickler.sent.__exit__()
            sent, buffers = pickler.sent, pickler.buffers
            ours = () if sent is None else sent.buffers
            foreign = tuple([i for i, buffer in enumerate(buffers) if id(buffer) not in ours])
            lent = () if sent is None else tuple(sent.lent)
            return cls(file.getvalue(), buffers, foreign, tuple(pickler.held), lent)

    def __reduce__(self) -> tuple[Any, ...]:
        buffers = tuple(map(pickle.PickleBuffer, self.buffers))
        return Message, (self.data, buffers, tuple(self.foreign), tuple(self.held))

    def copied(self) -> Message:
        """Itself, of copies: whoever made it may write into its memory before it is read."""
        self.buffers = [memoryview(bytes(buffer.raw())) for buffer in self.buffers]
        return self

    @property
    def size(self) -> int:
        """The bytes that leave with it."""
        return len(self.data) + sum(memoryview(buffer).nbytes for buffer in self.buffers)

    def read(self, late: Sequence[Any] = (), parts: Iterable[Sequence[Any]] = ()) -> Any:
        """The value, in memory of the reader's own, or as it asked (`protocol.wire.read_as`), with
        what has arrived for what was `late`, and with the values of its `parts`.

        Raises:
            What reading it raises.
        """
        buffers = self.buffers
        if self.foreign and how_to_read() != "view":
            buffers = list(buffers)
            for i in self.foreign:
                buffers[i] = bytearray(memoryview(buffers[i]))
        token = held.set((self.held, late, *parts))
        try:
            return pickle.loads(self.data, buffers=buffers)
        finally:
            held.reset(token)


def how_to_read() -> Any:
    """As a reader asked; without batches in this process, nobody could."""
    wire = loaded("protocol.wire")
    return "own" if wire is None else wire.reading()


def read_rows(batch: Message, start: int, stop: int, columns: Any = None) -> Any:
    """Rows of a batch, or of `select_keys`' columns: what is not asked for is not copied."""
    from protocol.batches import lend_rows, select_keys
    from protocol.wire import read_as

    how = how_to_read()
    with read_as("join" if how == "own" else how):
        whole = batch.read()
    return lend_rows(whole if columns is None else select_keys(whole, *columns), start, stop)


class _Part(NamedTuple):
    """Stands in a message for a value of one of its parts, and arrives as that."""

    of: int
    at: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (_PARTS + self.of, self.at)


NOTHING = Message(pickle.dumps(((), {})))  # of a call without arguments


class Outgoing(NamedTuple):
    """What the ranks that are called alike get: a message, which reads as arguments and keyword
    arguments; its parts; and what was left out of it, `futures` and handles. `size` are the bytes
    of what is in the message itself.
    """

    message: Message
    size: int
    parts: list[Any]
    futures: list[Any]


class Outbox:
    """The messages of one call: `by_rank`, one and the same for ranks that get the same values.

    Values that several ranks get, and what their batches share, are pickled once, together where
    they go to the same ranks. `share(message, ranks)` says what goes in place of such a part, or
    None to have it within each message; `stored` are the ids of those that it took. Futures and
    handles stay apart: how they are pickled depends on who reads what.

    Raises:
        SendError: a value cannot be pickled.
    """

    def __init__(
        self,
        calls: Sequence[Call | None],
        packer: Packer,
        share: Callable[[Message, int], Any],
    ) -> None:
        self._packer = packer
        self.stored: dict[int, tuple[Any, int]] = {}  # by id: the part, and the number in it
        groups: dict[Any, tuple[Call, list[int]]] = {}  # by what they get: ranks
        for rank, call in enumerate(calls):
            if call is not None:
                key = (len(call.args), *call.kwargs, *map(id, call.values()))
                groups.setdefault(key, (call, []))[1].append(rank)
        self._share([*groups.values()], share)
        self.by_rank: list[Outgoing | None] = [None] * len(calls)
        for call, ranks in groups.values():
            sent = self._packed_call(call)
            for rank in ranks:
                self.by_rank[rank] = sent

    def _share(
        self, groups: Sequence[tuple[Call, list[int]]], share: Callable[[Message, int], Any]
    ) -> None:
        readers: dict[int, tuple[Any, list[int]]] = {}  # by id: a value, and the groups that get it
        for number, (call, _) in enumerate(groups):
            for value in call.values():
                for item in (value, *_shared_values(value).values()):
                    if not (_is_tiny(item) or is_late(item)):
                        of = readers.setdefault(id(item), (item, []))[1]
                        if of[-1:] != [number]:
                            of.append(number)
        together: dict[tuple[int, ...], list[Any]] = {}
        for value, of in readers.values():
            together.setdefault(tuple(of), []).append(value)
        for numbers, found in together.items():
            count = sum(len(groups[number][1]) for number in numbers)
            if count == 1:
                continue
            within = {id(item) for value in found for item in _shared_values(value).values()}
            found = [value for value in found if id(value) not in within]
            late: list[Any] = []
            message = packed(tuple(found), self._packer, late=late)
            if late:
                found = [value for value in found if not self._has_late(value)]
                message = packed(tuple(found), self._packer)
            part = share(message, count) if found else None
            if part is not None:
                self.stored.update({id(value): (part, i) for i, value in enumerate(found)})

    def _has_late(self, value: Any) -> bool:
        late: list[Any] = []
        packed(value, self._packer, late=late)
        return bool(late)

    def _packed_call(self, call: Call) -> Outgoing:
        parts: dict[int, Any] = {}
        args = [self._placed(value, parts) for value in call.args]
        kwargs = {name: self._placed(value, parts) for name, value in call.kwargs.items()}
        futures: list[Any] = []
        message = packed((args, kwargs), self._packer, late=futures) if args or kwargs else NOTHING
        away = all(type(v) is _Part or is_late(v) for v in (*args, *kwargs.values()))
        return Outgoing(message, 0 if away else message.size, [*parts.values()], futures)

    def _placed(self, value: Any, parts: dict[int, Any]) -> Any:
        """What stands for a value in a message that has these parts."""
        if id(value) in self.stored:
            part, at = self.stored[id(value)]
            parts.setdefault(id(part), part)
            return _Part([*parts].index(id(part)), at)
        shared = _shared_values(value) if self.stored else {}
        found = {k: self._placed(v, parts) for k, v in shared.items() if id(v) in self.stored}
        return _with_shared(copy.copy(value), found) if found else value


def packed(value: Any, packer: Packer, what: str = "its arguments", **options: Any) -> Message:
    """A message of arguments.

    Raises:
        SendError: they cannot be pickled.
    """
    try:
        return Message.of(value, packer, **options)
    except SingleControllerError:
        raise
    except Exception as error:
        raise SendError(f"{what} cannot be sent: {error}") from error


def _shared_values(value: Any) -> dict[str, Any]:
    """What all rows of a batch share, by key; nothing for any other value."""
    batches = loaded("protocol.batches")  # where it is not loaded, there are none
    return batches.shared_values(value) if batches and batches.is_batch(value) else {}


def _with_shared(batch: Any, values: Mapping[str, Any]) -> Any:
    from protocol.batches import set_shared_values

    set_shared_values(batch, values)
    return batch


def _is_tiny(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return len(value) < _TINY
    return value is None or isinstance(value, int | float)


def not_sent(title: str, named: Iterable[tuple[str, Any]], packer: Packer) -> SendError | None:
    """The error for the first of these values that cannot be pickled; None if all can."""
    for name, value in named:
        try:
            packed(value, packer, f"{title}: {name}", late=[])
        except SendError as error:
            return error
    return None


def checked_output(output: Any, pairs: bool = False) -> Any:
    """What a method returned. Raises TypeError for a generator, which cannot be sent, or with
    `pairs` for anything else.
    """
    if (inspect.isgenerator(output) or inspect.isasyncgen(output)) and not pairs:
        raise TypeError(
            "the method returned a generator, which cannot be sent; return a list, or yield pairs "
            "of a name and a tensor and register it with blocking=False, bucket_bytes=256 << 20"
        )
    if pairs and not inspect.isgenerator(output):
        raise TypeError(f"{_MUST_YIELD}; it returned {type(output).__name__}")
    return output


def checked_pair(pair: Any) -> tuple[str, Any]:
    """What a method yielded. Raises TypeError where it is no name and tensor."""
    import torch

    name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
    if isinstance(name, str) and isinstance(tensor, torch.Tensor):
        return name, tensor
    found: Any = type(pair)
    if isinstance(pair, tuple):
        found = [one if isinstance(one, str) else type(one) for one in pair]
    raise TypeError(f"{_MUST_YIELD}; it yielded {found}")
