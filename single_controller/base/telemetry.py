"""A trace as OpenTelemetry spans: one for each call, with its parts on driver and workers below it.

What is exported where is decided by the program's own tracer provider.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from single_controller.base.spans import Event, now_ns
from single_controller.base.trace_file import ProcessTrace

__all__ = ["export", "program_provider"]


def program_provider() -> Any:
    """The provider that the program has set; None where it has not, or has no OpenTelemetry."""
    module = sys.modules.get("opentelemetry.trace")
    if module is None:
        return None
    provider = module.get_tracer_provider()
    return provider if hasattr(provider, "add_span_processor") else None


def export(processes: Sequence[ProcessTrace], provider: Any) -> None:
    """Give a trace's spans to a provider; what belongs to no call stands alone."""
    from opentelemetry.trace import set_span_in_context

    tracer = provider.get_tracer("single_controller")
    epoch = time.time_ns() - now_ns()
    parents = {}
    for number, (title, start, end) in _calls(processes).items():
        call = tracer.start_span(title, start_time=epoch + start, attributes={"call": number})
        parents[number] = set_span_in_context(call), call, epoch + end
    for process, event in _events(processes):
        attributes = {"process": process.name, **(event.details or {})}
        span = tracer.start_span(
            event.name if event.category == "user" else event.category,
            context=parents[event.call][0] if event.call in parents else None,
            start_time=epoch + event.start_ns,
            attributes=attributes,
        )
        span.end(epoch + event.start_ns + event.duration_ns)
    for _, call, end in parents.values():
        call.end(end)


def _events(processes: Sequence[ProcessTrace]) -> Iterator[tuple[ProcessTrace, Event]]:
    for process in processes:
        for event in process.events():
            yield process, event


def _calls(processes: Sequence[ProcessTrace]) -> dict[int, tuple[str, int, int]]:
    """Each call's name, its first start and its last end."""
    found: dict[int, tuple[str, int, int]] = {}
    for _, event in _events(processes):
        if event.call:
            start, end = event.start_ns, event.start_ns + event.duration_ns
            title, first, last = found.get(event.call, (event.name, start, end))
            found[event.call] = title, min(first, start), max(last, end)
    return found
