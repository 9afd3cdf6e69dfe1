"""Results that stay in the process that made them, until others ask or the driver drops them; and
how it is found out that somebody wrote into what others read.

A later call on the same process takes them from the shelf. For anyone else they are published:
copied into shared memory, by a task that the driver puts into the queue of the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, TypeAlias

from single_controller.base.message import Message, how_to_read, is_packed
from single_controller.base.plan import named_arguments
from single_controller.base.trace import Event, note, now_ns
from single_controller.errors import SharedMemoryWriteError
from single_controller.ray.message import LARGE, Answer, Packer

__all__ = ["Home", "Kept", "Untouched", "Watched", "check_lent", "in_thread"]


# The token of a call, and the rank whose result it is, as the caller numbers it.
Home: TypeAlias = "tuple[str, int]"


class _Keeping(Packer):
    """Leaves tensors and batches out of the pickle, which are then those that the method made."""

    def reducer_override(self, value: Any) -> Any:
        if not is_packed(value):
            return super().reducer_override(value)
        if type(value) is sys.modules["torch"].nn.Parameter:
            return type(value), (value.detach(), value.requires_grad)
        return self.without(_detached(value))


class Kept:
    """One rank's result: a batch, a generator of pairs, or a value of another kind as a message.
    Until it is there, `made` is unset; there may be none.
    """

    def __init__(self) -> None:
        self.made = asyncio.Event()
        self.title = ""
        self._result: Any = None
        self.tensors = Watched([])  # of it
        self.told = False  # whether some method learned that it wrote into them
        self._lent: dict[int, Any] = {}  # by address: what was made of it for others, who map it

    def keep(self, output: Any, title: str) -> int | None:
        """Keep what the method `title` returned, if it is a batch; its rows."""
        from protocol.batches import batch_rows, is_batch

        self.made.set()
        if not is_batch(output):
            return None
        batch = _detached(output)
        self._hold(batch, title, [batch])
        return batch_rows(batch)

    def keep_value(self, output: Any, title: str) -> Answer:
        """Keep what the method `title` returned, or have it come along with the answer, where it
        is small and has no tensors, arrays or batches.
        """
        self.made.set()
        message = Message.of(output, _Keeping)
        if message.size < LARGE and not (message.held or message.buffers):
            return Answer(title, message)
        message.buffers = [memoryview(bytearray(buffer.raw())) for buffer in message.buffers]
        self._hold(message, title, message.held)
        return Answer(title, None)

    def keep_pairs(self, output: Any, title: str) -> Answer:
        """Keep what the method `title` is going to yield."""
        self.made.set()
        self._hold(output, title)
        return Answer(title, None)

    def fail(self) -> None:
        """Note that there will be no result; who waits for it learns why from the call itself."""
        self.made.set()

    def _hold(self, result: Any, title: str, watched: Sequence[Any] = ()) -> None:
        self._result, self.title, self.tensors = result, title, Watched(_tensors([*watched]))

    def _checked(self) -> Any:
        """The result. Raises SharedMemoryWriteError where somebody wrote into its tensors."""
        if self._result is None:
            raise RuntimeError("the call that was to make this result failed or was dropped")
        if self.tensors.written:
            raise SharedMemoryWriteError(
                f"{self.title} returned tensors without blocking, so that they stay in the "
                "worker, and they have been written to since: have them read before, call it anew, "
                "or return a copy of what the worker writes into, as x.clone(); or a method with "
                "reads_only=True wrote into them"
            )
        return self._result

    def pairs(self) -> tuple[Any, str]:
        """The generator, and the method that it is of."""
        return self._checked(), self.title

    def published(self, columns: Any, lends: bool) -> tuple[Message | None, int]:
        """The batch for others, or some columns of it, or the value, and the bytes that takes; with
        `lends`, device memory stays here.

        None if there is neither: whoever reads it has learned why, from the call itself.
        """
        if self._result is None:
            return None, 0
        began, found = now_ns(), self._checked()
        if isinstance(found, Message):
            found = _Parted(found)
        elif columns is not None:
            from protocol.batches import select_keys

            found = select_keys(found, *columns)
        message = Message.of(found, Packer, lends=lends)
        self._lent |= {tensor.untyped_storage().data_ptr(): tensor for tensor in message.lent}
        details = {"method": self.title, "bytes": message.size}
        note(Event("user", "publish", began, now_ns(), details=details))  # that call has ended
        return message, message.size

    def rows(self, start: int, stop: int, columns: Any) -> Any:
        """Rows of the batch, or the value, as the reader asked (`protocol.wire.read_as`): they are
        still the maker's.
        """
        found = self._checked()
        if isinstance(found, Message):
            buffers = [buffer.toreadonly() for buffer in found.buffers]
            return Message(found.data, buffers, found.foreign, _for_a_reader(found.held)).read()
        from protocol.batches import lend_rows, select_keys

        return lend_rows(found if columns is None else select_keys(found, *columns), start, stop)


class _Parted:
    """A value that arrives as such, where its pickle and its tensors are sent side by side."""

    def __init__(self, value: Message) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        value, tensors = self._value, self._value.held
        if any(map(is_packed, tensors)):
            from protocol.wire import Tensors

            tensors = Tensors(tensors)
        buffers = [pickle.PickleBuffer(buffer) for buffer in value.buffers]
        return _joined, (value.data, buffers, tensors)


def _joined(data: bytes, buffers: Sequence[Any], tensors: Sequence[Any]) -> Any:
    return Message(data, buffers, (), tensors).read()


def _detached(value: Any) -> Any:
    """A tensor or a batch of the same memory without autograd's graph."""
    from protocol.batches import detach_batch, is_batch

    if is_batch(value):
        return detach_batch(value)
    found = value.detach()
    return found.requires_grad_() if value.requires_grad else found


def _for_a_reader(held: Sequence[Any]) -> Sequence[Any]:
    """The tensors themselves, if "view", or copies on their device. What a reader does with the
    objects does not show in those of others.
    """
    if not any(map(is_packed, held)):
        return held
    from protocol.batches import batch_rows, is_batch, lend_rows

    view = how_to_read() == "view"

    def own(value: Any) -> Any:
        if is_batch(value):
            return lend_rows(value, 0, batch_rows(value))
        if not is_packed(value):
            return value
        shown = value.detach() if view else value.detach().clone()
        return shown.requires_grad_() if value.requires_grad else shown

    return [own(value) for value in held]


def _storage(tensor: Any) -> Any:
    """What a tensor has of memory in this process; None if nothing, or if its class hides it."""
    torch: Any = sys.modules["torch"]
    if type(tensor) is not torch.Tensor and hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.numel()
    return tensor.untyped_storage() if plain else None


_steps = Counter[int]()  # by address: of optimizers that wrote there


class Watched:
    """Tensors, and whether they were written to since, as far as that is counted, or their memory
    was freed, as FSDP does with what it has gathered.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        if tensors:
            _count_steps()
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._storages = [storage for storage in map(_storage, tensors) if storage is not None]
        self._before = self._now()

    def _now(self) -> tuple[list[int], list[tuple[int, int]]]:
        places = [storage.data_ptr() for storage in self._storages]
        counts = [tensor._version for tensor in self._counted]
        return counts, [(place, _steps[place]) for place in places]

    @property
    def written(self) -> bool:
        return self._before != self._now()


@functools.cache
def _count_steps() -> None:
    """Have steps of optimizers count as writes: torch counts no fused ones, and for a DTensor none
    into what it has here.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    storage = None if parameter.grad is None else _storage(parameter.detach())
                    if storage is not None:
                        _steps[storage.data_ptr()] += 1

    register_optimizer_step_post_hook(count)


class Untouched:
    """With `SINGLE_CONTROLLER_CHECK_READS=1` in the worker's environment, finds a method that wrote
    into arguments which it was registered to read only. numpy refuses such writes; torch does not
    know of them, and the memory may be that of other ranks, or of the role that made it.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._watched: list[tuple[str, Watched]] = []
        if os.environ.get("SINGLE_CONTROLLER_CHECK_READS", "") not in ("", "0"):
            for name, value in named_arguments(args, kwargs):
                found = _tensors(value)
                with contextlib.suppress(Exception):  # of an iterator of pairs, or another's object
                    found = _tensors([*Message.of(value, _Keeping).held])
                self._watched.append((name, Watched(found)))

    def check(self, title: str) -> None:
        """Raise SharedMemoryWriteError, naming the method as `title`, where one has changed."""
        changed = [name for name, tensors in self._watched if tensors.written]
        if changed:
            raise SharedMemoryWriteError(
                f"{title} is registered with reads_only=True, and has written into "
                f"{', '.join(changed)}, which others read too: write into a copy, x.clone(), or "
                "register it without reads_only"
            )


def _tensors(value: Any) -> list[Any]:
    """Those in a value, in lists, tuples, dicts and columns of batches."""
    if isinstance(value, dict):
        value = [*value.values()]
    if not is_packed(value):
        return [x for item in value for x in _tensors(item)] if type(value) in (list, tuple) else []
    from protocol.batches import batch_tensors, is_batch

    return batch_tensors(value) if is_batch(value) else [value]


def check_lent(shelf: Mapping[Home, Kept], tokens: Collection[str], title: str) -> None:
    """Raise SharedMemoryWriteError where the method `title` wrote into what others may have been
    reading.
    """
    lent = (kept for (token, _), kept in shelf.items() if token in tokens and not kept.told)
    if written := [kept for kept in lent if kept.tensors.written]:
        for kept in written:
            kept.told = True
        raise SharedMemoryWriteError(
            f"{title} has written into what {written[0].title} returned, and another process "
            "may have been reading it: wait for the calls that read it first"
        )


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run what may wait in a thread of its own: those of asyncio's pool could all be waiting for
    something that needs one of them.
    """
    done: Future[Any] = Future()
    done.set_running_or_notify_cancel()
    run = partial(copy_context().run, function, *args)

    def work() -> None:
        try:
            done.set_result(run())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True, name=function.__name__).start()
    return await asyncio.wrap_future(done)
