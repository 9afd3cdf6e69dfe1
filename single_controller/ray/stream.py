"""Results in pieces: a generator's (name, tensor) pairs, which go in buckets from the process that
makes them to all that read them.

The maker and its readers run at the same time, each in a call of its own process, and meet at a
relay: an actor that passes on references, and no bytes of tensors. Two buckets are alive at a time:
one is begun when all readers are done with the one before the last. Whoever fails ends all others
with its cause; the relay sees the end of each by the reference to its call.

All readers must read what they are passed, and several streams in the same order: a maker waits for
the slowest of its readers. One that leaves its loop, or ends its call, is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from single_controller.base.message import Message, checked_pair
from single_controller.base.trace import Event, note, now_ns
from single_controller.errors import GroupBrokenError, SharedMemoryWriteError
from single_controller.ray.failure import CallSite, get_ours, raised, translate
from single_controller.ray.message import SMALL, Packer
from single_controller.ray.process import ProcessInfo
from single_controller.ray.shelf import Home, Watched, in_thread

__all__ = ["Offer", "Pairs", "borrowed", "made", "made_here", "reading_pairs", "relay"]

_Pair: TypeAlias = "tuple[str, Any]"
_Sent: TypeAlias = "tuple[CallSite, list[Any]]"  # a call, and its reference, which stays one

_LATE = 100  # streams that have ended: what was sent before may come after


@dataclass(frozen=True)
class Offer:
    """By what the maker of a stream and its readers, in these other processes, find each other.
    `at` is the relay, None where nobody reads it but the maker's own process.
    """

    key: Home
    at: Any
    readers: tuple[ProcessInfo, ...]
    bucket_bytes: int
    lends: bool


class _Stream:
    def __init__(self) -> None:
        self.buckets: dict[int, Any] = {}  # None behind the last
        self.done: dict[ProcessInfo, int] = defaultdict(int)  # by reader: with how many buckets
        self.gone: set[ProcessInfo] = set()  # readers that read no more
        self.moved = 0  # bytes
        self.over = False
        self.error: Exception | None = None
        self.changed = asyncio.Condition()

    @property
    def whole(self) -> bool:
        """Whether all has been made."""
        return None in self.buckets.values()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with self.changed:
            self.changed.notify_all()
            await self.changed.wait_for(holds)

    def end(self, error: Exception | None = None) -> None:
        self.error, self.over = self.error or error, True


class _Relay:
    """Where makers leave buckets for their readers."""

    def __init__(self) -> None:
        # Ray warns of a `ray.get` that would block the loop; the one here waits in a thread.
        ray._private.worker.blocking_get_inside_async_warned = True  # pyright: ignore[reportAttributeAccessIssue]
        self._streams: dict[Home, _Stream] = defaultdict(_Stream)
        self._ended: deque[Home] = deque()

    async def give(
        self, key: Home, at: int, bucket: Any, size: int, readers: Sequence[ProcessInfo]
    ) -> bool:
        """Leave bucket number `at`, of so many bytes, None behind the last, and wait for room for
        the next; whether anyone wants that.
        """
        stream = self._streams[key]
        stream.buckets[at] = bucket
        stream.moved += size

        def reading() -> list[ProcessInfo]:
            return [] if stream.over else [r for r in readers if r not in stream.gone]

        def room() -> bool:
            done = min((stream.done[reader] for reader in reading()), default=at + 1)
            for old in [number for number in stream.buckets if number < done]:
                del stream.buckets[old]
            return done >= at

        await stream.until(room)
        return bool(reading())

    async def take(self, key: Home, at: int, reader: ProcessInfo) -> Any:
        """Bucket number `at`, once it is there, for a reader that is done with those before; None
        behind the last. Raises what ended it.
        """
        stream = self._streams[key]
        stream.done[reader] = at
        await stream.until(lambda: at in stream.buckets or stream.over)
        if stream.error is not None:
            raise stream.error
        return stream.buckets.get(at)

    async def leave(self, key: Home, reader: ProcessInfo) -> None:
        """A reader reads no more of it."""
        if (stream := self._streams.get(key)) is not None:
            stream.gone.add(reader)
            await stream.until(lambda: True)

    async def watch(
        self, offer: Offer, maker: _Sent | None, readers: Mapping[ProcessInfo, _Sent]
    ) -> int:
        """Until these calls have ended, tell the others of each end; the bytes that moved."""
        stream = self._streams[offer.key]
        reading = {ref: reader for reader, (_, [ref]) in readers.items()}
        stream.gone |= {*offer.readers} - {*readers}
        left = {ref: site for site, [ref] in (*readers.values(), *([maker] if maker else ()))}
        while left:
            await stream.until(lambda: True)  # tell them
            ready, _ = await in_thread(_first, [*left])
            for ref in ready:
                site, error = left.pop(ref), await in_thread(raised, ref)
                if ref in reading:
                    stream.gone.add(reading[ref])
                elif not (error or stream.over or stream.gone >= {*offer.readers} or stream.whole):
                    error = RuntimeError(
                        "it has ended, and not made all that other ranks read, too"
                    )
                if error is not None:
                    stream.end(translate(error, site))
        stream.end()
        stream.buckets.clear()
        self._ended.append(offer.key)
        if len(self._ended) > _LATE:
            del self._streams[self._ended.popleft()]
        return stream.moved


def _first(refs: list[Any]) -> Any:
    return ray.wait(refs, num_returns=1, fetch_local=False)


def relay(node_id: str) -> Any:
    """Start one, on that node if it can be: it is to end with those that use it."""
    actor: Any = ray.remote(_Relay)
    beside = NodeAffinitySchedulingStrategy(node_id, soft=True)
    options = {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": beside}
    return actor.options(**options).remote()


class _Bucket:
    """Pairs that go together."""

    def __init__(self, title: str) -> None:
        self.pairs: list[_Pair] = []
        self.size = 0
        self._title, self._tensors = title, list[Watched]()
        self._lent: Sequence[Any] = ()  # what others map

    def add(self, name: str, tensor: Any) -> None:
        mine = tensor.detach()  # a Parameter's own class would hide its memory
        self.pairs.append((name, mine))
        self._tensors.append(Watched([mine]))
        self.size += tensor.nbytes

    def give(self, at: int, offer: Offer) -> tuple[Any, int]:
        """Leave it for others: the relay's answer, and the bytes."""
        from protocol.wire import Tensors

        self.check()
        names, tensors = zip(*self.pairs, strict=True)
        message = Message.of((names, Tensors(tensors)), Packer, lends=offer.lends)
        self._lent = message.lent
        packed = message if message.size < SMALL else [ray.put(message)]
        given = offer.at.give.remote(offer.key, at, packed, message.size, offer.readers)
        return given, message.size

    def check(self) -> None:
        """Raise SharedMemoryWriteError where a tensor was written to since it was made."""
        if any(tensor.written for tensor in self._tensors):
            raise SharedMemoryWriteError(
                f"{self._title} has written into a tensor that it had yielded, before all had read "
                "it: yield one of its own, as x.clone(); or a method with reads_only=True wrote "
                "into it"
            )


def _buckets(pairs: Any, most: int, title: str) -> Generator[_Bucket]:
    """So many bytes at most in each, but for tensors that are larger."""
    bucket = _Bucket(title)
    with contextlib.closing(pairs):
        for pair in pairs:
            name, tensor = checked_pair(pair)
            if bucket.pairs and bucket.size + tensor.nbytes > most:
                yield bucket
                bucket = _Bucket(title)
            bucket.add(name, tensor)
        if bucket.pairs:
            yield bucket


def made(
    pairs: Any, title: str, offer: Offer, here: bool = False
) -> Generator[tuple[list[_Pair], Any], Any, None]:
    """Make all buckets, until nobody wants more. Each comes with the relay's answer: its value is
    to be sent back, or False where there is none. `here`: they are also read in this process.

    Raises:
        TypeError: what is yielded are no pairs. SharedMemoryWriteError: it was written to since.
        What making them raises.
    """
    began, moved, count, others = now_ns(), 0, 0, offer.at is not None
    before: _Bucket | None = None
    with contextlib.closing(_buckets(pairs, offer.bucket_bytes, title)) as buckets:
        for bucket in buckets:
            given, size = bucket.give(count, offer) if others else (None, 0)
            count, moved = count + 1, moved + size
            others = yield bucket.pairs, given
            if before is not None:
                before.check()
            before = bucket
            if not (others or here):
                break
        else:
            end = (offer.key, count, None, 0, offer.readers)
            yield [], offer.at.give.remote(*end) if others else None
            if before is not None:
                before.check()
    details = {"method": title, "bytes": moved}
    note(Event("user", "stream", began, now_ns(), details=details))


class Pairs(Iterator[_Pair]):
    """What a reader gets; it ends with the call that it was passed to. `others`: some read the same
    buckets, and wait for these to be made. `leave` is called when nothing more is read.
    """

    def __init__(
        self,
        buckets: Generator[tuple[list[_Pair], bool]],
        others: bool = False,
        copies: bool = False,
        leave: Callable[[], object] = lambda: None,
    ) -> None:
        self._buckets, self._others, self._copies, self._leave = buckets, others, copies, leave
        self._pairs: list[_Pair] = []  # the next one is the last
        self._begun = self._ended = False

    def __iter__(self) -> Iterator[_Pair]:
        """Who leaves the loop is not waited for, and does not come back."""
        if self._begun:
            raise RuntimeError("what is sent in buckets is read once: this was, or was begun")
        self._begun = True
        return self._loop()

    def _loop(self) -> Generator[_Pair]:
        try:
            yield from iter(partial(next, self, None), None)
        finally:
            self._ended = True
            self._leave()

    def __next__(self) -> _Pair:
        if self._ended:
            raise RuntimeError(
                "what is sent in buckets is read in one loop of the call that it was passed to, "
                "and that has ended"
            )
        while not self._pairs:
            self._pairs, self._others = next(self._buckets)
        name, tensor = self._pairs.pop()
        return name, tensor.clone() if self._copies else tensor

    def finish(self) -> None:
        """Let others have what is not read here."""
        self._ended, self._pairs = True, []
        while self._others:
            _, self._others = next(self._buckets, ([], False))

    def close(self) -> None:
        """Make no more of them."""
        self._ended, self._pairs = True, []
        with contextlib.suppress(ValueError):  # a thread of the reader's is at it, and is told
            self._buckets.close()


@contextlib.contextmanager
def reading_pairs() -> Generator[list[Pairs]]:
    """Within this context a call reads those in the list, and later nobody can."""
    found: list[Pairs] = []
    try:
        yield found
        for pairs in found:
            pairs.finish()
    finally:
        for pairs in found:
            pairs.close()


def made_here(pairs: Any, title: str, offer: Offer, how: Any) -> Pairs:
    """The pairs, in the process that makes them, for others, too."""

    def buckets() -> Generator[tuple[list[_Pair], bool]]:
        reply: Any = None
        steps = made(pairs, title, offer, here=True)
        with contextlib.closing(steps), contextlib.suppress(StopIteration):
            while True:
                found, given = steps.send(reply)
                yield found[::-1], given is not None
                reply = given is not None and _told(given)

    return Pairs(buckets(), offer.at is not None, copies=how != "view")


def borrowed(offer: Offer, reader: ProcessInfo, how: Any, title: str) -> Pairs:
    """The pairs, in another process.

    Raises:
        WorkerError: the maker failed, or another reader. GroupBrokenError: its group has ended.
        RuntimeError: the reader keeps views of memory that the maker is about to free.
    """
    views = offer.lends and how == "view"

    def buckets() -> Generator[tuple[list[_Pair], bool]]:
        from protocol.device_memory import settle

        take, count = offer.at.take.remote, 0
        shown: list[weakref.ref[Any]] = []
        while (packed := _told(take(offer.key, count, reader))) is not None:
            found = _opened(packed, how)
            shown = [*shown[-2:], *(weakref.ref(tensor) for _, tensor in reversed(found))]
            yield found, False
            # A loop holds the last one until it has the next, and `zip` the one before.
            if views and any(one() is not None for one in shown[:-2]):
                raise RuntimeError(
                    f"a tensor that {title} yields is gone when the next one is asked for, since "
                    "the method that reads it has reads_only=True, and something still holds one: "
                    "copy each in the loop, or register the method without reads_only"
                )
            del packed, found
            settle()
            count += 1

    def leave() -> None:
        from protocol.device_memory import settle

        settle()
        offer.at.leave.remote(offer.key, reader)

    return Pairs(buckets(), leave=leave)


def _told(answer: Any) -> Any:
    """What a relay answers."""
    try:
        return get_ours(answer, None)
    except RayActorError as error:
        raise GroupBrokenError(
            "the group that yields it was closed or restarted, or the actor that passes on its "
            f"buckets died: {error}"
        ) from None


def _opened(packed: Any, how: Any) -> list[_Pair]:
    from protocol.wire import read_as

    message: Any = packed if isinstance(packed, Message) else ray.get(packed[0])
    with read_as(how):
        names, tensors = message.read()
    return [*zip(names, tensors, strict=True)][::-1]
