"""Where the batches of a future are published, for whoever pickles that future."""

from __future__ import annotations

import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ray import cloudpickle

__all__ = ["NO_OFFERS", "Posted", "offered", "offering"]

NO_OFFERS: Mapping[str, Any] = {}
_offers: ContextVar[Mapping[str, Any] | None] = ContextVar("_offers", default=None)


@contextmanager
def offering(offers: Mapping[str, Any]) -> Generator[None, None, None]:
    """Within this context, futures are pickled with these references, by token."""
    token = _offers.set(offers)
    try:
        yield
    finally:
        _offers.reset(token)


def offered() -> Mapping[str, Any] | None:
    """The references of this context; None outside of one."""
    return _offers.get()


class Posted:
    """A future with the references that go with it, which Ray has to see. One that is pickled in
    any other way has all of its batches published.
    """

    def __init__(self, future: Any, offers: Mapping[str, Any]) -> None:
        self._future, self._offers = future, offers

    def __reduce__(self) -> tuple[Any, ...]:
        with offering(self._offers):
            return pickle.loads, (cloudpickle.dumps(self._future),)
