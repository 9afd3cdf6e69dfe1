"""A batch as bytes: in one file, safetensors with everything that is not a tensor as JSON in it, or
as plain tuples for serializers that know no torch (msgpack). Loading runs no code unless the caller
allows pickle.
"""

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
from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict

from protocol import columns, combine
from protocol.columns import is_plain, leaves
from protocol.errors import BatchTypeError, StorageError

__all__ = [
    "deserialize_single_tensor",
    "deserialize_tensordict",
    "load",
    "save",
    "serialize_single_tensor",
    "serialize_tensordict",
]

_Entry: TypeAlias = "dict[str, Any]"  # how one value is stored; JSON, and names of tensors
_Known: TypeAlias = "dict[bytes, torch.Tensor]"  # offsets by their bytes
_Bytes: TypeAlias = "tuple[str, tuple[int, ...], memoryview]"

_HEADER = {"format": "single_controller.DataProto", "version": "1"}
_INDEX = "index"  # the tensor that holds the JSON; the header of a safetensors file is too small


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
        TypeError: a key of meta_info is not JSON, nor a tuple of what is.
    """
    path, values = Path(filepath), _Values({}, allow_pickle)
    index = {
        "rows": None if batch is None else len(batch),
        "batch": values.encode_all("batch", {} if batch is None else leaves(batch)),
        "non_tensor_batch": values.encode_all("non_tensor_batch", non_tensor_batch),
        "meta_info": values.encode_all("meta_info", meta_info),
    }
    tensors = {**values.tensors, _INDEX: _as_tensor(json.dumps(index).encode())}
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, unfinished, _HEADER)
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
    path = Path(filepath)
    try:
        with safe_open(path, framework="pt") as file:
            if (header := file.metadata() or {}) != _HEADER:
                raise StorageError(
                    f"{path} is a safetensors file, but not one that this library reads: its "
                    f"header is {header}, and must be {_HEADER}"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        index = json.loads(tensors[_INDEX].numpy().tobytes())
        values = _Values(tensors, allow_pickle)
        found = values.decode_all("batch", index["batch"])
        batch = None if index["rows"] is None else TensorDict(found, [index["rows"]])
        arrays = values.decode_all("non_tensor_batch", index["non_tensor_batch"])
        return batch, arrays, values.decode_all("meta_info", index["meta_info"])
    except (StorageError, FileNotFoundError):
        raise
    except Exception as error:  # whatever wrong bytes lead to
        raise StorageError(
            f"{path} is not a batch that save_to_disk wrote, or it is damaged: {error}"
        ) from error


class _Values:
    """Values as JSON, which says how to put each together from tensors that have names."""

    def __init__(self, tensors: dict[str, torch.Tensor], allow_pickle: bool) -> None:
        self.tensors, self._allow_pickle = tensors, allow_pickle is True
        self._known: _Known = {}

    def encode_all(self, part: str, values: Mapping[Any, Any]) -> list[tuple[Any, _Entry]]:
        return [(key, self._encode(f"{part}[{key!r}]", value)) for key, value in values.items()]

    def decode_all(self, part: str, entries: list[tuple[Any, _Entry]]) -> dict[Any, Any]:
        return {_key(key): self._decode(f"{part}[{key!r}]", entry) for key, entry in entries}

    def _encode(self, name: str, value: Any) -> _Entry:
        if columns.is_jagged(value):
            values, offsets, ragged_idx = columns.jagged_parts(value)
            parts = {"values": self._encode(name, values), "offsets": self._encode(name, offsets)}
            return {"kind": "jagged", **parts, "ragged_idx": ragged_idx}
        if isinstance(value, torch.Tensor) and is_plain(value):
            tensor = value.detach().resolve_neg().cpu()  # of complex ones safetensors has no dtype
            at = self._add(name, columns.flat_bytes(tensor) if tensor.is_complex() else tensor)
            dtype = str(value.dtype).removeprefix("torch.")
            return {"kind": "tensor", "at": at, "dtype": dtype, "shape": list(value.shape)}
        kind = value.dtype.kind if type(value) is np.ndarray else ""
        if kind and kind in "biufcmMSU":
            at = self._add(name, _as_tensor(value.tobytes()))
            return {"kind": "array", "at": at, "dtype": value.dtype.str, "shape": value.shape}
        plain = value.ravel().tolist() if kind == "O" else value
        if _is_json(plain):
            if kind:
                return {"kind": "objects", "shape": value.shape, "items": plain}
            return {"kind": "json", "value": plain}
        if not self._allow_pickle:
            raise StorageError(
                f"{name} holds objects that are not JSON: make them JSON, or pass "
                "allow_pickle=True here and to load_from_disk"
            )
        return {"kind": "pickle", "at": self._add(name, _as_tensor(pickle.dumps(value)))}

    def _add(self, name: str, tensor: torch.Tensor) -> str:
        at = f"{len(self.tensors)} {name}"
        self.tensors[at] = tensor.clone(memory_format=torch.contiguous_format)  # no shared memory
        return at

    def _decode(self, name: str, entry: _Entry) -> Any:
        kind, shape = entry["kind"], entry.get("shape")
        if kind == "json":
            return entry["value"]
        if kind == "objects":
            return columns.as_object_array(entry["items"]).reshape(shape)
        if kind == "jagged":
            values, offsets = (self._decode(name, entry[part]) for part in ("values", "offsets"))
            return _jagged(self._known, values, offsets, entry["ragged_idx"])
        tensor = self.tensors[entry["at"]]
        if kind == "tensor":
            dtype = getattr(torch, entry["dtype"])
            return (tensor if tensor.dtype == dtype else tensor.view(dtype)).reshape(shape)
        if kind == "array":
            return np.frombuffer(bytearray(tensor.numpy()), entry["dtype"]).reshape(shape)
        if not self._allow_pickle:
            raise StorageError(
                f"{name} holds pickled objects, and loading those can run any code. If you trust "
                "the file, pass allow_pickle=True to load_from_disk"
            )
        return pickle.loads(tensor.numpy().tobytes())


def _is_json(value: object) -> bool:
    """Whether JSON gives an equal value back."""
    try:
        return combine.equal(json.loads(json.dumps(value)), value)
    except (TypeError, ValueError, RecursionError):  # of another type, a cycle, too long a number
        return False


def _jagged(known: _Known, values: torch.Tensor, offsets: torch.Tensor, idx: int) -> torch.Tensor:
    """Columns with equal offsets have the same, for torch to let them be combined."""
    return columns.jagged(values, known.setdefault(offsets.numpy().tobytes(), offsets), idx)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def _key(key: Any) -> Any:
    return tuple(map(_key, key)) if isinstance(key, list) else key


def serialize_single_tensor(obj: torch.Tensor) -> _Bytes:
    """`(dtype, shape, bytes)` of a dense tensor; the bytes are a view of a contiguous CPU tensor.

    >>> serialize_single_tensor(torch.zeros(2, 3))[:2]
    ('float32', (2, 3))
    """
    if obj.layout is not torch.strided or obj.is_nested:
        raise BatchTypeError(
            "a dense tensor is needed: serialize_tensordict also takes jagged ones"
        )
    data = columns.flat_bytes(obj).numpy().data
    return str(obj.dtype).removeprefix("torch."), tuple(obj.shape), data


def deserialize_single_tensor(arr: Any) -> torch.Tensor:
    """The tensor that `serialize_single_tensor` took apart, in its own writable memory."""
    name, shape, data = arr
    flat, dtype = torch.from_numpy(np.frombuffer(data, np.uint8).copy()), getattr(torch, name)
    return (flat.view(dtype) if len(flat) else flat.to(dtype)).reshape(tuple(shape))


def serialize_tensordict(
    batch: TensorDict,
) -> tuple[tuple[int, ...], str | None, dict[str, tuple[Any, ...]]]:
    """`(batch_size, device, tensors)`, each tensor as `serialize_single_tensor` makes it.

    A jagged one becomes `("jagged", values, offsets, ragged_idx)`.
    """
    device = None if batch.device is None else str(batch.device)
    tensors = {key: _taken_apart(tensor.detach()) for key, tensor in leaves(batch).items()}
    return tuple(batch.batch_size), device, tensors


def _taken_apart(tensor: torch.Tensor) -> tuple[Any, ...]:
    if not columns.is_jagged(tensor):
        return serialize_single_tensor(tensor)
    values, offsets, ragged_idx = columns.jagged_parts(tensor)
    return "jagged", serialize_single_tensor(values), serialize_single_tensor(offsets), ragged_idx


def deserialize_tensordict(arr: Any) -> TensorDict:
    """The TensorDict that `serialize_tensordict` took apart."""
    batch_size, device, tensors = arr
    known: _Known = {}
    made = {key: _put_together(packed, known) for key, packed in tensors.items()}
    return TensorDict(made, tuple(batch_size), device=device)


def _put_together(packed: Any, known: _Known) -> torch.Tensor:
    if packed[0] != "jagged":
        return deserialize_single_tensor(packed)
    values, offsets = map(deserialize_single_tensor, packed[1:3])
    return _jagged(known, values, offsets, packed[3])
