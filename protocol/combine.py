"""Dicts of columns, and meta_info: joining those of several batches, comparing and describing them;
errors name the key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from tensordict import (
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_tensor_collection,
)

from protocol import columns
from protocol.checks import short
from protocol.columns import Array
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ConflictError,
    MissingKeyError,
    RowCountError,
)

__all__ = [
    "METRICS",
    "PADDING",
    "added",
    "cat_columns",
    "cat_tensordicts",
    "deciding",
    "diff",
    "difference",
    "equal",
    "merge_meta",
    "require_keys",
    "require_same_keys",
    "union",
    "union_numpy_dict",
    "unwrapped",
]

METRICS = "metrics"
"""The one key whose values may differ between shards: they are collected into lists."""

PADDING = "_verl_auto_padding"
"""The key that says a batch may be padded to a number of rows that divides."""

# Join


def require_keys(keys: Iterable[str], part: Any, name: str) -> None:
    """Raise MissingKeyError unless all keys are in this part of a batch."""
    if missing := [key for key in keys if key not in part]:
        raise MissingKeyError(f"no {missing} in {name}, which has the keys {list(part)}")


def require_same_keys(parts: Sequence[Iterable[Any]], what: str, name: str) -> None:
    """Raise MissingKeyError unless all parts have the keys of the first."""
    first = set(parts[0])
    for i, keys in enumerate(map(set, parts)):
        if keys != first:
            lacks, adds = (sorted(map(str, some)) for some in (first - keys, keys - first))
            raise MissingKeyError(
                f"{what} must all have the same set of keys; "
                f"{name} {i} lacks {lacks} and adds {adds}, comparing {name} 0 and {name} {i}"
            )


def deciding(rows: Sequence[int], parts: Sequence[Iterable[Any]]) -> list[int]:
    """Which of several shards say what columns the whole has: those with rows. If there is none,
    those with columns; then all.
    """
    indices = range(len(rows))
    return [i for i in indices if rows[i]] or [i for i in indices if [*parts[i]]] or [*indices]


def cat_columns(shards: Sequence[Mapping[Any, Any]], name: str) -> dict[Any, Any]:
    """Concatenate the values of all shards, key by key."""
    require_same_keys(shards, "batches to concatenate", f"{name} of shard")
    whole = {}
    for key in shards[0]:
        try:
            whole[key] = _cat([shard[key] for shard in shards])
        except BatchError as error:
            raise type(error)(f"{name}[{key!r}]: {error}") from error
    return columns.combinable(whole, *shards)


def _cat(values: list[Any]) -> Any:
    first, kinds = values[0], {*map(type, values)}
    if kinds == {NonTensorData}:
        size = [sum(map(columns.rows, values)), *first.batch_size[1:]]
        return NonTensorData(first.data, batch_size=size)
    if kinds <= {NonTensorData, NonTensorStack}:
        return columns.stack([child for value in values for child in _children(value)])
    if all(isinstance(value, TensorDictBase) for value in values):
        return cat_tensordicts(values)
    return columns.cat(values)


def _children(value: Any) -> list[Any]:
    if isinstance(value, NonTensorStack):
        return list(value.unbind(0))
    return [NonTensorData(value.data) for _ in range(columns.rows(value))]


def cat_tensordicts(data: Sequence[TensorDictBase]) -> TensorDict:
    """All rows of all TensorDicts. Of an object that all rows share, the first one's stays; of a
    TensorDict without rows nothing does, if others have rows. Without batch dims the first stays.
    """
    if not any(td.batch_size for td in data):
        return columns.map_leaves(data[0], columns.twin)
    counts = [columns.rows(td, "a TensorDict to concatenate") for td in data]
    chosen = [data[i] for i in deciding(counts, [td.keys() for td in data])]
    first, values = chosen[0], [dict(td.items()) for td in chosen]
    size = [sum(counts), *first.batch_size[1:]]
    return columns.build(cat_columns(values, "batch"), size, first.device)


def union(
    a: Mapping[Any, Any], b: Mapping[Any, Any], names: str = "tensor_dict1 and tensor_dict2"
) -> dict[Any, Any]:
    """The keys of both, in a new dict; ConflictError if both have one, with different values."""
    for key, value in b.items():
        if key in a and not equal(a[key], value):
            raise ConflictError(
                f"`{key}` in {names} are not the same object. "
                f"{difference(a[key], value)}; pop or rename one of them"
            )
    return {**a, **b}


def added(a: TensorDictBase, b: TensorDictBase) -> dict[str, Any]:
    """What a union of two TensorDicts adds to the first."""
    if a.batch_size != b.batch_size:
        raise RowCountError(
            f"Two tensor dict must have identical batch size. Got {a.batch_size} and {b.batch_size}"
        )
    have = unwrapped(a)
    return {key: b.get(key) for key in union(have, unwrapped(b)) if key not in have}


def unwrapped(td: TensorDictBase) -> dict[str, Any]:
    """The values of a TensorDict as users see them: lists of objects, and shared objects."""
    return {str(key): columns.unwrapped(value) for key, value in td.items()}


def union_numpy_dict(
    tensor_dict1: dict[str, Array], tensor_dict2: dict[str, Array]
) -> dict[str, Array]:
    """`tensor_dict1`, to which the keys of `tensor_dict2` are added in place; ConflictError if both
    have one, with different values: then nothing is added.
    """
    tensor_dict1.update(union(tensor_dict1, tensor_dict2))
    return tensor_dict1


def merge_meta(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The meta_info of concatenated shards, in a new dict.

    Under "metrics", each shard may hold a dict, a list of dicts or None; they become one dict of
    lists, in shard order. Every other key must have equal values in all shards that have it.

        merge_meta([{"step": 1, "metrics": {"loss": 2.0}}, {"metrics": {"loss": 4.0}}])
        # {"step": 1, "metrics": {"loss": [2.0, 4.0]}}
    """
    merged: dict[str, Any] = {}
    metrics: dict[str, list[Any]] = {}
    first: dict[str, int] = {}
    for shard, meta in enumerate(metas):
        for key, value in meta.items():
            if key == METRICS:
                for name, metric in _metrics(value, shard):
                    metrics.setdefault(name, []).append(metric)
                if value is not None:
                    merged[METRICS] = metrics
            elif key not in merged:
                merged[key], first[key] = value, shard
            elif not equal(merged[key], value):
                raise ConflictError(
                    f"Conflicting values for meta_info key '{key}': {short(merged[key])} in shard "
                    f"{first[key]}, {short(value)} in shard {shard}. Make them equal, or report "
                    f"values that differ under '{METRICS}', which becomes a dict of lists"
                )
    return merged


def _metrics(value: Any, shard: int) -> Iterator[tuple[str, Any]]:
    for record in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(record, Mapping):
            raise BatchTypeError(
                f"meta_info '{METRICS}' must be a dict, a list of dicts or None; "
                f"shard {shard} has {short(value)}"
            )
        yield from record.items()


# Compare

_ATOMS = frozenset({str, bytes, int, bool, type(None)})


def equal(a: object, b: object) -> bool:
    """Deep equality in which NaN equals NaN and cycles end.

    Tensors and arrays are equal if dtype, shape and every element are; devices are ignored. Objects
    whose class has no `__eq__` are if what pickle would save of them is.
    """
    return _equal(a, b, set())


def _equal(a: Any, b: Any, visiting: set[tuple[int, int]]) -> bool:
    if type(a) in _ATOMS and type(a) is type(b):  # most of what object columns hold
        return bool(a == b)
    if a is b or (id(a), id(b)) in visiting:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _same_tensor(a, b)
    visiting.add((id(a), id(b)))
    try:
        if isinstance(a, (list, tuple)):
            pairs = zip(a, b, strict=False)
            same = type(a) is type(b) and len(a) == len(b)
            return same and all(_equal(x, y, visiting) for x, y in pairs)
        if isinstance(a, Mapping) or is_tensor_collection(a):
            return type(a) is type(b) and _same_dict(a, b, visiting)
        if type(a) is np.ndarray or type(b) is np.ndarray:
            return type(a) is type(b) and _same_array(a, b, visiting)
        with suppress(TypeError, ValueError, RuntimeError):  # an == that gives no truth value
            same = bool(a == b) or bool(a != a and b != b)  # only NaN is not itself
            no_eq: Any = object.__eq__
            if same or type(a).__eq__ is not no_eq:
                return same
        return _same_state(a, b, visiting)
    finally:
        visiting.discard((id(a), id(b)))


def _same_dict(a: Any, b: Any, visiting: set[tuple[int, int]]) -> bool:
    size, other = (getattr(part, "batch_size", None) for part in (a, b))
    keys = {*a.keys()}
    same = size == other and keys == {*b.keys()}
    return same and all(_equal(a[key], b[key], visiting) for key in keys)


def _same_array(a: Array, b: Array, visiting: set[tuple[int, int]]) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind == b.dtype.kind == "O":
        return _equal([*a.flat], [*b.flat], visiting)
    if a.dtype != b.dtype and not a.dtype.kind == b.dtype.kind in "US":
        return False
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM"))


def _same_state(a: Any, b: Any, visiting: set[tuple[int, int]]) -> bool:
    """Whether pickle would save the same of both."""
    try:
        return type(a) is type(b) and _equal(a.__reduce_ex__(4), b.__reduce_ex__(4), visiting)
    except Exception:  # one cannot be pickled, for reasons of its own
        return False


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.layout != b.layout or a.dim() != b.dim():
        return False
    if a.is_nested and not columns.is_jagged(a):
        return b.is_nested and _equal([*a.unbind()], [*b.unbind()], set())
    if columns.is_jagged(a):
        return _equal(columns.jagged_parts(a), columns.jagged_parts(b), set())
    if a.shape != b.shape:
        return False
    if a.layout is not torch.strided:
        return _same_tensor(a.to_dense(), b.to_dense())
    a, b = a.detach(), b.detach().to(a.device)
    if a.element_size() == 1 and a.is_floating_point():  # float8 has no comparison
        a, b = a.to(torch.float32), b.to(torch.float32)
    exact = not (a.is_floating_point() or a.is_complex())
    return torch.equal(a, b) or (not exact and bool(((a == b) | ((a != a) & (b != b))).all()))


def diff(part: str, a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[str]:
    """One line for each key under which two dicts differ."""
    lines = [f"{part}[{key!r}]: only here" for key in a if key not in b]
    lines += [f"{part}[{key!r}]: only there" for key in b if key not in a]
    common = [key for key in a if key in b and not equal(a[key], b[key])]
    return lines + [f"{part}[{key!r}]: {difference(a[key], b[key])}" for key in common]


def difference(a: Any, b: Any) -> str:
    """How two unequal values differ, in one line: their kinds, or where the first elements do."""
    if not isinstance(a, (torch.Tensor, np.ndarray)) or not isinstance(b, type(a)) or not a.ndim:
        return f"{short(a)} here, {short(b)} there"
    here, there = columns.describe(a), columns.describe(b)
    if here == there and getattr(a, "layout", None) in (None, torch.strided, torch.jagged):
        for at, pair in enumerate(zip(a, b, strict=True)):
            if not equal(*pair):
                return f"at {at}: {difference(*pair)}"
    return f"{here} here, {there} there"
