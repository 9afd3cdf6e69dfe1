"""Results in pieces: a generator's (name, tensor) pairs, which go in buckets from the process that
makes them to all that read them.

The maker and its readers run at the same time, each in a call of its own process, and meet at a
relay: an actor that passes on references, and no bytes of tensors. Two buckets are alive at a time:
one is begun when all readers are done with the one before the last. Whoever fails ends all others
with its cause; the relay sees the end of each by the reference to its call.

All readers must read what they are passed, and several streams in the same order: a maker waits for
the slowest of its readers.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray

from single_controller.base.message import Message
from single_controller.errors import SharedMemoryWriteError
from single_controller.ray.failure import CallSite, raised, translate
from single_controller.ray.message import SMALL, Packer
from single_controller.ray.shelf import in_thread, version

__all__ = ["Offer", "borrowed", "made", "made_here", "relay"]

_Pair: TypeAlias = "tuple[str, Any]"
_Key: TypeAlias = "tuple[str, int]"
_Watched: TypeAlias = "tuple[CallSite, list[Any]]"  # a call, and its reference, which stays one


@dataclass(frozen=True)
class Offer:
    """By what the maker of a stream and its readers, of these ranks, find each other. `at` is the
    relay, None where nobody reads it but the maker's own process.
    """

    key: _Key
    at: Any
    readers: tuple[int, ...]
    bucket_bytes: int
    lends: bool


class _Stream:
    def __init__(self) -> None:
        self.buckets: dict[int, Any] = {}
        self.done: dict[int, int] = defaultdict(int)  # by reader: with how many buckets
        self.gone: set[int] = set()  # readers that have finished
        self.over = False
        self.error: Exception | None = None
        self.changed = asyncio.Condition()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with self.changed:
            self.changed.notify_all()
            await self.changed.wait_for(holds)

    async def note(self) -> None:
        await self.until(lambda: True)


class _Relay:
    """Where makers leave buckets for their readers."""

    def __init__(self) -> None:
        self._streams: dict[_Key, _Stream] = defaultdict(_Stream)

    async def give(self, key: _Key, at: int, bucket: Any, readers: Sequence[int]) -> bool:
        """Leave bucket number `at`, and wait for room for the next; whether anyone wants that."""
        stream = self._streams[key]
        stream.buckets[at] = bucket

        def reading() -> list[int]:
            return [] if stream.over else [r for r in readers if r not in stream.gone]

        def room() -> bool:
            done = min((stream.done[reader] for reader in reading()), default=at)
            for old in [number for number in stream.buckets if number < done]:
                del stream.buckets[old]
            return done >= at

        await stream.until(room)
        return bool(reading())

    async def take(self, key: _Key, at: int) -> Any:
        """Bucket number `at`, once it is there; None behind the last. Raises what ended it."""
        stream = self._streams[key]
        await stream.until(lambda: at in stream.buckets or stream.over)
        if stream.error is not None:
            raise stream.error
        return stream.buckets.get(at)

    async def done(self, key: _Key, reader: int, count: int) -> None:
        """A reader is done with so many buckets."""
        self._streams[key].done[reader] = count
        await self._streams[key].note()

    async def end(self, key: _Key, count: int, readers: Sequence[int]) -> None:
        """There were so many buckets; wait until readers are done with all of them."""
        stream = self._streams[key]
        stream.over = True
        await stream.until(
            lambda: (
                stream.error is not None
                or all(r in stream.gone or stream.done[r] >= count for r in readers)
            )
        )

    async def watch(
        self, offer: Offer, maker: _Watched | None, readers: Sequence[_Watched]
    ) -> None:
        """Until these calls have ended, tell the others of each end."""
        stream = self._streams[offer.key]
        reading = {ref: site.rank for site, [ref] in readers}
        stream.gone |= {*offer.readers} - {*reading.values()}
        left = {ref: site for site, [ref] in (*readers, *([maker] if maker else ()))}
        while left:
            ready, _ = await in_thread(_first, [*left])
            for ref in ready:
                site, error = left.pop(ref), await in_thread(raised, ref)
                if ref in reading:
                    stream.gone.add(reading[ref])
                elif not (error or stream.over or stream.gone >= {*offer.readers}):
                    error = RuntimeError("it has ended, and not sent its last bucket")
                if error is not None and stream.error is None:
                    stream.error, stream.over = translate(error, site), True
                await stream.note()
        del self._streams[offer.key]


def _first(refs: list[Any]) -> Any:
    return ray.wait(refs, num_returns=1, fetch_local=False)


def relay() -> Any:
    """Start one."""
    actor: Any = ray.remote(_Relay)
    return actor.options(num_cpus=0, max_concurrency=10_000).remote()


class _Bucket:
    """Pairs that go together."""

    def __init__(self, title: str) -> None:
        self.pairs: list[_Pair] = []
        self.size = 0
        self._title, self._versions = title, list[int]()

    def add(self, name: str, tensor: Any) -> None:
        self.pairs.append((name, tensor.detach()))
        self._versions.append(version(tensor))
        self.size += tensor.nbytes

    def message(self, lends: bool) -> Message:
        """What others get of it."""
        self.check()
        return Message.of(self.pairs, Packer, lends=lends)

    def check(self) -> None:
        """Raise SharedMemoryWriteError where a tensor was written to since it was made."""
        if [version(tensor) for _, tensor in self.pairs] != self._versions:
            raise SharedMemoryWriteError(
                f"{self._title} has written into a tensor that it had yielded, before all had read "
                "it: yield one of its own, as x.clone()"
            )


def _buckets(pairs: Any, most: int, title: str) -> Iterator[_Bucket]:
    """So many bytes at most in each, but for tensors that are larger."""
    import torch

    bucket = _Bucket(title)
    try:
        for pair in pairs:
            named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
            if not (named and isinstance(pair[1], torch.Tensor)):
                raise TypeError(
                    f"{title} must yield pairs of a name and a tensor, to be sent in buckets; got "
                    f"{pair if isinstance(pair, str | int | float) else type(pair).__name__}"
                )
            if bucket.pairs and bucket.size + pair[1].nbytes > most:
                yield bucket
                bucket = _Bucket(title)
            bucket.add(*pair)
        if bucket.pairs:
            yield bucket
    finally:
        pairs.close()


def _given(bucket: _Bucket, at: int, offer: Offer) -> tuple[Any, Message]:
    message = bucket.message(offer.lends)
    packed = message if message.size < SMALL else [ray.put(message)]
    return offer.at.give.remote(offer.key, at, packed, offer.readers), message


def made(pairs: Any, title: str, offer: Offer) -> Generator[Any, Any, int]:
    """Send all pairs, in steps: each is a reference, whose value is to be sent back. Returns the
    bytes that were moved.

    Raises:
        TypeError: what is yielded are no pairs. SharedMemoryWriteError: it was written to since.
        What making them raises.
    """
    moved, count, wanted = 0, 0, True
    alive: list[tuple[_Bucket, Message]] = []  # also what others map
    buckets = _buckets(pairs, offer.bucket_bytes, title)
    while wanted and (bucket := next(buckets, None)) is not None:
        given, message = _given(bucket, count, offer)
        count, moved = count + 1, moved + message.size
        alive.append((bucket, message))
        del bucket, message
        wanted = yield given
        for old, _ in alive[:-1]:
            old.check()
        del alive[:-1]
    if wanted:
        yield offer.at.end.remote(offer.key, count, offer.readers)
        for old, _ in alive:
            old.check()
    return moved


def made_here(pairs: Any, title: str, offer: Offer, how: str) -> Iterator[_Pair]:
    """The pairs, in the process that makes them; others get them, too, and also those that the
    reader here does not want any more.
    """
    count, others, here = 0, offer.at is not None, True
    for bucket in _buckets(pairs, offer.bucket_bytes, title):
        given: Any = None
        if others:
            given, _lent = _given(bucket, count, offer)
        count += 1
        try:
            for name, tensor in bucket.pairs if here else ():
                yield name, tensor if how == "view" else tensor.clone()
        except GeneratorExit:
            here = False
        others = others and bool(ray.get(given))
        bucket.check()
        if not (others or here):
            return
    if others:
        ray.get(offer.at.end.remote(offer.key, count, offer.readers))


def borrowed(offer: Offer, reader: int, how: Any) -> Iterator[_Pair]:
    """The pairs, in another process.

    Raises:
        WorkerError: the maker failed, or another reader.
    """
    from protocol.device_memory import settle
    from protocol.wire import read_as

    count, coming = 0, offer.at.take.remote(offer.key, 0)
    while (packed := ray.get(coming)) is not None:
        coming = offer.at.take.remote(offer.key, count + 1)
        message = packed if isinstance(packed, Message) else ray.get(packed[0])
        with read_as(how):
            pairs = message.read()[::-1]
        del packed, message
        while pairs:
            yield pairs.pop()
        settle()
        count += 1
        offer.at.done.remote(offer.key, reader, count)
