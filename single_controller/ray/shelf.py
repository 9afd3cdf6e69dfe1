"""Results that stay in the process that made them, until others ask or the driver drops them; and
how it is found out that somebody wrote into what others read.

A later call on the same process takes them from the shelf. For anyone else they are published:
copied into shared memory, by a task that the driver puts into the queue of the host.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from single_controller.base.message import Message, how_to_read, is_packed
from single_controller.base.trace import Event, note, now_ns
from single_controller.errors import SharedMemoryWriteError
from single_controller.ray.message import LARGE, Answer, Packer

if TYPE_CHECKING:
    from protocol.wire import Reading

__all__ = ["Kept", "Shelf", "Untouched", "in_thread", "version"]


class _Keeping(Packer):
    """Leaves tensors and batches out of the pickle, which are then those that the method made."""

    def reducer_override(self, value: Any) -> Any:
        if not is_packed(value):
            return super().reducer_override(value)
        if type(value) is sys.modules["torch"].nn.Parameter:
            return type(value), (value.detach(), value.requires_grad)
        return self.without(_detached(value))


class Kept:
    """One rank's result. Until it is there, `made` is unset."""

    def __init__(self) -> None:
        self.made = asyncio.Event()
        self.publications = 0  # tasks that have come to publish it
        self.last: int | None = None  # as many are to come before it can go
        self._batch: Any = None
        self._value: Message | None = None  # that is no batch, and `held` its tensors
        self._pairs: Any = None  # a generator's, which are not made yet
        self._watched: list[Any] = []  # its tensors, and how often they had been written to
        self._versions: list[int] = []
        self.title = ""
        self._lent: list[Any] = []  # what was made of it for others, who map it

    def keep(self, output: Any, title: str) -> int | None:
        """Keep what the method `title` returned, if it is a batch; its rows."""
        from protocol.batches import batch_rows, is_batch

        self.made.set()
        if not is_batch(output):
            return None
        self._batch, self.title = _detached(output), title
        self._watch([self._batch])
        return batch_rows(output)

    def keep_value(self, output: Any, title: str) -> Answer:
        """Keep what the method `title` returned, or have it come along with the answer, where it
        is small and has no tensors, arrays or batches.
        """
        self.made.set()
        message = Message.of(output, _Keeping)
        if message.size < LARGE and not (message.held or message.buffers):
            return Answer(title, message)
        message.buffers = [memoryview(bytearray(buffer.raw())) for buffer in message.buffers]
        self._value, self.title = message, title
        self._watch(message.held)
        return Answer(title, None)

    def keep_pairs(self, output: Any, title: str) -> Answer:
        """Keep what the method `title` is going to yield."""
        self.made.set()
        self._pairs, self.title = output, title
        return Answer(title, None)

    def pairs(self) -> tuple[Any, str]:
        """The generator, and the method that it is of."""
        if self._pairs is None:
            raise RuntimeError("the call that was to make this result failed or was dropped")
        return self._pairs, self.title

    def fail(self) -> None:
        """Note that there will be no batch; who waits for one learns why from the call itself."""
        self.made.set()

    def published(self, columns: Any, lends: bool) -> tuple[Message | None, int]:
        """The batch for others, or some columns of it, or the value, and the bytes that takes; with
        `lends`, device memory stays here.

        None if there is neither: whoever reads it has learned why, from the call itself.
        """
        if self._value is None and self._batch is None:
            return None, 0
        began = now_ns()
        self._check()
        found: Any = self._batch if self._value is None else _Parted(self._value)
        if columns is not None:
            from protocol import MissingKeyError
            from protocol.batches import select_keys

            try:
                found = select_keys(found, *columns)
            except MissingKeyError as error:
                found = error  # for who reads it, if anyone does
        message = Message.of(found, Packer, lends=lends)
        self._lent += message.lent
        details = {"method": self.title, "bytes": message.size}
        note(Event("user", "publish", began, now_ns(), details=details))  # that call has ended
        return message, message.size

    def batch(self) -> Any:
        """The batch, which is still its maker's: it must not be changed.

        Raises:
            SharedMemoryWriteError: somebody has.
        """
        self._check()
        return self._batch

    def rows(self, start: int, stop: int, columns: Any) -> Any:
        """Rows of the batch, or the value, as the reader asked (`protocol.wire.read_as`)."""
        if self._value is not None:
            return self.value(how_to_read())
        from protocol.batches import lend_rows, select_keys

        batch = self.batch()
        return lend_rows(batch if columns is None else select_keys(batch, *columns), start, stop)

    def value(self, how: Reading) -> Any:
        """What is no batch: its tensors themselves, if "view", or copies on their device."""
        self._check()
        kept = self._value
        assert kept is not None
        buffers = [buffer.toreadonly() for buffer in kept.buffers]
        return Message(kept.data, buffers, kept.foreign, _lent(kept.held, how)).read()

    def _watch(self, kept: Sequence[Any]) -> None:
        if not (found := [value for value in kept if is_packed(value)]):
            return
        from protocol.batches import batch_tensors, is_batch

        each = [batch_tensors(value) if is_batch(value) else (value,) for value in found]
        self._watched = [tensor for tensors in each for tensor in tensors]
        self._versions = [*map(version, self._watched)]

    @property
    def written(self) -> bool:
        """Whether somebody wrote into its tensors."""
        return self._versions != [*map(version, self._watched)]

    def _check(self) -> None:
        if self._value is None and self._batch is None:
            raise RuntimeError("the call that was to make this result failed or was dropped")
        if self.written:
            raise SharedMemoryWriteError(
                f"{self.title} returned tensors without blocking, so that they stay in the "
                "worker, and they have been written to since: return a copy of what the worker "
                "writes into, as x.clone(), or have it read before; or a method with "
                "reads_only=True wrote into them"
            )


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


def _lent(held: Sequence[Any], how: Reading) -> Sequence[Any]:
    """The same for one reader: what it does with the objects themselves does not show in others."""
    if not any(map(is_packed, held)):
        return held
    import torch

    from protocol.batches import batch_rows, is_batch, lend_rows
    from protocol.wire import read_as

    def lent(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shown = value.detach() if how == "view" else value.detach().clone()
            return shown.requires_grad_() if value.requires_grad else shown
        return lend_rows(value, 0, batch_rows(value)) if is_batch(value) else value

    with read_as(how):
        return [lent(value) for value in held]


def version(tensor: Any) -> int:
    """How often it was written to; torch does not count for inference tensors."""
    return 0 if tensor.is_inference() else int(tensor._version)


class Untouched:
    """With `SINGLE_CONTROLLER_CHECK_READS=1` in the worker's environment, finds a method that wrote
    into arguments which it was registered to read only. numpy refuses such writes; torch does not
    know of them, and the memory may be that of other ranks, or of the role that made it.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._before: list[tuple[str, Any, int]] = []
        if os.environ.get("SINGLE_CONTROLLER_CHECK_READS", "") not in ("", "0"):
            named = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
            for name, value in named.items():
                found = _tensors(value, name)
                self._before += [(path, tensor, version(tensor)) for path, tensor in found]

    def check(self, title: str) -> None:
        """Raise SharedMemoryWriteError, naming the method as `title`, where one has changed."""
        changed = [path for path, tensor, before in self._before if version(tensor) != before]
        if changed:
            raise SharedMemoryWriteError(
                f"{title} is registered with reads_only=True, and has written into "
                f"{', '.join(changed)}, which others read too: write into a copy, x.clone(), or "
                "register it without reads_only"
            )


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The tensors in a value, each with the way to it; none where torch is not loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")
    elif hasattr(value, "non_tensor_batch"):
        yield from _tensors(value.batch, f"{path}.batch")
        yield from _tensors(value.meta_info, f"{path}.meta_info")
    elif hasattr(value, "items"):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")


class Shelf:
    """A host's results, by the token of their call."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, token: str) -> Kept:
        """The place of a result that is there, or will be."""
        return self._kept.setdefault(token, Kept())

    def claim(self, keys: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Kept]:
        """What a call is going to read, by token and rank. It outlives its release."""
        return {key: self._kept[key[0]] for key in keys if key[0] in self._kept}

    def check_lent(self, tokens: Iterable[str], title: str) -> None:
        """Raise SharedMemoryWriteError where the method `title` wrote into what others may have
        been reading.
        """
        for kept in [self._kept[token] for token in tokens if token in self._kept]:
            if kept.written:
                raise SharedMemoryWriteError(
                    f"{title} has written into what {kept.title} returned, and another process "
                    "may have been reading it: wait for the calls that read it first"
                )

    def publication(self, token: str) -> Kept:
        """The same for a task that publishes."""
        kept = self.open(token)
        kept.publications += 1
        self._drop(token)
        return kept

    def release(self, token: str, publications: int) -> None:
        """Let go of a result, after so many publications, which may come in any order."""
        if token in self._kept:
            self._kept[token].last = publications
            self._drop(token)

    def _drop(self, token: str) -> None:
        kept = self._kept[token]
        if kept.last is not None and kept.publications >= kept.last:
            del self._kept[token]


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run what may wait in a thread of its own: those of asyncio's pool could all be waiting for
    something that needs one of them.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            setter(value)

    def run() -> None:
        try:
            outcome = done.set_result, context.run(function, *args)
        except BaseException as error:
            outcome = done.set_exception, error
        loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, daemon=True, name=function.__name__).start()
    return await done
