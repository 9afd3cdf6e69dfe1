"""What goes with a call's values to its host, and how the host puts the values in their places."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import ray

from single_controller.base.rows import is_future
from single_controller.base.spans import CallMark
from single_controller.ray.parcel import ArrivedParcel, Slot

__all__ = ["Enclosed", "Envelope", "Late", "arguments", "fetched", "opened", "sealed", "waits"]


class Late(NamedTuple):
    """A reference among the arguments, or to some of them, which the host resolves when the call's
    turn comes.
    """

    ref: Any


class Enclosed(NamedTuple):
    """A pickled future, which the host reads when the call's turn comes. No reference is in it."""

    data: bytes


class Envelope(NamedTuple):
    """What a call is, with its small values; `Slot`s stand for those in parcels.

    The last values go by `names`. `turn` (caller, number) orders the calls of one caller where Ray
    itself keeps no order. `keeps`: the token under which the output stays in the host, if it does;
    `publishes`: whether with device memory lent, if the call publishes it at once, else None.
    `claims`: the tokens of results in this host that the arguments read. `mark`: what
    a trace knows the call by. `padding`: whether the caller pads its batches, where that was set.
    """

    role: str
    method: str
    values: tuple[Any, ...]
    names: tuple[str, ...]
    materialize: bool
    reads_only: bool
    answers: bool
    turn: tuple[str, int] | None
    keeps: str | None
    publishes: bool | None
    claims: tuple[str, ...]
    mark: CallMark | None
    padding: str | None = None


# What pickles alike in every process: no class of the user's, no reference that Ray has to see.
_PLAIN = {str, bytes, int, float, bool, type(None), Slot, Enclosed}


def sealed(envelope: Envelope) -> Envelope | bytes | None:
    """The envelope as bytes where that can be: Ray carries those quickest, as they are. None where
    the title of its task says it all: any argument takes a fifth of the time of a task.
    """
    if envelope == _titled(f"{envelope.role}.{envelope.method}"):
        return None
    parts = (envelope.role, envelope.method, *envelope.names, *envelope.values)
    return pickle.dumps(envelope, 5) if _PLAIN.issuperset(map(type, parts)) else envelope


@lru_cache
def _titled(title: str) -> Envelope:
    """A call without arguments, whose result goes to the caller."""
    role, _, method = title.rpartition(".")
    return Envelope(role, method, (), (), True, False, True, None, None, None, (), None)


def opened(arrived: Envelope | bytes | None) -> Envelope:
    """The envelope that was sealed; within a task, whose title is that of the method."""
    if arrived is None:
        return _titled(ray.get_runtime_context().get_task_name() or "")
    if isinstance(arrived, bytes):
        envelope: Envelope = pickle.loads(arrived)
        return envelope
    return arrived


def waits(envelope: Envelope) -> bool:
    """Whether reading the arguments may take time."""
    return any(isinstance(value, Late | Enclosed) or is_future(value) for value in envelope.values)


def fetched(parcels: Sequence[ArrivedParcel | Late]) -> list[ArrivedParcel]:
    """The parcels, all here."""
    return [ray.get(p.ref) if isinstance(p, Late) else p for p in parcels]


def arguments(
    envelope: Envelope, parcels: Sequence[ArrivedParcel]
) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments, all here."""
    values = [_resolved(value, envelope, parcels) for value in envelope.values]
    split = len(values) - len(envelope.names)
    return values[:split], dict(zip(envelope.names, values[split:], strict=True))


def _resolved(value: Any, envelope: Envelope, parcels: Sequence[ArrivedParcel]) -> Any:
    if isinstance(value, Slot):
        found = parcels[value.parcel].value(value.at)
        if value.lacks:
            from protocol.batches import set_shared_values, shared_values

            slots = {k: v for k, v in shared_values(found).items() if type(v) is Slot}
            whole = {k: parcels[slot.parcel].value(slot.at) for k, slot in slots.items()}
            set_shared_values(found, whole)
        return found
    if isinstance(value, Late):
        return ray.get(value.ref)
    if isinstance(value, Enclosed):
        value = pickle.loads(value.data)
    if envelope.materialize and is_future(value):
        how: AbstractContextManager[None] = nullcontext()
        if envelope.reads_only:
            from protocol.wire import read_as

            how = read_as("view")
        with how:
            return value.get()
    return value
