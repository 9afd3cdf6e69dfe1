"""Every operation on rows against a naive model: a batch is a list of rows, a row a dict."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, NonTensorStack, TensorDict

from protocol import BatchData, pad_dataproto_to_divisor, unpad_dataproto
from protocol import tensordict_utils as tu
from protocol.batches import pad_batch, split_batch
from protocol.data_proto import DataProto
from tests.protocol.conftest import batches

Row = dict[str, str]
Rows = list[Row]
Batch = DataProto | TensorDict


def plain(value: Any) -> str:
    """A value in a form that tells any two apart, read without the code under test."""
    if isinstance(value, torch.Tensor):
        wide = value.detach().to(torch.complex128).resolve_conj()
        return f"{value.dtype} {tuple(value.shape)} {wide.flatten().tolist()}"
    return f"{type(value).__name__} {value!r}"


def rows_of(batch: Batch) -> Rows:
    if isinstance(batch, DataProto):
        columns: dict[str, Any] = dict(batch.batch.items()) if batch.batch is not None else {}
        columns |= batch.non_tensor_batch
    else:
        columns = dict(batch.items())
    rows: Rows = [{} for _ in range(len(batch))]
    for key, column in columns.items():
        if isinstance(column, NonTensorData):
            values = [column.data] * len(rows)
        elif isinstance(column, NonTensorStack):
            values = column.tolist()
        elif isinstance(column, torch.Tensor) and column.is_nested:
            values = list(column.unbind()) if len(rows) else []
        else:
            values = list(column)
        assert len(values) == len(rows), key
        for row, value in zip(rows, values, strict=True):
            row[str(key)] = plain(value)
    return rows


def same_rows(batch: Batch, rows: Rows) -> None:
    assert len(batch) == len(rows)
    assert rows_of(batch) == rows


def sizes(draw: st.DrawFn, rows: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=3)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]


def cut(rows: Rows, lengths: list[int]) -> list[Rows]:
    left = list(rows)
    return [[left.pop(0) for _ in range(length)] for length in lengths]


def positions(draw: st.DrawFn, rows: int) -> list[int]:
    return draw(st.lists(st.integers(-rows, rows - 1), max_size=6)) if rows else []


def index_forms(index: list[int]) -> list[Any]:
    return [index, torch.tensor(index).long(), np.array(index, dtype=np.int32)]


@given(data=batches(), draw=st.data())
def test_indices_and_slices_pick_their_rows(data: DataProto, draw: st.DataObject) -> None:
    rows = rows_of(data)
    index = draw.draw(st.composite(positions)(len(rows)))
    for form in index_forms(index):
        same_rows(data[form], [rows[i] for i in index])
        same_rows(data.select_idxs(form), [rows[i] for i in index])
    mask = draw.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    for masked in (np.array(mask, dtype=bool), torch.tensor(mask, dtype=torch.bool)):
        same_rows(data[masked], [row for row, keep in zip(rows, mask, strict=True) if keep])
    bounds = st.none() | st.integers(-9, 9)
    start, stop = draw.draw(bounds), draw.draw(bounds)
    step = draw.draw(st.none() | st.integers(1, 3) | st.integers(-3, -1))
    same_rows(data.slice(start, stop, step), rows[start:stop:step])
    items = [*data, *(data[at] for at in range(-len(rows), len(rows)))]
    for item, row in zip(items, rows * 3, strict=True):
        tensors = {} if item.batch is None else dict(item.batch.items())
        assert {k: plain(v) for k, v in {**tensors, **item.non_tensor_batch}.items()} == row


@given(data=batches(), draw=st.data())
def test_cutting_and_joining_keeps_the_rows_in_order(data: DataProto, draw: st.DataObject) -> None:
    rows = rows_of(data)
    lengths = draw.draw(st.composite(sizes)(len(rows)))
    parts = split_batch(data, lengths)
    for part, expected in zip(parts, cut(rows, lengths), strict=True):
        same_rows(part, expected)
    shuffled = draw.draw(st.permutations(parts))
    same_rows(DataProto.concat(shuffled), [row for part in shuffled for row in rows_of(part)])
    same_rows(BatchData([*shuffled, data]).concat(), rows_of(DataProto.concat([*shuffled, data])))
    size = draw.draw(st.integers(1, 4))
    assert [rows_of(part) for part in data.split(size)] == [
        rows[i : i + size] for i in range(0, len(rows), size)
    ]
    for chunks in [n for n in range(1, 8) if len(rows) % n == 0]:
        each = len(rows) // chunks
        expected_chunks = [rows[i * each : (i + 1) * each] for i in range(chunks)]
        assert [rows_of(part) for part in data.chunk(chunks)] == expected_chunks
    data.meta_info["_verl_auto_padding"] = True
    for chunks in range(1, 8):
        lengths = [len(part) for part in data.chunk(chunks)]
        assert len(lengths) == chunks
        assert max(lengths) - min(lengths) <= 1
        assert [row for part in data.chunk(chunks) for row in rows_of(part)] == rows


@given(data=batches(), draw=st.data())
def test_repeating_and_padding_repeats_rows(data: DataProto, draw: st.DataObject) -> None:
    rows = rows_of(data)
    times = draw.draw(st.integers(0, 3))
    same_rows(data.repeat(times), [row for row in rows for _ in range(times)])
    same_rows(data.repeat(times, interleave=False), rows * times)
    counts = draw.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    each = [row for row, n in zip(rows, counts, strict=True) for _ in range(n)]
    for form in (counts, tuple(counts), np.array(counts, int), torch.tensor(counts).long()):
        same_rows(data.sample_level_repeat(form), each)
    divisor = draw.draw(st.integers(1, 9))
    padded, added = pad_dataproto_to_divisor(data, divisor)
    assert (len(padded) % divisor, 0 <= added < divisor) == (0, True)
    same_rows(padded, (rows * (divisor + 1))[: len(rows) + added])
    same_rows(unpad_dataproto(padded, added), rows)
    if rows:
        same_rows(pad_batch(data, 2), [*rows, rows[-1], rows[-1]])
        data.padding(2, "first")
        same_rows(data, [*rows, rows[0], rows[0]])
        data.padding(1)
        same_rows(data, [*rows, *[rows[0]] * 3])


@given(data=batches(), draw=st.data())
def test_reordering_grouping_and_iterating_lose_no_row(
    data: DataProto, draw: st.DataObject
) -> None:
    rows = rows_of(data)
    order = draw.draw(st.permutations(range(len(rows))))
    mixed = data.select()
    mixed.reorder(torch.tensor(order).long())
    same_rows(mixed, [rows[i] for i in order])
    if not rows:
        return
    load = draw.draw(st.lists(st.integers(0, 50), min_size=len(rows), max_size=len(rows)))
    shards, inverse = data.balanced_chunk(3, load)
    same_rows(DataProto.concat(shards).select_idxs(inverse), rows)
    labels = draw.draw(st.lists(st.sampled_from("abc"), min_size=len(rows), max_size=len(rows)))
    labelled = data.union(DataProto.from_dict(None, {"label": labels}))
    groups = labelled.group_by("label")
    assert list(groups) == list(dict.fromkeys(labels))
    for label, group in groups.items():
        members = [row for row, at in zip(rows, labels, strict=True) if at == label]
        same_rows(group.select(non_tensor_batch_keys=[*data.non_tensor_batch]), members)
    size = draw.draw(st.sampled_from([n for n in range(1, 8) if len(rows) % n == 0]))
    batched = [rows_of(mini) for mini in data.make_iterator(size, epochs=2)]
    assert batched == [rows[i : i + size] for i in range(0, len(rows), size)] * 2
    options = {"shuffle": True, "drop_last": True}
    once = [*data.make_iterator(size, 1, seed=3, dataloader_kwargs=options)]
    again = [*data.make_iterator(size, 1, seed=3, dataloader_kwargs=options)]
    assert [rows_of(mini) for mini in once] == [rows_of(mini) for mini in again]
    assert sorted(map(str, (row for mini in once for row in rows_of(mini)))) == sorted(
        map(str, rows)
    )


@given(data=batches(), draw=st.data())
def test_rows_arrive_as_they_were_sent(data: DataProto, draw: st.DataObject) -> None:
    lengths = draw.draw(st.composite(sizes)(len(data)))
    for part in (data, *split_batch(data, lengths)):
        same_rows(pickle.loads(pickle.dumps(part)), rows_of(part))


@given(data=batches().map(DataProto.to_tensordict), draw=st.data())
def test_the_same_holds_for_a_bare_tensordict(data: TensorDict, draw: st.DataObject) -> None:
    rows = rows_of(data)
    index = draw.draw(st.composite(positions)(len(rows)))
    for form in index_forms(index):
        same_rows(tu.index_select_tensor_dict(data, form), [rows[i] for i in index])
    for chunks in [n for n in range(1, 8) if len(rows) % n == 0]:
        parts = tu.chunk_tensordict(data, chunks)
        assert len(parts) == chunks
        assert [row for part in parts for row in rows_of(part)] == rows
        same_rows(tu.concat_tensordict(parts), rows)
    divisor = draw.draw(st.integers(1, 9))
    padded, added = tu.pad_to_divisor(data, divisor)
    same_rows(padded, (rows * (divisor + 1))[: len(rows) + added])
    same_rows(tu.unpad(padded, added), rows)
    same_rows(tu.contiguous(data), rows)
    same_rows(
        tu.union_tensor_dict(data, tu.index_select_tensor_dict(data, [*range(len(rows))])), rows
    )
    tu.assert_tensordict_eq(data, tu.contiguous(data))
    if rows:
        size = draw.draw(st.sampled_from([n for n in range(1, 8) if len(rows) % n == 0]))
        minis = [rows_of(mini) for mini in tu.make_iterator(data, size, epochs=2)]
        assert minis == [rows[i : i + size] for i in range(0, len(rows), size)] * 2
    keys = draw.draw(st.lists(st.sampled_from([*data.keys()]), unique=True)) if data.keys() else []
    kept = [{key: row[key] for key in keys} for row in rows]
    same_rows(tu.get_keys(data, keys), kept)
    same_rows(tu.pop_keys(data, keys), kept)
    same_rows(data, [{k: v for k, v in row.items() if k not in keys} for row in rows])
