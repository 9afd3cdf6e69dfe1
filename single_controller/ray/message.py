"""A call as it travels to a host: a head, the message of its values, and parts that others get too;
and what comes back. Each rank's is one argument of one Ray task.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray import cloudpickle
from ray.actor import ActorHandle

from single_controller.base.message import NOTHING, Message, Packing
from single_controller.base.plan import Handle, origins
from single_controller.base.trace import CallMark
from single_controller.ray.failure import StaysError, ours

__all__ = [
    "LARGE",
    "SMALL",
    "Answer",
    "Head",
    "Packer",
    "opened",
    "packed_value",
    "read",
    "sealed",
]

SMALL = 16_384  # bytes that are sent several times sooner than stored once and fetched
LARGE = 100_000  # bytes that Ray stores anyway, rather than send them within a task

_BARE = (int, float, bool, type(None))


class Packer(Packing, cloudpickle.Pickler):
    """Leaves to Ray the references that it counts where it pickles them itself. A batch that stays
    in a worker goes with what `offers` has for its key: a reference to where it is published.
    """

    kept = (ray.ObjectRef, ActorHandle)

    def __init__(
        self, file: io.BytesIO, offers: Mapping[Any, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(file, **options)
        self._offers = offers

    def reducer_override(self, value: Any) -> Any:
        if self.late is None and isinstance(value, Handle):  # Ray's own is a reference besides
            return value.__reduce__()
        if self._offers is not None and hasattr(type(value), "offered"):
            return value.offered(self._offers)
        return super().reducer_override(value)


class Head(NamedTuple):
    """What a call is, besides its values.

    `answers`: the caller wants the output; `opens`: as a reference that anyone may ask Ray for.
    `turn` (caller, number) orders the calls of one caller where Ray itself keeps no order. `keeps`:
    where the output stays in the host (`shelf.Home`), if it does. `mark`: what a trace knows the
    call by. `padding`: whether the caller pads its batches, where that was set. `pairs`: the output
    is a generator of them. `lent`: the tokens of results in this host that others may be reading,
    which it must not change. `own`: where what it reads of
    this host is, which later calls may change.
    """

    role: str
    method: str
    materialize: bool = True
    reads_only: bool = False
    answers: bool = True
    opens: bool = False
    turn: tuple[str, int] | None = None
    keeps: tuple[str, int] | None = None
    mark: CallMark | None = None
    padding: str | None = None
    pairs: bool = False
    lent: tuple[str, ...] = ()
    own: tuple[tuple[str, int], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.role}.{self.method}"


def sealed(head: Head, message: Any, parts: Sequence[Any]) -> tuple[Any, ...]:
    """A task's one argument: bytes where that can be, which Ray carries quickest, as they are. None
    where the title of the task says it all: any takes a sixth of the time of a call without.

    `message` and `parts` are messages, or references to stored ones.
    """
    if message is NOTHING and head == Head(head.role, head.method):
        return ()
    if not isinstance(message, Message):
        return ((tuple(head), message, parts),)
    if not (parts or message.buffers or message.held):
        return (pickle.dumps((tuple(head), (message.data,)), 5),)
    fields = message.data, tuple(message.buffers), message.foreign, message.held
    return ((tuple(head), fields, parts),)  # of which Ray pickles no class


def opened(arrived: Any) -> tuple[Head, Any, Sequence[Any]]:
    """What was sealed; within a task, whose title is that of the method."""
    if arrived is None:
        role, _, method = (ray.get_runtime_context().get_task_name() or "").rpartition(".")
        return Head(role, method), NOTHING, ()
    head, message, *parts = pickle.loads(arrived) if isinstance(arrived, bytes) else arrived
    if not isinstance(message, ray.ObjectRef):
        message = Message(*message)
    return Head(*head), message, parts[0] if parts else ()


def read(
    head: Head,
    message: Any,
    parts: Sequence[Any],
    kept: Mapping[tuple[str, int], Any],
    reader: Any,
    opened: list[Any],
) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments, all here. `kept` are the results of this process, which iterators know as
    the `reader`, and `opened` gets these.

    Raises:
        What reading them raises.
    """

    def fetched(value: Any) -> Any:
        return ray.get(value) if isinstance(value, ray.ObjectRef) else value

    with _reading("view") if head.reads_only else contextlib.nullcontext():
        refs = [item for item in (message, *parts) if isinstance(item, ray.ObjectRef)]
        found = dict(zip(refs, ray.get(refs), strict=True)) if refs else {}
        message = found.get(message, message) if refs else message
        read_parts = [(found.get(part, part) if refs else part).read() for part in parts]
        # What is late comes as a list, behind parts that are tuples.
        late: list[Any] = read_parts.pop() if parts and isinstance(read_parts[-1], list) else []
        for origin in origins(late):
            if hasattr(origin, "home"):
                origin.kept, origin.reader, origin.opened = kept.get(origin.home), reader, opened
        values = [one.get() for one in late] if head.materialize else late
        args, kwargs = message.read(values, read_parts)
        return [*map(fetched, args)], {name: fetched(value) for name, value in kwargs.items()}


@contextmanager
def _reading(how: Any) -> Generator[None]:
    from protocol.wire import read_as

    with read_as(how):
        yield


class Answer:
    """What Ray has of a value: a message that arrives as the value wherever Ray reads it, or
    nothing, where the value stays with its worker: then Ray raises that.
    """

    def __init__(self, title: str, message: Message | None) -> None:
        self.title, self.message = title, message

    def __reduce__(self) -> tuple[Any, ...]:
        return _answer, (self.title, self.message)


def _answer(title: str, message: Message | None) -> Any:
    if ours.get():
        return Answer(title, message)
    return StaysError(title) if message is None else message.read()


def packed_value(output: Any, title: str = "", opens: bool = False) -> Any:
    """What goes back for an output: itself where pickling it apart would gain nothing."""
    if isinstance(output, _BARE):
        return output
    message = Message.of(output, Packer)
    return Answer(title, message) if opens else message
