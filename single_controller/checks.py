"""What a caller may pass: each check names an argument, what it must be and what came.

What arguments mean together is checked where they are used; batches have `protocol.checks`.
"""

from __future__ import annotations

import threading
from numbers import Integral, Real
from typing import Any

__all__ = ["amount", "count", "function", "instance", "interval", "is_whole", "seconds"]


def instance(
    kind: type[Any] | tuple[type[Any], ...], name: str, value: object, wanted: str
) -> None:
    """An instance of `kind`, in words `wanted`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}; got {value!r}")


def function(name: str, value: object) -> None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, or None; got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, also one of numpy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def count(name: str, value: Any) -> None:
    """A whole number above 0."""
    if not (is_whole(value) and value >= 1):
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")


def amount(name: str, value: Any) -> None:
    """A number above 0."""
    if not (_is_number(value) and value > 0):
        raise ValueError(f"{name} must be a number, more than 0; got {value!r}")


def seconds(name: str, value: Any, optional: bool = True) -> None:
    """A time that may be 0 or, where it is `optional`, None."""
    if not ((_is_number(value) and value >= 0) or (optional and value is None)):
        wanted = "at least 0, or None" if optional else "at least 0"
        raise ValueError(f"{name} must be seconds, {wanted}; got {value!r}")


def interval(name: str, value: Any) -> None:
    """Seconds that a thread can wait again and again."""
    if not (_is_number(value) and 0 < value <= threading.TIMEOUT_MAX):
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
