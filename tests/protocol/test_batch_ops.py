"""What the functions on whole batches promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from protocol import columns
from protocol.batch_ops import (
    collate_fn,
    fold_batch_dim,
    pad_dataproto_to_divisor,
    unfold_batch_dim,
    unpad_dataproto,
)
from protocol.data_proto import DataProto
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)
from protocol.keyed import union_numpy_dict
from protocol.serialize import (
    deserialize_single_tensor,
    deserialize_tensordict,
    serialize_single_tensor,
    serialize_tensordict,
)
from protocol.tensordict_utils import union_tensor_dict
from tests.protocol.conftest import DTYPES, LAYOUTS, batches, make_column


@given(data=batches(), divisor=st.integers(1, 9))
def test_unpad_undoes_pad(data: DataProto, divisor: int) -> None:
    padded, pad_size = pad_dataproto_to_divisor(data, divisor)
    assert len(padded) == len(data) + pad_size
    assert len(padded) % divisor == 0
    assert pad_size < divisor
    assert unpad_dataproto(padded, pad_size).diff(data) == []


def test_padding_repeats_rows_from_the_first_on(sample: DataProto) -> None:
    padded, pad_size = pad_dataproto_to_divisor(sample[:2], 5)
    assert (padded.batch["a"].tolist(), pad_size) == ([0, 1, 0, 1, 0], 3)
    assert pad_dataproto_to_divisor(sample, 3)[0] is sample
    with pytest.raises(BatchTypeError, match="data must be of type DataProto; got dict"):
        pad_dataproto_to_divisor({}, 3)  # type: ignore[arg-type]
    with pytest.raises(RowCountError, match="cannot remove 9 rows"):
        unpad_dataproto(sample, 9)


def test_collate_fn_undoes_taking_single_rows(sample: DataProto) -> None:
    collated = collate_fn(list(sample))
    assert collated.diff(sample) == ["meta_info['m']: only there"]
    with pytest.raises(BatchError, match="zero rows"):
        collate_fn([])
    with pytest.raises(BatchError, match="row 1 has"):
        collate_fn([sample[0], sample.select(["a"])[0]])
    ragged = DataProto.from_dict({"j": make_column(6, "jagged", torch.int64)})
    with pytest.raises(BatchError, match="one shape under 'j'"):
        collate_fn(list(ragged))


def test_unfold_undoes_fold(sample: DataProto) -> None:
    folded = fold_batch_dim(sample, 3)
    assert folded.batch["b"].shape == (3, 2, 2)
    assert folded.non_tensor_batch["s"].tolist() == [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]]
    assert unfold_batch_dim(folded).diff(sample) == []
    with pytest.raises(RowCountError, match="new_batch_size=4"):
        fold_batch_dim(sample, 4)
    with pytest.raises(BatchError, match=r"'a' is int64 \(6,\)"):
        unfold_batch_dim(sample)
    ragged = DataProto.from_dict({"j": make_column(4, "jagged", torch.int64)})
    with pytest.raises(BatchError, match="'j' is int64 jagged"):
        fold_batch_dim(ragged, 2)


def test_unions_of_dicts_change_and_return_the_first_and_refuse_differences() -> None:
    a, b = (TensorDict({key: torch.ones(2)}, [2]) for key in "ab")
    assert union_tensor_dict(a, b) is a
    assert ([*a.keys()], [*b.keys()]) == (["a", "b"], ["b"])
    same = "in tensor_dict1 and tensor_dict2 are not the same object."
    with pytest.raises(ConflictError, match=f"^`a` {same} 2 of 2 rows differ"):
        union_tensor_dict(a, TensorDict({"new": torch.ones(2), "a": torch.zeros(2)}, [2]))
    assert [*a.keys()] == ["a", "b"]
    with pytest.raises(RowCountError, match="identical batch size"):
        union_tensor_dict(a, TensorDict({}, [3]))
    nan = {"x": np.array([None, float("nan")], dtype=object)}
    assert union_numpy_dict(nan, {"x": nan["x"].copy(), "y": np.ones(2)}) is nan
    assert nan.keys() == {"x", "y"}
    with pytest.raises(ConflictError, match=f"^`y` {same} 1 of 2 rows differ"):
        union_numpy_dict(nan, {"z": np.ones(2), "y": np.arange(2.0)})
    assert nan.keys() == {"x", "y"}
    with pytest.raises(
        BatchTypeError, match=r"tensor_dict2\['y'\] must be of type ndarray; got list"
    ):
        union_numpy_dict(nan, {"y": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_serialized_tensors_come_back_writable(dtype: torch.dtype) -> None:
    for rows in (0, 3):
        tensors = {layout: make_column(rows, layout, dtype).detach() for layout in LAYOUTS}
        data = DataProto.from_dict(tensors)
        back = DataProto(deserialize_tensordict(serialize_tensordict(data.batch)))
        assert back.diff(data) == []
        name, shape, buffer = serialize_single_tensor(tensors["plain"])
        assert (f"torch.{name}", shape, type(buffer)) == (str(dtype), (rows,), memoryview)
        deserialize_single_tensor((name, list(shape), bytes(buffer))).fill_(1)


def test_serialized_jagged_rows_look_as_in_verl() -> None:
    column = torch.nested.nested_tensor_from_jagged(torch.arange(5), torch.tensor([0, 2, 5]))
    size, device, tensors = serialize_tensordict(TensorDict({"j": column}, [2]))
    kind, rows = tensors["j"]
    assert (size, device, kind) == ((2,), None, "jagged")
    assert [row[:2] for row in rows] == [("int64", (2,)), ("int64", (3,))]
    with pytest.raises(BatchTypeError, match="dense"):
        serialize_single_tensor(column)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_serialized_strided_rows_look_as_in_verl_and_come_back_strided() -> None:
    rows = [torch.ones(2, 3), torch.zeros(3, 4), torch.ones(1, 5)]
    batch = TensorDict({"n": torch.nested.nested_tensor(rows)}, [3])
    sent = serialize_tensordict(batch)
    assert sent[2]["n"][0] == "strided"
    assert [row[1] for row in sent[2]["n"][1]] == [(2, 3), (3, 4), (1, 5)]
    back = deserialize_tensordict(sent)
    assert back["n"].layout is torch.strided
    assert columns.equal(back, batch)


def test_rows_that_hold_a_key_as_different_kinds_are_not_collated() -> None:
    items = [
        DataProto.from_dict({"x": torch.zeros(1), "k": torch.zeros(1)})[0],
        DataProto.from_dict({"x": torch.zeros(1)}, {"k": ["text"]})[0],
    ]
    for rows in (items, items[::-1]):
        with pytest.raises(MissingKeyError, match=r"same keys in batch; row 0 has .*row 1 has"):
            collate_fn(rows)


GATHER = """
import sys, torch, torch.distributed as dist
from protocol.batch_ops import all_gather_data_proto
from protocol.data_proto import DataProto
from protocol.errors import BatchError
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
rows = [3, 1][rank]
jagged = torch.nested.nested_tensor_from_jagged(torch.arange(2 * rows), torch.arange(rows + 1) * 2)
data = DataProto.from_dict(
    {"j": jagged, "a": torch.full((rows, 2), rank)}, {"s": [f"{rank}.{i}" for i in range(rows)]},
    {"rank": rank},
)
all_gather_data_proto(data, dist.group.WORLD)
assert list(data.batch.keys()) == ["j", "a"]
assert data.batch["a"][:, 0].tolist() == [0, 0, 0, 1]
assert data.batch["j"].offsets().tolist() == [0, 2, 4, 6, 8]
assert data.non_tensor_batch["s"].tolist() == ["0.0", "0.1", "0.2", "1.0"]
assert data.meta_info == {"rank": rank}

order = ["a", "b"] if rank else ["b", "a"]
data = DataProto.from_dict({key: torch.zeros(1, dtype=torch.int64) for key in order})
if rank:
    data.batch["a"] = data.batch["a"].float()
all_gather_data_proto(data, dist.group.WORLD)
assert list(data.batch.keys()) == order
assert data.batch["a"].dtype == torch.float32 and len(data) == 2

data = DataProto.from_dict({"a": torch.ones(2)}, {"s": ["x", "y"]}) if rank else DataProto()
all_gather_data_proto(data, dist.group.WORLD)
assert data.batch["a"].tolist() == [1, 1] and data.non_tensor_batch["s"].tolist() == ["x", "y"]

for wrong in ({"ab"[rank]: torch.zeros(1)}, {"a": torch.zeros(1, 1 + rank)}):
    try:
        all_gather_data_proto(DataProto.from_dict(wrong), dist.group.WORLD)
    except BatchError as error:
        assert "concatenate" in str(error)
    else:
        raise SystemExit("not refused")
dist.destroy_process_group()
"""


def test_all_gather_gives_every_rank_the_rows_of_all(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHER, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
