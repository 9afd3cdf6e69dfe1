"""How a batch is kept in one file: safetensors, with everything that is not a tensor as JSON in it.
Loading runs no code unless the caller allows pickle."""

from __future__ import annotations

import json
import os
import pickle
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict import TensorDict

from protocol import checks
from protocol.columns import (
    as_object_array,
    flat_bytes,
    from_strided_parts,
    is_strided,
    jagged,
    jagged_parts,
    ragged_mark,
    strided_parts,
)
from protocol.dense import is_plain
from protocol.errors import BatchTypeError, StorageError
from protocol.keyed import leaves

__all__ = ["STORAGE_VERSION", "load", "save"]

STORAGE_VERSION = 1

_Entry: TypeAlias = "dict[str, Any]"  # how one value is stored; JSON, and names of tensors

_FORMAT = "single_controller.DataProto"
_INDEX = "index"  # the tensor that holds the JSON; the header of a safetensors file is too small
# Other dtypes are stored as bytes.
_FLOATS = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"]
_NATIVE = [*_FLOATS, "bool", "uint8", "int8", "int16", "int32", "int64"]
_DAMAGE = (
    *(SafetensorError, OSError, EOFError, pickle.UnpicklingError),
    *(AttributeError, LookupError, RuntimeError, TypeError, ValueError),
)


def save(
    filepath: str | Path,
    batch: TensorDict | None,
    non_tensor_batch: Mapping[str, np.ndarray[Any, Any]],
    meta_info: Mapping[str, Any],
    allow_pickle: bool = False,
) -> None:
    """Write a batch to one file, which appears only when it is complete.

    Tensors, jagged tensors, numeric arrays and JSON values (None, bool, int, float, str, lists, and
    dicts with str keys) need nothing else; objects of other types need `allow_pickle`.

    Raises:
        StorageError: an object is not JSON, and pickle is not allowed.
        FileNotFoundError: there is no such directory.
    """
    path, writer = _path(filepath), _Writer(checks.flag("allow_pickle", allow_pickle))
    index = {
        "rows": None if batch is None else len(batch),
        "batch": [] if batch is None else writer.encode_all("batch", leaves(batch)),
        "non_tensor_batch": writer.encode_all("non_tensor_batch", non_tensor_batch),
        "meta_info": writer.encode_all("meta_info", meta_info),
    }
    tensors = {**writer.tensors, _INDEX: _as_bytes(json.dumps(index).encode())}
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no directory {path.parent} to save {path.name} in")
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, unfinished, {"format": _FORMAT, "version": str(STORAGE_VERSION)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(
    filepath: str | Path, allow_pickle: bool = False
) -> tuple[TensorDict | None, dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The `(batch, non_tensor_batch, meta_info)` of a file that `save` wrote, on the CPU.

    Args:
        allow_pickle: load pickled objects too. That can run any code: trust the file first.

    Raises:
        StorageError: the file is not a batch, is damaged or of another version, or it holds
            pickled objects and they are not allowed.
        FileNotFoundError: there is no file.
    """
    path, allow_pickle = _path(filepath), checks.flag("allow_pickle", allow_pickle)
    if not path.is_file():
        raise FileNotFoundError(f"no batch to load at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise StorageError(f"{path} is a safetensors file, but not one that holds a batch")
            if header.get("version") != str(STORAGE_VERSION):
                raise StorageError(
                    f"{path} has storage version {header.get('version')}, but this library reads "
                    f"{STORAGE_VERSION}: load it with the version that wrote it"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        index = json.loads(tensors[_INDEX].numpy().tobytes())
        reader = _Reader(path, tensors, allow_pickle)
        columns = reader.decode_all("batch", index["batch"])
        batch = None if index["rows"] is None else TensorDict(columns, [index["rows"]])
        arrays = reader.decode_all("non_tensor_batch", index["non_tensor_batch"])
        return batch, arrays, reader.decode_all("meta_info", index["meta_info"])
    except StorageError:
        raise
    except _DAMAGE as error:
        raise StorageError(
            f"{path} is not a batch that save_to_disk wrote, or it is damaged: {error}"
        ) from error


def _path(filepath: object) -> Path:
    if not isinstance(filepath, (str, os.PathLike)) or not Path(filepath).name:
        raise BatchTypeError(f"filepath must be the path of a file; got {filepath!r:.80}")
    return Path(filepath)


class _Writer:
    """Collects tensors and says, in JSON, how to put values together from them."""

    def __init__(self, allow_pickle: bool) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.offsets: dict[Any, _Entry] = {}  # columns that have them in common name the same
        self.allow_pickle = allow_pickle

    def encode_all(self, part: str, values: Mapping[Any, Any]) -> list[tuple[Any, _Entry]]:
        for key in values:
            if not _is_json_key(key):
                raise StorageError(
                    f"{part} has the key {key!r:.80}, but only texts, numbers, None and tuples of "
                    "these can be keys in a file: rename or pop it"
                )
        return [(key, self._encode(f"{part}[{key!r}]", value)) for key, value in values.items()]

    def _encode(self, name: str, value: Any) -> _Entry:
        if is_strided(value):
            elements, shapes = strided_parts(value.detach())
            entry = {"kind": "strided", "elements": self._encode(name, elements), "shapes": shapes}
            return {**entry, "requires_grad": value.requires_grad}
        if isinstance(value, torch.Tensor) and value.is_nested:
            values, offsets, ragged_idx = jagged_parts(value.detach())
            mark = ragged_mark(value)
            if mark not in self.offsets:
                self.offsets[mark] = self._encode(name, offsets)
            return {
                "kind": "jagged",
                "values": self._encode(name, values),
                "offsets": self.offsets[mark],
                "ragged_idx": ragged_idx,
                "requires_grad": value.requires_grad,
            }
        if isinstance(value, torch.Tensor) and is_plain(value):
            dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
            tensor = value.detach().resolve_conj().resolve_neg().cpu()
            if dtype not in _NATIVE:
                tensor = flat_bytes(tensor)
            entry = {"kind": "tensor", "at": self._add(name, tensor), "dtype": dtype}
            return {**entry, "shape": shape, "requires_grad": value.requires_grad}
        if type(value) is np.ndarray and value.dtype.kind in "biufcmMSU":
            data = self._add(name, _as_bytes(value.tobytes()))
            return {"kind": "array", "at": data, "dtype": value.dtype.str, "shape": value.shape}
        if type(value) is np.ndarray and value.dtype.kind == "O":
            items = value.ravel().tolist()
            if _is_json(items):
                return {"kind": "objects", "shape": value.shape, "items": items}
        if _is_json(value):
            return {"kind": "json", "value": value}
        if not self.allow_pickle:
            raise StorageError(
                f"{name} holds objects that are not JSON ({_odd_type(value)}): make them JSON, or "
                "pass allow_pickle=True here and to load_from_disk"
            )
        try:
            pickled = pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise StorageError(f"{name} cannot be pickled: {error}") from error
        return {"kind": "pickle", "at": self._add(name, _as_bytes(pickled))}

    def _add(self, name: str, tensor: torch.Tensor) -> str:
        at = f"{len(self.tensors)} {name}"
        self.tensors[at] = tensor.clone(memory_format=torch.contiguous_format)  # no shared memory
        return at


class _Reader:
    """Puts values together again from what `_Writer` noted."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], allow_pickle: bool) -> None:
        self.path, self.tensors, self.allow_pickle = path, tensors, allow_pickle
        self.offsets: dict[str, torch.Tensor] = {}

    def decode_all(self, part: str, entries: list[tuple[Any, _Entry]]) -> dict[Any, Any]:
        return {_key(key): self._decode(f"{part}[{key!r}]", entry) for key, entry in entries}

    def _decode(self, name: str, entry: _Entry) -> Any:
        kind = entry["kind"]
        if kind == "tensor":
            dtype: torch.dtype = getattr(torch, entry["dtype"])
            tensor = self.tensors[entry["at"]]
            if tensor.dtype != dtype:
                tensor = tensor.view(dtype)
            return tensor.reshape(entry["shape"]).requires_grad_(entry["requires_grad"])
        if kind == "jagged":
            values, at = self._decode(name, entry["values"]), entry["offsets"]["at"]
            if at not in self.offsets:
                self.offsets[at] = self._decode(name, entry["offsets"])
            column = jagged(values, self.offsets[at], entry["ragged_idx"])
            return column.requires_grad_(entry["requires_grad"])
        if kind == "strided":
            column = from_strided_parts(self._decode(name, entry["elements"]), entry["shapes"])
            return column.requires_grad_(entry["requires_grad"])
        if kind == "array":
            data = self.tensors[entry["at"]].numpy()
            return np.frombuffer(bytearray(data), entry["dtype"]).reshape(entry["shape"])
        if kind == "objects":
            return as_object_array(entry["items"]).reshape(entry["shape"])
        if kind == "json":
            return entry["value"]
        if kind != "pickle":
            raise StorageError(f"{self.path}: {name} is stored in an unknown way, {kind!r}")
        if not self.allow_pickle:
            raise StorageError(
                f"{self.path}: {name} holds pickled objects, and loading those can run any code. "
                "If you trust the file, pass allow_pickle=True to load_from_disk"
            )
        return pickle.loads(self.tensors[entry["at"]].numpy().tobytes())


def _as_bytes(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def _is_json_key(key: object) -> bool:
    if type(key) is tuple:
        return all(map(_is_json_key, key))
    return key is None or type(key) in (bool, int, float, str)


def _key(key: Any) -> Any:
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _is_json(value: object) -> bool:
    """Whether JSON brings back exactly this value."""
    try:
        json.dumps(value)  # refuses cycles, so that the walk below ends
    except (TypeError, ValueError, RecursionError):
        return False
    return _odd_type(value) is None


def _odd_type(value: Any) -> str | None:
    """The type of something in the value that JSON cannot bring back; None if there is nothing."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.ravel().tolist()
    if type(value) is dict:
        if any(type(key) is not str for key in value):
            return "dict with keys that are not str"
        value = list(value.values())
    if type(value) is list:
        return next((odd for odd in map(_odd_type, value) if odd), None)
    if value is None or type(value) in (bool, int, float, str):
        return None
    return type(value).__name__
