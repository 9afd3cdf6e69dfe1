"""Whatever is passed to a batch, what it cannot take is answered by a BatchError that says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict

import protocol
from protocol import DataProto, DataProtoFuture
from protocol import tensordict_utils as tu
from protocol.batches import Batch, slice_batch
from protocol.errors import BatchError, BatchTypeError
from tests.protocol.conftest import LAYOUTS, batches, make_column


def bare(rows: int) -> TensorDict:
    jagged = make_column(rows, "jagged", torch.float32)
    return tu.get_tensordict({"t0": jagged, "s": ["x"] * rows}, {"m": 1})


def proto(rows: int) -> DataProto:
    tensors = {"t0": make_column(rows, "jagged", torch.float32), "t1": torch.arange(rows)}
    return DataProto.from_dict(tensors, {"a0": ["x"] * rows}, {"m": 1})


NUMBERS = [None, True, False, 0, 1, 2, 3, -1, -7, 10**6, 2.5, float("nan"), float("inf"), 1j]
TEXTS: list[Any] = ["", "abc", "t0", "a0", b"x", Ellipsis, object(), int, len, range(2)]
LISTS: list[Any] = [
    *([], [0], [0, 1], [5, 6, 7], [-1], [None], [[0], [1, 2]], [True, False], [1.5], (), (0, 1)),
    *(["t0"], ["t0", "zz"], ["zz"], ["t0", "t0"], ["a0", "a0"], ("t0",), {0, 1}, iter([0])),
    *(slice(5, 1), slice(None, None, -1), slice("a"), slice(None, None, 0)),  # type: ignore[misc]
]
DICTS: list[Any] = [
    *({}, {"a": 1}, {1: 2}, {"a": "xyz"}, {"a": None}, {"a": [1, 2, 3]}, {None: torch.ones(3)}),
    *({"a": torch.tensor(1)}, {"a": np.array(1)}, {"a": [torch.zeros(2)]}, {("a", "b"): 1}),
    {"a": torch.zeros(3), "b": torch.zeros(2)},
    {"shuffle": "yes", "sampler": [9]},
    *({"batch_sampler": 3}, {"timeout": -1}, {"unheard_of": 1}, {"drop_last": None}),
]
ARRAYS: list[Any] = [
    *map(torch.tensor, (1, 1.5, True, [0, 1], [0.5], [True, False], [9], [1j])),
    *(torch.zeros(2, 2), torch.empty(0), torch.zeros(3, dtype=torch.uint64)),
    *map(np.array, (1, [0, 1], ["a", "b"], [0.5], [True], [])),
    *(np.zeros((2, 2)), np.array([None, 1], dtype=object), np.int64(2), np.float32(2), np.bool_(1)),
    np.array([2**63], dtype=np.uint64),
]


def collections() -> list[Any]:
    """Made anew for each example, since some functions change what they get."""
    columns = [make_column(rows, layout, torch.float32) for layout in LAYOUTS for rows in (0, 2)]
    return [
        *(proto(0), proto(2), bare(0), bare(2), proto(2)[0], TensorDict({}, []), NonTensorData(3)),
        *([proto(2), proto(2)], [bare(2), bare(2)], [proto(2), bare(2)], [proto(1), None]),
        *([proto(2)[0], proto(2)[1]], [bare(1), None], TensorDict({"x": torch.ones(2, 2)}, [2, 2])),
        TensorDict({"inner": TensorDict({"x": torch.zeros(2)}, [2])}, [2]),
        *columns,
        *([columns[0]], columns[:2], [torch.zeros(2), torch.zeros(3)], [torch.tensor(1)]),
        *([torch.zeros(2, 3), torch.zeros(3, 4)], [{"a": torch.zeros(2)}, {"a": torch.ones(3)}]),
        *(
            [{"a": torch.zeros(2)}, {"b": 1}],
            [{"a": 1}, 3],
            {"a": columns[1]},
            [TensorDict({}, [])],
        ),
    ]


anything = st.one_of(
    st.sampled_from(NUMBERS + TEXTS + LISTS + DICTS + ARRAYS),
    st.integers(0, 44).map(lambda i: (made := collections())[i % len(made)]),
)
small = st.integers(0, 3)
mini = st.none() | small


class Made:
    """Where a future finds rows that are here already."""

    def __init__(self, batch: DataProto) -> None:
        self.batch = batch

    def rows(self, timeout: float | None) -> int:
        return len(self.batch)

    def fetch(self, start: int, stop: int, timeout: float | None) -> Batch:
        return slice_batch(self.batch, start, stop)


class Draw:
    """Arguments as short names: `x` is anything; the others are mostly what they should be."""

    def __init__(self, draw: st.DataObject, path: Path) -> None:
        self.draw, self.path = draw.draw, path

    @property
    def x(self) -> Any:
        return self.draw(anything)

    @property
    def n(self) -> Any:
        return self.draw(mini | anything)

    @property
    def data(self) -> Any:
        return self.draw(batches())

    @property
    def data_or(self) -> Any:
        return self.draw(batches() | anything)

    @property
    def future(self) -> DataProtoFuture:
        return DataProtoFuture([Made(self.data)])

    @property
    def td(self) -> Any:
        return self.draw(small.map(bare) | anything)

    @property
    def key(self) -> Any:
        return self.draw(st.sampled_from(["k", "t0", "s", "", 1, None, ("a", "b"), 2.5]))


CALLS: dict[str, Callable[[Draw], Any]] = {
    "DataProto": lambda d: DataProto(d.td, d.x, d.x),
    "from_dict": lambda d: DataProto.from_dict(d.x, d.x, d.x),
    "from_dict values": lambda d: DataProto.from_dict({d.key: d.x}, {d.key: d.x}),
    "from_dict options": lambda d: DataProto.from_dict({"t": torch.ones(3)}, None, None, d.x, d.x),
    "from_single_dict": lambda d: DataProto.from_single_dict(d.x, d.x),
    "from_tensordict": lambda d: DataProto.from_tensordict(d.td, d.x, d.n),
    "to_tensordict": lambda d: DataProto.from_dict(
        {"a": torch.ones(2)}, None, {d.key: d.x}
    ).to_tensordict(),
    "[]": lambda d: d.data[d.x],
    "slice": lambda d: d.data.slice(d.n, d.n, d.n),
    "select": lambda d: d.data.select(d.x, d.x, d.x, d.x),
    "select_idxs": lambda d: d.data.select_idxs(d.x),
    "split": lambda d: d.data.split(d.x),
    "split_sizes": lambda d: d.data.split_sizes(d.x),
    "chunk": lambda d: d.data.chunk(d.x),
    "balanced_chunk": lambda d: d.data.balanced_chunk(d.n, d.x),
    "balanced_chunk of": lambda d: proto(2).balanced_chunk(2, [d.x, d.x]),
    "group_by": lambda d: d.data.group_by(d.x),
    "make_iterator": lambda d: few(d.data.make_iterator(d.n, d.n, d.n, d.x)),
    "print_size": lambda d: d.data.print_size(d.x),
    "concat": lambda d: DataProto.concat(d.x),
    "concat two": lambda d: DataProto.concat([d.data, d.data_or]),
    "union": lambda d: d.data.union(d.data_or),
    "repeat": lambda d: d.data.repeat(d.n, d.x),
    "sample_level_repeat": lambda d: d.data.sample_level_repeat(d.x),
    "sample_level_repeat of": lambda d: proto(2).sample_level_repeat([d.x, d.x]),
    "unfold_column_chunks": lambda d: d.data.unfold_column_chunks(d.n, d.x),
    "to": lambda d: d.data.to(d.x),
    "pop": lambda d: d.data.pop(d.x, d.x, d.x),
    "rename": lambda d: d.data.rename(d.x, d.x),
    "reorder": lambda d: d.data.reorder(d.x),
    "padding": lambda d: d.data.padding(d.n, d.x),
    "pad_rows": lambda d: d.data.pad_rows(d.x),
    "diff": lambda d: d.data.diff(d.data_or),
    "save_to_disk": lambda d: d.data.save_to_disk(d.path, d.x),
    "save_to_disk where": lambda d: d.data.save_to_disk(absolute(d.x)),
    "load_from_disk": lambda d: DataProto.load_from_disk(absolute(d.x), d.x),
    "fold_batch_dim": lambda d: protocol.fold_batch_dim(d.data_or, d.n),
    "unfold_batch_dim": lambda d: protocol.unfold_batch_dim(d.data_or, d.n),
    "pad_dataproto_to_divisor": lambda d: protocol.pad_dataproto_to_divisor(d.data_or, d.n),
    "unpad_dataproto": lambda d: protocol.unpad_dataproto(d.data_or, d.n),
    "collate_fn": lambda d: protocol.collate_fn(d.x),
    "union_numpy_dict": lambda d: protocol.union_numpy_dict(d.x, d.x),
    "serialize_single_tensor": lambda d: protocol.serialize_single_tensor(d.x),
    "deserialize_single_tensor": lambda d: protocol.deserialize_single_tensor(d.x),
    "deserialize parts": lambda d: protocol.deserialize_single_tensor((d.x, d.x, b"x")),
    "serialize_tensordict": lambda d: protocol.serialize_tensordict(d.td),
    "deserialize_tensordict": lambda d: protocol.deserialize_tensordict(d.x),
    "deserialize tensors": lambda d: protocol.deserialize_tensordict(([2], None, d.x)),
    "BatchData.chunk": lambda d: protocol.BatchData(d.x).chunk(d.n),
    "BatchData.concat": lambda d: protocol.BatchData(d.x).concat(),
    "DataProtoFuture": lambda d: DataProtoFuture(d.x),
    "DataProtoFuture.concat": lambda d: DataProtoFuture.concat(d.x),
    "DataProtoFuture.chunk": lambda d: [part.get() for part in d.future.chunk(d.n)],
    "DataProtoFuture.select": lambda d: d.future.select([d.x, d.x]).get(),
    "DataProtoFuture.union": lambda d: d.future.union(d.future).get(),
    "DataProtoFuture.fetch": lambda d: d.future.fetch(d.draw(st.integers()), d.draw(small)),
    "DataProtoFuture.get": lambda d: d.future.get(map_location=d.x),
    "assign_non_tensor": lambda d: tu.assign_non_tensor(bare(2), k=d.x),
    "assign_non_tensor_data": lambda d: tu.assign_non_tensor_data(d.td, d.key, d.x),
    "assign_non_tensor_stack": lambda d: tu.assign_non_tensor_stack(d.td, d.key, d.x),
    "get_non_tensor_data": lambda d: tu.get_non_tensor_data(d.td, d.key, d.x),
    "nested_tensor_from_tensor_list": lambda d: tu.nested_tensor_from_tensor_list(d.x, d.n),
    "concat_nested_tensors": lambda d: tu.concat_nested_tensors(d.x),
    "concat_tensordict": lambda d: tu.concat_tensordict(d.x),
    "concat_tensordict two": lambda d: tu.concat_tensordict([bare(2), d.td]),
    "concat_tensordict_with_none_bsz": lambda d: tu.concat_tensordict_with_none_bsz(d.x),
    "chunk_tensordict": lambda d: tu.chunk_tensordict(d.td, d.x),
    "get_tensordict": lambda d: tu.get_tensordict(d.x, d.x),
    "get_tensordict values": lambda d: tu.get_tensordict({d.key: d.x, "y": d.x}),
    "index_select_tensor_dict": lambda d: tu.index_select_tensor_dict(d.td, d.x),
    "union_tensor_dict": lambda d: tu.union_tensor_dict(d.td, d.td),
    "tu.make_iterator": lambda d: few(tu.make_iterator(d.td, d.n, d.n, d.n, d.x)),
    "assert_tensordict_eq": lambda d: tu.assert_tensordict_eq(d.td, d.td),
    "get": lambda d: tu.get(d.td, d.x, d.x),
    "get_keys": lambda d: tu.get_keys(d.td, d.x),
    "tu.pop": lambda d: tu.pop(d.td, d.x, d.x),
    "pop_keys": lambda d: tu.pop_keys(d.td, d.x),
    "pad_to_divisor": lambda d: tu.pad_to_divisor(d.td, d.n),
    "unpad": lambda d: tu.unpad(d.td, d.n),
    "contiguous": lambda d: tu.contiguous(d.td),
    "maybe_fix_3d_position_ids": lambda d: tu.maybe_fix_3d_position_ids(d.td),
    "list_of_dict_to_tensordict": lambda d: tu.list_of_dict_to_tensordict(d.x),
    "list_of_dict of": lambda d: tu.list_of_dict_to_tensordict([{"x": d.x}, {"x": d.x}]),
}


def few(made: Any) -> list[Any]:
    return list(itertools.islice(made, 20))


def absolute(path: Any) -> Any:
    """No file in the working directory."""
    return f"/nowhere/{path}" if isinstance(path, str) and path else path


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=12)
@given(draw=st.data())
def test_a_wrong_argument_is_answered_by_an_error_that_says_why(
    name: str, draw: st.DataObject, tmp_path: Path
) -> None:
    says = "there is nothing wrong"
    try:
        CALLS[name](Draw(draw, tmp_path / "batch"))
    except (BatchError, FileNotFoundError) as error:
        says = str(error)
    assert len(says) > 15


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: proto(2).select("t0"), "batch_keys must be a list of keys; got str 't0'"),  # type: ignore[arg-type]
        (lambda: proto(2).pop("t0"), "batch_keys must be a list of keys; got str 't0'"),  # type: ignore[arg-type]
        (lambda: proto(4).chunk("2"), "chunks must be a whole number; got str '2'"),  # type: ignore[arg-type]
        (lambda: proto(4).chunk(2.0), "chunks must be a whole number; got float 2.0"),  # type: ignore[arg-type]
        (lambda: DataProto.concat([proto(1), None]), r"data\[1\] must be of type DataProto; got N"),  # type: ignore[list-item]
        (lambda: DataProto.concat(proto(1)), "data must be a list of DataProto; got DataProto"),  # type: ignore[arg-type]
        (lambda: proto(1).union({"a": 1}), "other must be of type DataProto; got dict"),  # type: ignore[arg-type]
        (lambda: DataProto({"a": torch.ones(2)}), "must be a TensorDict or None; got dict"),  # type: ignore[arg-type]
        (lambda: DataProto.from_dict({"a": [1]}), r"tensors\['a'\] must be of type Tensor; got l"),  # type: ignore[dict-item]
        (lambda: DataProto.from_dict(None, {"s": "ab"}), r"non_tensors\['s'\] must be an array or"),
        (lambda: proto(1).save_to_disk("/x", "no"), "allow_pickle must be True or False; got str"),  # type: ignore[arg-type]
        (lambda: proto(1).to("gpu:0"), "device must be one of torch's.* got 'gpu:0'"),
        (lambda: tu.get_keys(bare(1), "t0"), "keys must be a list of keys; got str 't0'"),
        (lambda: tu.chunk_tensordict(proto(2), 2), "must be a TensorDict; got DataProto"),  # type: ignore[arg-type]
        (
            lambda: DataProto.from_dict({"a": torch.eye(2).to_sparse()}),
            r"tensors\['a'\] must be a strided or jagged tensor.* layout torch.sparse_coo: x.to_d",
        ),
        (
            lambda: DataProto(TensorDict({"a": torch.eye(2).to_sparse()}, [2])).chunk(2),
            r"batch\['a'\] must be a strided or jagged tensor",
        ),
        (lambda: proto(2)[torch.ones(2, 2, dtype=torch.bool)], r"which has shape \(2, 2\)$"),
        (lambda: proto(2)[[0.5]], r"got \[0.5\] \(torch.float64; make a mask with .bool\(\)\)"),
        (lambda: proto(2).balanced_chunk(1, [bare(0), 1]), "weights must be a list, array or te"),  # type: ignore[list-item]
    ],
)
def test_what_is_wrong_is_named_with_what_was_wanted(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(BatchTypeError, match=says):
        call()


@pytest.mark.parametrize("device", ["cuda:99", "hpu", "mps"])
def test_a_device_that_this_process_lacks_is_named_with_those_that_it_has(device: str) -> None:
    with pytest.raises(BatchError, match=f"this process has: cpu.*; got '{device}'"):
        proto(1).to(device)
    assert DataProto().to(device).batch is None


@pytest.mark.parametrize(
    "call",
    [
        lambda data: data.select(["n"]),
        lambda data: data.pop(["n"]),
        lambda data: data.rename("n", "m"),
    ],
)
def test_a_nested_tensordict_is_named_by_its_tensors(call: Callable[[DataProto], Any]) -> None:
    data = DataProto(TensorDict({"n": TensorDict({"x": torch.zeros(2)}, [2])}, [2]))
    with pytest.raises(
        BatchError, match=r"no \['n'\] in batch.*each tensor of a nested .* as \('n', 'x'\)"
    ):
        call(data)
    path: Any = ("n", "x")
    assert len(data.select([path])) == 2
    data.rename([path], ["x"])
    assert data.pop(["x"]).batch["x"].tolist() == [0, 0]


def test_a_nested_row_of_a_jagged_tensor_is_refused() -> None:
    rows = [torch.ones(2, 2), tu.nested_tensor_from_tensor_list([torch.ones(4), torch.ones(4)])]
    with pytest.raises(BatchError, match="must be dense tensors; got a nested one"):
        tu.list_of_dict_to_tensordict([{"x": row} for row in rows])


def test_a_future_is_of_sources_and_is_cut_in_a_known_way(sample: DataProto) -> None:
    with pytest.raises(BatchTypeError, match=r"sources\[1\] must have rows and fetch.*int 1"):
        DataProtoFuture([Made(sample), 1])  # type: ignore[list-item]
    for how in (["foo"], "foo", None):
        with pytest.raises(BatchError, match=r"how must be one of \['equal', .*; got"):
            DataProtoFuture([Made(sample)]).shards(2, how)  # type: ignore[arg-type]
