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

_Known: TypeAlias = "dict[bytes, torch.Tensor]"  # offsets by their bytes
_Bytes: TypeAlias = "tuple[str, tuple[int, ...], memoryview]"

_HEADER = {"format": "single_controller.DataProto", "version": "2"}
_INDEX = "index"  # the tensor that holds the JSON; the header of a safetensors file is too small


def save(
    filepath: str | Path,
    batch: TensorDict | None,
    non_tensor_batch: Mapping[str, np.ndarray[Any, Any]],
    meta_info: Mapping[str, Any],
    allow_pickle: bool = False,
) -> None:
    """Write a batch to one file, which appears only when it is complete.

    Tensors, jagged columns, numeric arrays and JSON values (None, bool, int, float, str, lists, and
    dicts with str keys) need nothing else; objects of other types need `allow_pickle`. Tensors come
    back without `requires_grad`, and numbers of subclasses, such as numpy's, as Python's own.

    Raises:
        StorageError: an object is not JSON, and pickle is not allowed.
    """
    path, blocks = Path(filepath), _Blocks()
    rest: Any = {"non_tensor_batch": dict(non_tensor_batch), "meta_info": dict(meta_info)}
    parts = [(name, key, value) for name in rest for key, value in rest[name].items()]
    if odd := [f"{name}[{key!r}]" for name, key, value in parts if not _is_json({key: value})]:
        if allow_pickle is not True:
            raise StorageError(
                f"{odd[0]} holds objects that are not JSON: make them JSON, or pass "
                "allow_pickle=True here and to load_from_disk"
            )
        rest = {"pickle": memoryview(pickle.dumps(rest))}
    packed = None if batch is None else serialize_tensordict(batch)
    shown = None if packed is None else [packed[0], [*packed[2].items()]]
    index = blocks.dumps([shown, rest]).encode()
    tensors = {str(i): block for i, block in enumerate(blocks)}
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file({**tensors, _INDEX: _as_tensor(index)}, unfinished, _HEADER)
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
            count = len(file.keys()) - 1
            blocks = _Blocks(file.get_tensor(str(i)) for i in range(count))
            packed, rest = blocks.loads(file.get_tensor(_INDEX).numpy().tobytes())
            if "pickle" in rest and allow_pickle is not True:
                raise StorageError(
                    f"{path} holds pickled objects, and loading those can run any code. If you "
                    "trust the file, pass allow_pickle=True to load_from_disk"
                )
            rest = pickle.loads(rest["pickle"]) if "pickle" in rest else rest
            if packed is not None:  # a key of a nested TensorDict is a tuple
                found = {tuple(k) if isinstance(k, list) else k: v for k, v in packed[1]}
                packed = deserialize_tensordict([packed[0], None, found])
            return packed, rest["non_tensor_batch"], rest["meta_info"]
    except (StorageError, FileNotFoundError):
        raise
    except Exception as error:  # whatever wrong bytes lead to
        raise StorageError(
            f"{path} is not a batch that save_to_disk wrote, or it is damaged: {error}"
        ) from error


class _Blocks(list[torch.Tensor]):
    """The bytes beside a JSON text, which names each block of them by its place."""

    def dumps(self, value: object) -> str:
        return json.dumps(value, default=self._packed)

    def loads(self, text: str | bytes) -> Any:
        return json.loads(text, object_hook=self._unpacked)

    def _packed(self, value: Any) -> Any:
        """JSON for what JSON has no word for."""
        if isinstance(value, memoryview):
            self.append(_as_tensor(value))
            return {"$block": len(self) - 1}
        if type(value) is np.ndarray and value.dtype.kind == "O":
            return {"$objects": value.ravel().tolist(), "shape": value.shape}
        if type(value) is np.ndarray and value.dtype.kind in "biufcmMSU":
            data = memoryview(value.tobytes())
            return {"$array": data, "dtype": value.dtype.str, "shape": value.shape}
        if isinstance(value, torch.Tensor) and is_plain(value):
            return {"$tensor": serialize_single_tensor(value.detach())}
        raise TypeError(type(value).__name__)

    def _unpacked(self, value: dict[str, Any]) -> Any:
        if value.keys() == {"$block"}:
            return self[value["$block"]].numpy().data
        if value.keys() == {"$tensor"}:
            return deserialize_single_tensor(value["$tensor"])
        if value.keys() == {"$objects", "shape"}:
            return columns.as_object_array(value["$objects"]).reshape(value["shape"])
        if value.keys() == {"$array", "dtype", "shape"}:
            return np.frombuffer(bytearray(value["$array"]), value["dtype"]).reshape(value["shape"])
        return value


def _is_json(value: object) -> bool:
    """Whether a value comes back equal."""
    blocks = _Blocks()
    try:
        return combine.equal(blocks.loads(blocks.dumps(value)), value)
    except Exception:  # JSON refuses a type, a cycle, ...; or a dict looks like ours
        return False


def _as_tensor(data: bytes | memoryview) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def serialize_single_tensor(obj: torch.Tensor) -> _Bytes:
    """`(dtype, shape, bytes)` of a dense tensor; the bytes are a view of a contiguous CPU tensor.

    >>> serialize_single_tensor(torch.zeros(2, 3))[:2]
    ('float32', (2, 3))
    """
    if obj.layout is not torch.strided:
        raise BatchTypeError("serialize_single_tensor needs a dense tensor")
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
    # Columns with equal offsets have the same, for torch to let them be combined.
    offsets = known.setdefault(offsets.numpy().tobytes(), offsets)
    return columns.jagged(values, offsets, packed[3])
