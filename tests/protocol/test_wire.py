"""What crosses a process boundary arrives equal, writable and private."""

from __future__ import annotations

import copy
import gc
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from tensordict import NonTensorData, NonTensorStack, TensorDict

from protocol import columns, combine, wire
from protocol import tensordict_utils as tu
from protocol.batches import copy_batch, detach_batch
from protocol.data_proto import DataProto
from protocol.errors import BatchError
from protocol.storage import deserialize_tensordict, serialize_tensordict
from tests.protocol.conftest import LAYOUTS, batches, make_column

# Of a batch's dtypes those that numpy has, has not, and has in pairs.
UNLIKE = [torch.int64, torch.bfloat16, torch.complex64]


def send(value: Any) -> tuple[bytes, list[memoryview]]:
    """The pickle and its buffers, read-only as a shared-memory store hands them out."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return data, [memoryview(bytes(buffer)) for buffer in buffers]


def receive(sent: tuple[bytes, list[memoryview]]) -> Any:
    return pickle.loads(sent[0], buffers=sent[1])


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().values() if tensor.is_nested else tensor.detach()  # type: ignore[no-any-return]


class _Special(DataProto):
    pass


@given(batches())
def test_a_batch_arrives_equal(data: DataProto) -> None:
    assert type(receive(send(_Special(data.batch)))) is _Special
    for arrived in (
        receive(send(data)),
        receive(send(data[:])),  # whose TensorDict nobody has asked for
        *(pickle.loads(pickle.dumps(data, protocol)) for protocol in (2, 4, 5)),
        copy.deepcopy(data),
        copy.copy(data),
    ):
        assert data.diff(arrived) == []
        for key, column in arrived._tensors().items():
            assert column.requires_grad == data._tensors()[key].requires_grad


@pytest.mark.parametrize("dtype", UNLIKE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 3])
def test_every_layout_arrives_writable_and_private(
    dtype: torch.dtype, layout: str, rows: int
) -> None:
    column = make_column(rows, layout, dtype)
    data = DataProto.from_dict({"x": column})
    sent = send(data)
    first, second = receive(sent).batch["x"], receive(sent).batch["x"]
    assert combine.equal(first, column)
    assert first.is_leaf
    dense(first).fill_(1)
    assert combine.equal(second, column)
    in_band = pickle.loads(pickle.dumps(data, 5)).batch["x"]
    dense(in_band).fill_(1)
    assert combine.equal(data.batch["x"], make_column(rows, layout, dtype))
    alone = wire.pack_value(column)
    assert combine.equal(wire.unpack_value(receive(send(alone))), column)


def test_arrays_arrive_writable_and_private() -> None:
    arrays = {
        "n": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "s": np.array(["a", "bcd"]),
        "t": np.array(["2020-01-01", "NaT"], dtype="M8[D]"),
        "r": np.array([(1, 2.0), (3, 4.0)], dtype=[("i", "i4"), ("f", "f8")]),
        "e": np.broadcast_to(np.arange(2)[:, None], (2, 4)),
    }
    data = DataProto(None, arrays, {"tensor": torch.ones(2), "array": np.ones(2)})
    sent = send(data)
    first, second = receive(sent), receive(sent)
    assert data.diff(first) == []
    for key in arrays:
        first.non_tensor_batch[key][:] = first.non_tensor_batch[key][::-1].copy()
    first.meta_info["tensor"] += 1
    first.meta_info["array"] += 1
    assert data.diff(second) == []


def test_arrays_in_an_object_column_arrive_writable() -> None:
    rows = columns.as_object_array([np.arange(2), None, np.arange(3)])
    data = DataProto(non_tensor_batch={"x": rows})
    sent = send(data)
    first, second = receive(sent), receive(sent)
    first.non_tensor_batch["x"][0] += 1
    assert data.diff(second) == []
    with wire.read_as("view"):
        assert not receive(sent).non_tensor_batch["x"][0].flags.writeable


def test_numbers_leave_out_of_band_and_without_a_copy() -> None:
    tensor, array = torch.arange(10_000), np.arange(10_000.0)
    data = DataProto.from_dict({"x": tensor}, {"a": array}, {"t": torch.zeros(10_000)})
    buffers: list[pickle.PickleBuffer] = []
    payload = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    assert len(payload) < 1_000
    addresses = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers}
    assert {tensor.data_ptr(), array.ctypes.data} <= addresses


def test_only_the_bytes_of_the_rows_themselves_are_sent() -> None:
    jagged = make_column(100, "jagged", torch.bool)
    data = DataProto.from_dict({"x": torch.zeros(100, 8), "j": jagged})
    sent = send(data.chunk(10)[3])
    assert sum(len(buffer) for buffer in sent[1]) < 10 * 32 + 11 * 8 + 100


def test_a_tensor_in_several_columns_crosses_once_and_arrives_as_independent_ones() -> None:
    tokens = torch.arange(4 * 100).reshape(4, 100)
    data = DataProto.from_dict({"whole": tokens, "again": tokens, "flat": tokens.view(4, 50, 2)})
    sent = send(data)
    assert sum(len(buffer) for buffer in sent[1]) == 4 * 100 * 8
    for how in ("own", "join", "view"):
        with wire.read_as(how):  # type: ignore[arg-type]
            assert data.diff(receive(sent)) == []
    arrived = receive(sent)
    for key in ("whole", "flat"):
        arrived.batch[key].zero_()
        assert combine.equal(arrived.batch["again"], tokens)
    in_band = pickle.loads(pickle.dumps(data, 5))
    in_band.batch["whole"].zero_()
    assert combine.equal(in_band.batch["again"], tokens)


def test_views_of_one_memory_in_elements_of_several_sizes_arrive() -> None:
    a = torch.arange(10, dtype=torch.uint8).view(2, 5)
    b = a.view(-1)[:8].view(torch.float32).view(2, 1)
    data = DataProto.from_dict({"a": a, "b": b, "c": a.view(-1)[2:6].view(torch.int16).view(2, 1)})
    for how in ("own", "join", "view"):
        with wire.read_as(how):  # type: ignore[arg-type]
            assert data.diff(receive(send(data))) == []
    assert data.diff(pickle.loads(pickle.dumps(data, 4))) == []


def nested_with_holes(first: int) -> torch.Tensor:
    offsets, lengths = torch.tensor([0, 600, 1200]), torch.tensor([500, 400])
    values = torch.arange(first, first + 1200)
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths=lengths)


COPIED_TO_BE_SENT: dict[str, Callable[[int], Any]] = {
    "array": lambda i: np.arange(i, i + 1200).reshape(200, 6)[:2, ::2],
    "long array": lambda i: np.arange(i, i + 12_000).reshape(2, 6000)[:, ::2],
    "text": lambda i: np.array([f"{i}a", "b", f"{i}c", "d"])[::2],
    "holes": nested_with_holes,
}


@pytest.mark.parametrize("kind", COPIED_TO_BE_SENT)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_columns_whose_copies_could_take_the_same_memory_in_turn_arrive_apart(
    kind: str, protocol: int
) -> None:
    made = {f"c{i}": COPIED_TO_BE_SENT[kind](i) for i in range(6)}
    arrays = {key: value for key, value in made.items() if isinstance(value, np.ndarray)}
    tensors = {key: value for key, value in made.items() if key not in arrays}
    data = DataProto.from_dict(tensors, arrays)
    assert data.diff(pickle.loads(pickle.dumps(data, protocol))) == []


def test_buffers_that_a_sender_lets_go_at_once_are_not_taken_for_one_another() -> None:
    """As one does that copies each buffer when it gets it."""
    got: list[bytes] = []

    def take(buffer: pickle.PickleBuffer) -> None:
        got.append(bytes(buffer))
        buffer.release()

    arrays = [np.arange(i, i + 12_000).reshape(2, 6000)[:, ::2] for i in range(6)]
    batches = [DataProto(non_tensor_batch={"a": array}) for array in arrays]
    with wire.Message():
        data = pickle.dumps(batches, protocol=5, buffer_callback=take)
    for arrived, array in zip(pickle.loads(data, buffers=got), arrays, strict=True):
        assert np.array_equal(arrived.non_tensor_batch["a"], array)


class _PicklesItself:
    """Its batch crosses within a pickle of its own."""

    def __init__(self, data: DataProto, protocol: int) -> None:
        self.data, self.protocol = data, protocol

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (pickle.dumps(self.data, self.protocol),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_pickled_within_a_message_may_pickle_its_batch_by_itself(protocol: int) -> None:
    tensors = {"x": torch.arange(8.0).view(4, 2), "j": make_column(4, "jagged", torch.int64)}
    data = DataProto.from_dict(tensors, {"n": np.arange(4), "s": ["a", "b", "c", "d"]})
    own = _PicklesItself(data, protocol)
    holder = DataProto.from_dict({"x": data.batch["x"]}, meta_info={"own": own})
    for value in [own, data, own, data[1:]], [data, own], [holder, data, own]:
        with wire.Message():
            arrived = receive(send(value))
        for one, twin in zip(value, arrived, strict=True):
            sent = data if one in (own, holder) else one
            assert sent.diff(twin.meta_info["own"] if one is holder else twin) == []


def concat_of_arrived(data: DataProto) -> DataProto:
    with wire.read_as("join"):
        return DataProto.concat([receive(send(shard)) for shard in data.chunk(2)])


def stored(data: DataProto, path: Path) -> DataProto:
    data.save_to_disk(path)
    return DataProto.load_from_disk(path)


VERBS: dict[str, Callable[[DataProto, Path], DataProto]] = {
    "sent": lambda data, path: receive(send(data)),
    "sent in part": lambda data, path: receive(send(data.slice(1, 3))),
    "sent and joined": lambda data, path: concat_of_arrived(data),
    "pickled": lambda data, path: pickle.loads(pickle.dumps(data, 4)),
    "slice": lambda data, path: data.slice(1, 3),
    "no rows": lambda data, path: data[:0],
    "rows": lambda data, path: data[[3, 0]],
    "chunk": lambda data, path: data.chunk(2)[1],
    "select": lambda data, path: data.select(["x", "y", "leaf", "ids"]),
    "concat": lambda data, path: DataProto.concat([data, *data.chunk(4)]),
    "iterate": lambda data, path: next(iter(data.make_iterator(2, 1, seed=0))),
    "deepcopy": lambda data, path: copy.deepcopy(data),
    "repeat": lambda data, path: data.repeat(2),
    "detached": lambda data, path: detach_batch(data),
    "stored": stored,
    "chunk bare": lambda data, path: DataProto(tu.chunk_tensordict(data.batch, 2)[1]),
    "concat bare": lambda data, path: DataProto(tu.concat_tensordict([data.batch, data.batch])),
    "copy bare": lambda data, path: DataProto(copy_batch(data.batch)),
    "tuples": lambda data, path: DataProto(
        deserialize_tensordict(serialize_tensordict(data.batch))
    ),
}


@pytest.mark.parametrize("layout", ["jagged", "jagged2", "holes"])
@pytest.mark.parametrize("verb", VERBS)
def test_jagged_columns_can_still_be_combined_and_padded(
    layout: str, verb: str, tmp_path: Path
) -> None:
    """torch combines those with common offsets, and pads to the length of all rows together where
    a nested tensor knows no maximum.
    """
    column = make_column(4, layout, torch.float32)
    leaf = (column * 3).requires_grad_()
    ids = tu.nested_tensor_from_tensor_list([torch.arange(count) for count in (2, 5, 3, 1)])
    data = DataProto.from_dict({"x": column, "y": column * 2, "leaf": leaf, "ids": ids})
    made = VERBS[verb](data, tmp_path / "batch").batch
    if len(made):
        assert combine.equal((made["x"] + made["y"]).detach(), (made["x"] * 3).detach())
        assert combine.equal((made["x"] + made["y"]).detach(), made["leaf"].detach())
    longest = max((len(row) for row in made["ids"].unbind()), default=0)
    assert made.select("ids").to_padded_tensor()["ids"].shape[1] == longest


def test_batches_of_one_message_share_its_buffers() -> None:
    data = DataProto.from_dict({"x": torch.arange(1000.0), "y": torch.zeros(1000)})
    with wire.Message() as message:
        sent = send([data, data.select(["x"]), data.slice(0, 10)])
    assert sum(len(buffer) for buffer in sent[1]) == 2 * 4000 + 2 * 40
    whole, selected, part = receive(sent)
    whole.batch["x"].zero_()
    assert selected.batch["x"].sum() == 999 * 500
    assert part.batch["x"].tolist() == list(range(10))
    buffers: list[pickle.PickleBuffer] = []
    with message:
        pickle.dumps([data, np.ones(3)], protocol=5, buffer_callback=buffers.append)
    assert [id(buffer) in message.buffers for buffer in buffers] == [True, True, False]


@pytest.mark.parametrize("dtype", UNLIKE, ids=str)
def test_shards_joined_as_they_arrive_are_the_whole(dtype: torch.dtype) -> None:
    tensors = {layout: make_column(6, layout, dtype) for layout in ("plain", "grad", "expanded")}
    data = DataProto.from_dict({**tensors, "int": torch.arange(6), "mask": torch.ones(6, 2) > 0})
    *sent, last = map(send, data.split(2))
    with wire.read_as("join"):
        arrived = [receive(shard) for shard in (*sent, last)]
        in_part = [receive(shard) for shard in sent]
    assert DataProto.concat(arrived).diff(data) == []
    assert DataProto.concat([*in_part, data[4:]]).diff(data) == []
    assert DataProto.concat([data[:2], in_part[1], receive(last)]).diff(data) == []
    assert DataProto.concat([data[:4], arrived[2][:1], arrived[2][1:]]).diff(data) == []
    wider = DataProto.from_dict({**data[4:]._tensors(), "int": torch.arange(4.0, 6.0)})
    with wire.read_as("join"):
        mixed = DataProto.concat([*in_part, receive(send(wider))])
    assert mixed.batch["int"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert pickle.loads(pickle.dumps(arrived[0])).diff(data[:2]) == []


def test_large_shards_joined_as_they_arrive_are_the_whole() -> None:
    data = DataProto.from_dict({"x": torch.arange(3 << 20).reshape(6, 1 << 19)})
    assert concat_of_arrived(data).diff(data) == []


def test_shards_that_differ_in_shape_are_not_joined_as_they_arrive() -> None:
    shards = [DataProto.from_dict({"x": torch.ones(2, width)}) for width in (3, 4)]
    with wire.read_as("join"):
        arrived = [receive(send(shard)) for shard in shards]
    with pytest.raises(BatchError, match=r"batch\['x'\].*\(2, 3\).*\(2, 4\)"):
        DataProto.concat(arrived)


def test_shards_that_are_joined_become_no_tensors_first() -> None:
    """For a thousand ranks, these would take longer than all else."""
    data = DataProto.from_dict({"x": torch.ones(8, 3), "y": torch.zeros(8)})
    sent = [send(shard) for shard in data.split(1)]

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    before = tensors()
    with wire.read_as("join"):
        arrived = [receive(shard) for shard in sent]
    assert tensors() == before
    assert DataProto.concat(arrived).diff(data) == []


def test_a_batch_is_pickled_by_name_of_nothing_but_its_class() -> None:
    """Each name costs a pickler that looks for what to pickle by value more than a column does."""
    data = DataProto.from_dict(
        {"x": torch.ones(2, 3, requires_grad=True), "j": make_column(2, "jagged", torch.int64)},
        {"text": ["a", "b"], "n": np.arange(2)},
        {"step": 1, "t": torch.ones(2)},
    )
    names = [op.name for op, _, _ in pickletools.genops(send(data)[0])]
    assert names.count("STACK_GLOBAL") == 1


def test_a_view_shows_the_buffers_and_arrays_read_only() -> None:
    tensors, arrays = {"x": torch.arange(64)}, {"a": np.arange(64)}
    data = DataProto.from_dict(tensors, arrays, {"m": np.ones(2), "t": torch.ones(2)})
    sent = send(data)
    addresses = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in sent[1]}
    with wire.read_as("view"):
        seen = receive(sent)
    for array in (seen.non_tensor_batch["a"], seen.meta_info["m"]):
        assert array.ctypes.data in addresses
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    with wire.read_as("join"):
        joined = receive(sent)
    assert data.diff(seen) == data.diff(joined) == []
    for shown in (seen.batch["x"], joined.batch["x"], seen.meta_info["t"]):
        assert shown.data_ptr() in addresses
    assert joined.non_tensor_batch["a"].ctypes.data in addresses
    assert joined.meta_info["m"].flags.writeable  # what is no column is private all the same
    for own in (joined.meta_info["t"], DataProto.concat([joined]).batch["x"]):
        assert own.data_ptr() not in addresses


def test_what_is_not_numbers_in_memory_is_left_to_the_pickler() -> None:
    others = [torch.eye(2).to_sparse(), torch.nn.Parameter(torch.ones(1)), "text", np.ones(1)]
    assert [wire.pack_value(other) for other in others] == [None] * 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch wants to drop them
def test_quantized_tensors_arrive_with_their_scales() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    whole = torch.quantize_per_tensor(rows, 0.5, 3, torch.qint8)
    by_row = torch.quantize_per_channel(
        rows, torch.tensor([0.5, 1.0]), torch.tensor([0, 1]), 0, torch.qint8
    )
    arrived = receive(send(DataProto.from_dict({"x": whole}, {}, {"w": by_row})))
    for before, after in ((whole, arrived.batch["x"]), (by_row, arrived.meta_info["w"])):
        assert after.dtype is torch.qint8
        assert after.dequantize().equal(before.dequantize())


def test_a_bare_tensordict_arrives_equal() -> None:
    batch = TensorDict(
        {
            "x": torch.ones(2, 3, dtype=torch.bfloat16),
            "j": make_column(2, "jagged2", torch.int64),
            "one": NonTensorData({"a": 1}, batch_size=[2]),
            "each": NonTensorStack(NonTensorData("p"), NonTensorData(None)),
            "inner": TensorDict({"y": torch.zeros(2, 1)}, [2, 1]),
        },
        [2],
        device="cpu",
    )
    arrived = wire.unpack_value(receive(send(wire.pack_value(batch))))
    assert combine.equal(arrived, batch)
    assert arrived["one"] == {"a": 1}
    assert arrived.get("each").tolist() == ["p", None]
    assert arrived["inner"].batch_size == torch.Size([2, 1])
    assert arrived.device == torch.device("cpu")
    arrived["x"].zero_()
    assert batch["x"].sum() == 6
    named = TensorDict({"a": torch.ones(1)}, [1], names=["rows"])
    assert wire.unpack_value(wire.pack_value(named)).names == ["rows"]
