"""`with trace("trace.json"):` what the driver and the workers do meanwhile, as one file.

What is noted is `spans`'; getting it from other processes is left to the backends.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from single_controller import checks
from single_controller.base import spans, telemetry
from single_controller.base.trace_file import ProcessTrace, write

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Source", "current", "trace"]

_logger = logging.getLogger(__name__)


class Source(Protocol):
    """Other processes that note spans; a backend has one for each set of them."""

    def harvest(self) -> tuple[Sequence[ProcessTrace], Sequence[str]]:
        """What they noted, and for each that does not answer what is missing, in words."""
        ...


class trace:  # noqa: N801 — used as a function, as contextlib's are
    """Record what driver and workers do within this context, and write it to a file.

    Perfetto (ui.perfetto.dev) and chrome://tracing open it;
    `python -m single_controller.timeline trace.json` sums it up and draws it. All times are on the
    driver's clock: on one machine processes share it, for other machines the difference is
    measured. Spans stay in their workers, the last `capacity` in each, until the context or the
    worker's group ends; what a worker noted that died is missing, and the file says so.

    Args:
        path: of the file, JSON.
        capacity: spans kept per process.
        tracer_provider: OpenTelemetry's, which gets the spans as well; by default the one that the
            program has set, if it has.

    Raises:
        ValueError: a trace is being recorded already.
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | Path, *, capacity: int = spans.CAPACITY, tracer_provider: Any = None
    ) -> None:
        checks.instance((str, os.PathLike), "path", path, "the path of a file to write")
        checks.count("capacity", capacity)
        self.path, self.capacity = Path(path), capacity
        self._provider = tracer_provider
        self.content: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._sources: dict[Hashable, Source] = {}
        self._found: list[ProcessTrace] = []
        self._missing: list[str] = []

    def __enter__(self) -> Self:
        global _current
        with _starting:
            if _current is not None:
                raise ValueError(f"a trace is being recorded already, to {_current.path}")
            with self.path.open("a", encoding="utf-8"):
                pass
            spans.record(self.capacity)
            _current = self
        return self

    def include(self, key: Hashable, make: Callable[[], Source]) -> None:
        """Ask the source that `make` makes, known by `key`, for its spans at the end."""
        if key not in self._sources:
            with self._lock:
                self._sources.setdefault(key, make())

    def leave(self, key: Hashable) -> None:
        """Ask a source for its spans now, because it is about to end."""
        with self._lock:
            source = self._sources.pop(key, None)
        if source is not None:
            self._take(source)

    def _take(self, source: Source) -> None:
        found, missing = source.harvest()
        self._found += found
        self._missing += missing
        for what in missing:
            _logger.warning("the trace lacks %s", what)

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        own = ProcessTrace("driver", spans.harvest())
        for key in list(self._sources):
            self.leave(key)
        processes = [own, *self._found]
        self.content = write(self.path, processes, self._missing)
        provider = self._provider or telemetry.program_provider()
        if provider is not None:
            telemetry.export(processes, provider)


_starting = threading.Lock()
_current: trace | None = None


def current() -> trace | None:
    """The trace that is being recorded."""
    return _current
