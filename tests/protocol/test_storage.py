"""What is saved is loaded, and nothing else is."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict

from protocol import (
    columns,
    deserialize_single_tensor,
    deserialize_tensordict,
    serialize_single_tensor,
    serialize_tensordict,
)
from protocol.data_proto import DataProto
from protocol.errors import BatchTypeError, StorageError
from tests.protocol.conftest import DTYPES, LAYOUTS, make_column


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_survives(path: Path, dtype: torch.dtype) -> None:
    for rows in (0, 3):
        tensors = {layout: make_column(rows, layout, dtype) for layout in LAYOUTS}
        data = DataProto.from_dict(tensors)
        data.save_to_disk(path)
        tuples = serialize_tensordict(data.batch)
        for back in (DataProto.load_from_disk(path), DataProto(deserialize_tensordict(tuples))):
            assert data.diff(back) == []
        name, shape, buffer = serialize_single_tensor(tensors["plain"])
        assert (f"torch.{name}", shape, type(buffer)) == (str(dtype), (rows,), memoryview)
        deserialize_single_tensor((name, list(shape), bytes(buffer))).fill_(1)  # it is writable
    with pytest.raises(BatchTypeError, match="needs a dense tensor"):
        serialize_single_tensor(tensors["jagged"])


def test_nested_tensordicts_survive(path: Path) -> None:
    nested = TensorDict({"a": TensorDict({"b": torch.arange(2)}, [2])}, [2])
    DataProto(nested).save_to_disk(path)
    assert DataProto.load_from_disk(path).batch["a", "b"].tolist() == [0, 1]


def test_json_needs_no_pickle(path: Path) -> None:
    meta = {"step": 3, "nan": float("nan"), "deep": {"a": [1, None, {"b": "\ud800 é"}]}}
    arrays = {
        "s": np.array(["a", "bcd"]),
        "t": np.array(["2020-01-01", "NaT"], dtype="M8[s]"),
        "o": columns.as_object_array([{"role": "user"}, [1, [2]]]),
        "o2": np.array([["a", None], ["b", 1.5]], dtype=object),
    }
    data = DataProto(None, arrays, {**meta, "tensor": torch.ones(2)})
    data.save_to_disk(str(path))
    loaded = DataProto.load_from_disk(str(path))
    path.write_bytes(b"")  # it is not needed any more
    assert data.diff(loaded) == []
    loaded.non_tensor_batch["s"][0] = "x"
    loaded.meta_info["tensor"] += 1


CYCLE: list[object] = [1]
CYCLE.append(CYCLE)
SPARSE = torch.eye(2).to_sparse()
NOT_JSON = [(1, 2), {1: 2}, np.float32(1), {1, 2}, 1j, b"x", CYCLE, 10**5000, SPARSE]


@pytest.mark.filterwarnings("ignore")  # torch has some for sparse tensors
@pytest.mark.parametrize("value", NOT_JSON, ids=lambda value: type(value).__name__)
def test_what_is_not_json_needs_pickle_on_both_sides(path: Path, value: object) -> None:
    data = DataProto(meta_info={"k": [value]})
    with pytest.raises(StorageError, match=r"meta_info\['k'\].*allow_pickle=True"):
        data.save_to_disk(path)
    assert not path.exists()
    data.save_to_disk(path, allow_pickle=True)
    with pytest.raises(StorageError, match=f"{path} holds pickled objects"):
        DataProto.load_from_disk(path)
    assert data.diff(DataProto.load_from_disk(path, allow_pickle=True)) == []


def test_loading_runs_no_code_unless_allowed(path: Path) -> None:
    mark = path.with_name("ran")
    data = DataProto(non_tensor_batch={"x": columns.as_object_array([_Touch(mark)])})
    data.save_to_disk(path, allow_pickle=True)
    with pytest.raises(StorageError):
        DataProto.load_from_disk(path)
    for nearly in ("False", 1):
        with pytest.raises(StorageError):
            DataProto.load_from_disk(path, allow_pickle=nearly)  # type: ignore[arg-type]
    assert not mark.exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_damaged_or_foreign_file_is_named(path: Path, sample: DataProto) -> None:
    sample.save_to_disk(path)
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StorageError, match=rf"{path}.*damaged"):
            DataProto.load_from_disk(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(StorageError, match=str(path)):
        DataProto.load_from_disk(path, allow_pickle=True)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(StorageError, match=f"{path} is a safetensors file, but not one"):
        DataProto.load_from_disk(path)
    header = {"format": "single_controller.DataProto", "version": "99"}
    save_file({"index": torch.ones(2)}, path, header)
    with pytest.raises(StorageError, match=r"'version': '99'.* must be .*'version': '2'"):
        DataProto.load_from_disk(path)
    save_file({"index": torch.ones(2, dtype=torch.uint8)}, path, {**header, "version": "2"})
    with pytest.raises(StorageError, match="damaged"):
        DataProto.load_from_disk(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        DataProto.load_from_disk(path.with_name("absent"))


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    path: Path, sample: DataProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.save_to_disk(path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("protocol.storage.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        sample.repeat(2).save_to_disk(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["batch"]
    assert sample.diff(DataProto.load_from_disk(path)) == []


def test_keys_of_meta_info_come_back_as_they_were(path: Path) -> None:
    for key in ("text", ("a", ("b", 1)), 2, None, b"bytes", frozenset("a")):
        data = DataProto(meta_info={key: 1})
        if not isinstance(key, str):
            with pytest.raises(StorageError, match="not JSON"):
                data.save_to_disk(path)
        data.save_to_disk(path, allow_pickle=True)
        assert DataProto.load_from_disk(path, allow_pickle=True).meta_info == {key: 1}
