"""Batches that are still in the workers: who fetches which rows from whom, and when."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from protocol import DataProto, DataProtoFuture
from protocol.batches import Batch, balanced_sizes, batch_rows, slice_batch
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)
from protocol.future import How, Source, origins


@dataclass
class Producer:
    """A source that remembers what it was asked for."""

    batch: Batch
    waits: int = 0
    fetched: list[tuple[int, int]] = field(default_factory=list)

    def _wait(self, timeout: float | None) -> None:
        pass

    def rows(self, timeout: float | None) -> int:
        self._wait(timeout)
        self.waits += 1
        return batch_rows(self.batch)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        self._wait(timeout)
        self.fetched.append((start, stop))
        return slice_batch(self.batch, start, stop)


def produce(*sizes: int, kind: type[Any] = DataProto) -> list[Producer]:
    """One producer per size; row i of them all holds i."""
    bounds = np.cumsum([0, *sizes]).tolist()
    numbers = [torch.arange(a, b) for a, b in pairwise(bounds)]
    if kind is TensorDict:
        return [Producer(TensorDict({"ids": t, "twice": 2 * t}, [len(t)])) for t in numbers]
    return [Producer(DataProto.from_dict({"ids": t, "twice": 2 * t})) for t in numbers]


def future(*sizes: int) -> DataProtoFuture:
    return DataProtoFuture(produce(*sizes))


def tensors(batch: Batch) -> TensorDict:
    found = batch.batch if isinstance(batch, DataProto) else batch
    assert isinstance(found, TensorDict)
    return found


def ids(batch: Batch) -> list[int]:
    return list(tensors(batch)["ids"].tolist())


def sources(lazy: Source) -> set[int]:
    return {id(source) for source in origins([lazy])}


def copied(lazy: DataProtoFuture) -> DataProtoFuture:
    twin = pickle.loads(pickle.dumps(lazy))
    assert isinstance(twin, DataProtoFuture)
    return twin


sizes_of_producers = st.lists(st.integers(0, 5), min_size=1, max_size=5)
parts_of_consumers = st.integers(1, 6)


class TestFetching:
    @pytest.mark.parametrize("kind", [DataProto, TensorDict])
    def test_get_brings_all_rows_in_order(self, kind: type[Any]) -> None:
        batch = DataProtoFuture(produce(2, 0, 3, kind=kind)).get()
        assert isinstance(batch, kind)
        assert ids(batch) == [0, 1, 2, 3, 4]
        assert isinstance(future(1), Source)
        assert ids(DataProtoFuture([future(1, 2), *produce(1)]).get()) == [0, 1, 2, 0]

    def test_rows_are_asked_for_once_and_fetch_nothing(self) -> None:
        producers = produce(2, 3)
        lazy = DataProtoFuture(producers)
        assert repr(lazy) == "DataProtoFuture(rows=?, sources=2)"
        assert [producer.waits for producer in producers] == [0, 0]
        assert len(lazy) == lazy.rows(timeout=1) == 5
        assert repr(lazy) == repr(copied(lazy)) == "DataProtoFuture(rows=5, sources=2)"
        assert not any(producer.fetched for producer in producers)
        lazy.chunk(5)[0].get()
        assert [producer.waits for producer in producers] == [1, 1]

    def test_what_one_source_has_is_not_copied(self) -> None:
        producers = produce(2, 3)
        fetched = DataProtoFuture(producers).fetch(2, 5)
        tensors(fetched)["ids"][0] = 7
        assert tensors(producers[1].batch)["ids"][0] == 7

    @given(sizes=sizes_of_producers, data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_only_sources_that_have_the_rows_are_asked(
        self, sizes: list[int], data: st.DataObject
    ) -> None:
        start = data.draw(st.integers(0, sum(sizes)))
        stop = data.draw(st.integers(start, sum(sizes)))
        producers = produce(*sizes)
        assert ids(DataProtoFuture(producers).fetch(start, stop)) == list(range(start, stop))
        if start < stop:
            for producer in producers:
                mine = set(ids(producer.batch)) & set(range(start, stop))
                assert sum(b - a for a, b in producer.fetched) == len(mine)
                assert bool(producer.fetched) == bool(mine or stop - start == sum(sizes))

    @pytest.mark.parametrize("sizes", [(0,), (0, 2), (0, 2, 2)])
    def test_zero_rows_come_with_their_columns_from_one_source_that_has_rows(
        self, sizes: tuple[int, ...]
    ) -> None:
        producers = produce(*sizes)
        batch = DataProtoFuture(producers).fetch(sum(sizes) // 2, sum(sizes) // 2)
        assert batch_rows(batch) == 0
        assert set(tensors(batch).keys()) == {"ids", "twice"}
        asked = [size for size, producer in zip(sizes, producers, strict=True) if producer.fetched]
        assert asked == [max(sizes)]

    @pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 4), (2, 1)])
    def test_rows_that_are_not_there_are_refused(self, start: int, stop: int) -> None:
        with pytest.raises(RowCountError, match=f"rows {start}:{stop} .* 3 rows"):
            future(1, 2).fetch(start, stop)

    def test_there_must_be_a_source(self) -> None:
        for make in (DataProtoFuture, DataProtoFuture.concat):
            with pytest.raises(BatchError, match="at least one source"):
                make([])


class TestDeadline:
    def test_one_timeout_covers_all_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0

        class Slow(Producer):
            def _wait(self, timeout: float | None) -> None:
                nonlocal now
                assert timeout is not None
                if timeout < 5:
                    raise TimeoutError
                now += 5

        monkeypatch.setattr("protocol.future.time", SimpleNamespace(monotonic=lambda: now))
        producers = [Slow(producer.batch) for producer in produce(1, 1, 1)]
        with pytest.raises(TimeoutError):
            DataProtoFuture(producers).get(timeout=12)
        assert [producer.waits for producer in producers] == [1, 1, 0]

    def test_a_deadline_reaches_the_sources_through_every_view(self) -> None:
        seen: list[float | None] = []

        class Recorder(Producer):
            def _wait(self, timeout: float | None) -> None:
                seen.append(timeout)

        lazy = DataProtoFuture([Recorder(producer.batch) for producer in produce(3)])
        view = lazy.union(lazy.select(["ids"])).shards(3, "padded")[2]
        view.get(timeout=9.0)
        assert seen
        assert all(timeout is not None and 0 < timeout <= 9.0 for timeout in seen)
        seen.clear()
        view.get()
        assert set(seen) == {None}


class TestShards:
    @given(sizes=sizes_of_producers, parts=parts_of_consumers)
    @settings(deadline=None, max_examples=40)
    def test_balanced_shards_are_the_whole_batch_and_touch_only_their_producers(
        self, sizes: list[int], parts: int
    ) -> None:
        producers = produce(*sizes)
        whole = list(range(sum(sizes)))
        bounds = np.cumsum([0, *balanced_sizes(sum(sizes), parts)]).tolist()
        shards = DataProtoFuture(producers).shards(parts, "balanced")
        found = []
        for shard, (start, stop) in zip(shards, pairwise(bounds), strict=True):
            for producer in producers:
                producer.fetched.clear()
            found.append(ids(copied(shard).get()))
            assert ids(shard.get()) == found[-1] == whole[start:stop]
            touched = [bool(producer.fetched) for producer in producers]
            overlapping = [bool({*ids(p.batch)} & {*whole[start:stop]}) for p in producers]
            assert touched == overlapping or stop - start in (0, sum(sizes))
        assert sum(found, []) == whole  # noqa: RUF017

    @given(sizes=sizes_of_producers, parts=parts_of_consumers)
    @settings(deadline=None, max_examples=40)
    def test_padded_shards_are_equal_and_cutting_the_padding_gives_the_whole_batch(
        self, sizes: list[int], parts: int
    ) -> None:
        lazy = future(*sizes)
        rows = sum(sizes)
        shards = lazy.shards(parts, "padded")
        assert [len(copied(shard)) for shard in shards] == [-(-rows // parts)] * parts
        padded = [i for shard in shards for i in ids(shard.get())]
        assert padded == [*range(rows), *[rows - 1] * (len(padded) - rows)]
        joined = DataProtoFuture.concat(shards)
        for start, stop in [(0, 1), (len(padded) - 1, len(padded)), (len(padded), len(padded))]:
            if 0 <= start <= stop <= len(padded):
                assert ids(joined.fetch(start, stop)) == padded[start:stop]

    @given(size=st.integers(0, 4), parts=parts_of_consumers, again=st.integers(1, 3))
    @settings(deadline=None, max_examples=30)
    def test_chunks_can_be_chunked_again(self, size: int, parts: int, again: int) -> None:
        whole = list(range(size * parts * again))
        lazy = future(*balanced_sizes(len(whole), 3))
        pieces = [piece for chunk in lazy.chunk(parts) for piece in chunk.chunk(again)]
        assert [len(piece) for piece in pieces] == [size] * len(pieces)
        assert ids(copied(DataProtoFuture.concat(pieces)).get()) == whole

    def test_rows_that_do_not_divide_are_refused_once_they_are_known(self) -> None:
        producers = produce(2, 3)
        chunks = DataProtoFuture(producers).chunk(2)
        assert [producer.waits for producer in producers] == [0, 0]
        for use in (len, DataProtoFuture.get, lambda chunk: chunk.fetch(0, 1)):
            with pytest.raises(ChunkError, match=r"only support equal chunk.* 5 and chunk 2\."):
                use(chunks[1])
        assert not any(producer.fetched for producer in producers)

    def test_no_part_is_refused_at_once(self) -> None:
        with pytest.raises(ChunkError, match="got 0"):
            future(2).chunk(0)

    @given(sizes=sizes_of_producers, parts=parts_of_consumers, data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_a_slice_is_that_of_the_batch_and_touches_only_the_producers_of_its_rows(
        self, sizes: list[int], parts: int, data: st.DataObject
    ) -> None:
        start = data.draw(st.integers(0, sum(sizes)))
        stop = data.draw(st.integers(start, sum(sizes)))
        producers = produce(*sizes)
        lazy = DataProtoFuture(producers)
        expected = list(range(sum(sizes)))[start:stop]
        sliced = lazy.slice(start, stop)
        assert [producer.waits for producer in producers] == [0] * len(sizes)
        for one in (sliced, sliced.union(lazy.select("twice").slice(start, stop))):
            shards = one.shards(parts, "balanced")
            assert [i for shard in shards for i in ids(copied(shard).get())] == expected
            assert ids(one.get()) == expected
        assert len(sliced) == stop - start
        inner = sliced.slice(len(expected) // 2, len(expected))
        assert ids(copied(inner).get()) == expected[len(expected) // 2 :]
        read = {id(p) for p in producers if {*ids(p.batch)} & {*expected}}
        assert sources(sliced.resolved()) == read or len(expected) in (0, sum(sizes))

    @pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 4), (2, 1)])
    def test_a_slice_of_rows_that_are_not_there_is_refused_once_rows_are_known(
        self, start: int, stop: int
    ) -> None:
        producers = produce(1, 2)
        sliced = DataProtoFuture(producers).slice(start, stop)
        assert [producer.waits for producer in producers] == [0, 0]
        for use in (len, DataProtoFuture.get, lambda lazy: len(copied(lazy).resolved())):
            with pytest.raises(RowCountError, match=f"rows {start}:{stop} .* 3 rows"):
                use(sliced)
        assert not any(producer.fetched for producer in producers)

    @pytest.mark.parametrize("how", ["equal", "balanced", "padded"])
    def test_zero_rows_make_shards_of_zero_rows(self, how: How) -> None:
        for shard in future(0, 0).shards(3, how):
            assert ids(shard.get()) == []


class TestViews:
    def test_views_wait_for_nothing_until_used(self) -> None:
        producers = produce(2, 2)
        lazy = DataProtoFuture(producers)
        view = DataProtoFuture.concat(lazy.select(["ids"]).union(lazy).chunk(4))
        assert [producer.waits for producer in producers] == [0, 0]
        assert ids(view.get()) == [0, 1, 2, 3]

    @pytest.mark.parametrize("keys", ["ids", ["ids"], iter(["ids"])])
    def test_selected_columns_are_all_that_is_kept_and_copied(self, keys: Any) -> None:
        (producer,) = produce(4)
        batch = DataProtoFuture([producer]).select(keys).get()
        assert set(tensors(batch).keys()) == {"ids"}
        assert ids(batch) == [0, 1, 2, 3]
        tensors(batch)["ids"].zero_()
        assert ids(producer.batch) == [0, 1, 2, 3]

    def test_what_does_not_fit_is_told_when_rows_are_asked_for(self) -> None:
        lazy = future(2).select(["ids", "nope"])
        assert len(lazy) == 2
        with pytest.raises(MissingKeyError, match="nope"):
            lazy.get()
        joined = future(2).union(future(3))
        with pytest.raises(RowCountError, match="equally many rows; got 2 and 3"):
            len(joined)
        other = DataProtoFuture([Producer(DataProto.from_dict({"ids": torch.ones(2).long()}))])
        joined = future(2).union(other)
        with pytest.raises(ConflictError, match="ids"):
            joined.get()
        with pytest.raises(BatchTypeError, match=r"got DataProto: make it one by pin\(other\)"):
            future(2).union(DataProto())  # type: ignore[arg-type]

    def test_a_union_joins_columns_of_differently_spread_producers(self) -> None:
        joined = copied(future(1, 3).select(["ids"]).union(future(2, 2).select(["twice"])))
        batch = joined.fetch(1, 3)
        assert tensors(batch)["ids"].tolist() == [1, 2]
        assert tensors(batch)["twice"].tolist() == [2, 4]

    def test_all_rows_bring_the_meta_info_of_sources_without_rows(self) -> None:
        metrics = [DataProto(meta_info={"metrics": {"loss": i}}) for i in range(3)]
        lazy = DataProtoFuture([Producer(batch) for batch in metrics])
        assert lazy.get().meta_info == {"metrics": {"loss": [0, 1, 2]}}

    def test_a_source_that_can_select_is_asked_for_these_columns_only(self) -> None:
        class Selecting(Producer):
            def select(self, keys: tuple[str, ...], strict: bool) -> Source:
                asked.append((*keys, strict))
                return self

        asked: list[tuple[str | bool, ...]] = []
        lazy = DataProtoFuture([Selecting(producer.batch) for producer in produce(2, 2)])
        assert ids(lazy.shards(2, "balanced")[1].select("ids").get()) == [2, 3]
        assert asked == [("ids", True)] * 2
        asked.clear()
        assert ids(lazy.union(lazy).select(["ids"]).get()) == [0, 1, 2, 3]
        assert asked == [("ids", False)] * 4  # who knows which of the two has it
        asked.clear()
        assert ids(lazy.select(["ids", "twice"]).select("ids").get()) == [0, 1, 2, 3]
        assert asked == [("ids", "twice", True)] * 2 + [("ids", True)] * 2
        with pytest.raises(MissingKeyError, match="keys \\['ids'\\]"):
            lazy.select("ids").select("twice").get()


class TestOrigins:
    def test_rows_are_asked_of_the_sources_that_have_them(self) -> None:
        a, b, c = produce(2, 3, 1)
        whole = DataProtoFuture([a, b, c])
        second, other = whole.chunk(3)[1], DataProtoFuture([c])
        for lazy in (second, second.select("ids"), second.union(second.select("twice"))):
            assert sources(lazy) == {id(a), id(b), id(c)}
            assert sources(lazy.resolved()) == sources(lazy.narrowed(0, 2)) == {id(b)}
            assert ids(lazy.resolved().get()) == ids(lazy.get()) == [2, 3]
        both = DataProtoFuture.concat([whole, other])
        assert sources(both.narrowed(6, 7)) == {id(c)}
        padded = whole.shards(4, "padded")[3]
        for source in (a, b, c):
            source.fetched.clear()
        assert sources(padded.resolved()) == {id(c)}
        assert not any(source.fetched for source in (a, b, c))
        assert ids(padded.resolved().get()) == ids(padded.get()) == [5, 5]

    def test_what_cannot_be_resolved_says_why_when_it_is_read(self) -> None:
        resolved = copied(future(2, 3).chunk(2)[0].resolved())
        for read in (len, DataProtoFuture.get):
            with pytest.raises(ChunkError, match="only support equal chunk"):
                read(resolved)

    def test_settling_a_shard_costs_the_same_however_many_there_are(self) -> None:
        asked: list[int] = []

        class Counted(Producer):
            def rows(self, timeout: float | None) -> int:
                asked.append(1)
                return 2

        for parts in (4, 64):
            asked.clear()
            made = [Counted(producer.batch) for producer in produce(*[2] * parts)]
            whole = DataProtoFuture(made)
            both = whole.union(whole.select("ids"))
            for lazy in (whole, whole.select("ids"), both, both.slice(0, 2 * parts)):
                for shard in lazy.shards(parts, "balanced"):
                    assert len(list(origins([shard.resolved()]))) <= 2
            assert len(asked) <= 10 * parts
