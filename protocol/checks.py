"""What a caller may pass: each check returns the argument, or names it, what it must be and what
came. What arguments mean together is checked where they are used."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from protocol.errors import BatchError, BatchTypeError

__all__ = [
    "count",
    "device",
    "flag",
    "instance",
    "key_list",
    "keys_or_key",
    "list_of",
    "mapping",
    "named",
    "seconds",
    "short",
    "tensordict",
]

_T = TypeVar("_T")


def short(value: object, width: int = 80) -> str:
    """The repr of a value on one line, cut to `width` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrong(name: str, wanted: str, value: object) -> BatchTypeError:
    return BatchTypeError(f"{name} must be {wanted}; got {type(value).__name__} {short(value)}")


def instance(kind: type[_T], name: str, value: object) -> _T:
    """`value`, which must be an instance of `kind`."""
    if not isinstance(value, kind):
        raise _wrong(name, f"of type {kind.__name__}", value)
    return value


def tensordict(name: str, value: object) -> TensorDict:
    """`value`, which must be a TensorDict of whatever kind."""
    if not isinstance(value, TensorDictBase):
        raise _wrong(name, "a TensorDict", value)
    return value


def device(name: str, value: object, used: bool) -> torch.device:
    """A device of torch's; with `used`, one that this process has."""
    try:
        found: torch.device = torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise BatchTypeError(
            f"{name} must be one of torch's, such as 'cuda:0'; got {short(value)}: {error}"
        ) from None
    try:
        if used:
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:  # all of them torch's own
        there = [
            f"{kind}:{i}"
            for kind in ("cuda", "npu", "xpu")
            if hasattr(torch, kind)
            for i in range(getattr(torch, kind).device_count())
        ]
        raise BatchError(
            f"{name} must be one that this process has: {', '.join(['cpu', *there])}; got '{found}'"
        ) from error
    return found


def list_of(kind: type[_T], name: str, values: object) -> Sequence[_T]:
    """A list or tuple of instances of `kind`."""
    if not isinstance(values, (list, tuple)):
        raise _wrong(name, f"a list of {kind.__name__}", values)
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise _wrong(f"{name}[{i}]", f"of type {kind.__name__}", value)
    return values


def mapping(name: str, value: object) -> dict[Any, Any]:
    """A mapping as a new dict; an empty one for None."""
    if type(value) is dict:
        return value.copy()
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, "a dict", value)
    return dict(value.items())  # a TensorDict iterates over its rows


def count(name: str, value: object, least: int | None = 0) -> int:
    """A whole number, also of numpy or torch, as an int that is at least `least`."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        whole = None
    if whole is None:
        raise _wrong(name, "a whole number", value)
    if least is not None and whole < least:
        raise BatchError(f"{name} must be at least {least}; got {whole}")
    return whole


def seconds(name: str, value: object) -> float:
    """A duration that is not negative."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, "a number of seconds", value)
    if not float(value) >= 0:
        raise BatchError(f"{name} must be at least 0 seconds; got {value}")
    return float(value)


def flag(name: str, value: object) -> bool:
    """True or False; also 1 and 0, and None for False."""
    if not isinstance(value, (bool, np.bool_, int, type(None))):
        raise _wrong(name, "True or False", value)
    return bool(value)


def named(name: str, key: object) -> Any:
    """A key of a TensorDict: a string, or a tuple of strings where TensorDicts are nested."""
    if isinstance(key, str) or (
        isinstance(key, tuple) and key and all(isinstance(k, str) for k in key)
    ):
        return key
    raise _wrong(name, "a string", key)


def key_list(name: str, keys: object) -> list[Any]:
    """Keys in a list, tuple, set or other iterable, each once; none for None.

    A single string is refused: its letters would be taken for keys.
    """
    if keys is None:
        return []
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise _wrong(name, "a list of keys", keys)
    try:
        return list(dict.fromkeys(keys))
    except (TypeError, RuntimeError):  # a key without a hash, a 0-dim array or TensorDict
        raise _wrong(name, "a list of keys", keys) from None


def keys_or_key(name: str, keys: object) -> tuple[Any, ...]:
    """Keys, of which a single one may come without a list."""
    if isinstance(keys, str):
        return (keys,)
    if keys is None:
        raise _wrong(name, "a key or a list of keys", keys)
    return tuple(key_list(name, keys))
