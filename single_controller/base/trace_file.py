"""A trace as a file for Perfetto and chrome://tracing: the events of all processes on one clock.

Recording is left to `spans` and `trace`, summing up to `timeline`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from single_controller.base.spans import Event, Harvest

__all__ = ["ProcessTrace", "chrome_events", "write"]

_CARRIED = {"dispatch": "bytes_out", "wait": "bytes_in"}
_QUEUED = 0  # stands for the thread that calls wait in


@dataclass(frozen=True)
class ProcessTrace:
    """A process's part of a trace. `offset_ns` is what its clock is ahead of the driver's, as far
    as `uncertainty_ns`.
    """

    name: str
    harvest: Harvest
    offset_ns: int = 0
    uncertainty_ns: int = 0

    def events(self) -> list[Event]:
        """The events on the driver's clock, those that count bytes left out.

        A call's time in the queue began on that clock already.
        """
        found = []
        for event in self.harvest.events:
            start, end = event.start_ns, event.start_ns + event.duration_ns - self.offset_ns
            if event.category != "queue":
                start -= self.offset_ns
            if event.category != "bytes":
                found.append(event._replace(start_ns=start, duration_ns=max(0, end - start)))
        return found

    def carried(self) -> dict[tuple[int, str], int]:
        """Bytes by call and direction."""
        found: dict[tuple[int, str], int] = {}
        for event in self.harvest.events:
            if event.category == "bytes":
                key = event.call, event.name
                found[key] = found.get(key, 0) + (event.details or {})["bytes"]
        return found


def chrome_events(processes: Sequence[ProcessTrace]) -> list[dict[str, Any]]:
    """The events in Chrome's format; times are in µs since the first one."""
    zero = min((e.start_ns for p in processes for e in p.events()), default=0)
    found: list[dict[str, Any]] = []
    for number, process in enumerate(processes):
        name = f"{process.name}, pid {process.harvest.pid}"
        found.append(_named("process_name", name, number, 0))
        order = {"sort_index": number}
        found.append({"ph": "M", "pid": number, "name": "process_sort_index", "args": order})
        found += _process_events(number, process, zero)
    return found + list(_arrows(found))


def _named(what: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


def _process_events(pid: int, process: ProcessTrace, zero: int) -> list[dict[str, Any]]:
    """A process's events, in as many lanes as its threads and what overlaps in them need."""
    carried = process.carried()
    by_thread: dict[int, list[Event]] = {}
    for event in process.events():
        thread = _QUEUED if event.category == "queue" else event.thread
        by_thread.setdefault(thread, []).append(event)
    found: list[dict[str, Any]] = []
    tid = 0
    for thread, events in sorted(by_thread.items()):
        name = "queued" if thread == _QUEUED else process.harvest.threads.get(thread, str(thread))
        for lane in _nested(events):
            found.append(_named("thread_name", name, pid, tid := tid + 1))
            for event in lane:
                shown = _complete(event, pid, tid, zero)
                direction = _CARRIED.get(event.category, "")
                if (event.call, direction) in carried:
                    shown["args"][direction] = carried[event.call, direction]
                found.append(shown)
    return found


def _complete(event: Event, pid: int, tid: int, zero: int) -> dict[str, Any]:
    args = dict(event.details or {})
    if event.call:
        args["call"] = event.call
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": event.name,
        "cat": event.category,
        "ts": (event.start_ns - zero) / 1_000,
        "dur": event.duration_ns / 1_000,
        "args": args,
    }


def _nested(events: Iterable[Event]) -> list[list[Event]]:
    """The events in lanes, in each of which two are apart or one lies in the other: coroutines of
    one thread overlap, and viewers draw only what nests.
    """
    lanes: list[list[Event]] = []
    open_ends: list[list[int]] = []
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        end = event.start_ns + event.duration_ns
        for lane, ends in zip(lanes, open_ends, strict=True):
            while ends and ends[-1] <= event.start_ns:
                ends.pop()
            if not ends or end <= ends[-1]:
                lane.append(event)
                ends.append(end)
                break
        else:
            lanes.append([event])
            open_ends.append([end])
    return lanes


def _arrows(events: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """From where the driver sends a call to where each rank runs it."""
    sent = {
        e["args"]["call"]: e for e in events if e.get("cat") == "dispatch" and e["args"].get("call")
    }
    for event in events:
        source = sent.get(event.get("args", {}).get("call")) if event.get("cat") == "run" else None
        if source is None:
            continue
        shared = {"cat": "call", "name": "call", "id": f"{source['args']['call']}:{event['pid']}"}
        at = source["ts"] + source["dur"]
        yield {**shared, "ph": "s", "pid": source["pid"], "tid": source["tid"], "ts": at}
        yield {
            **shared,
            "ph": "f",
            "bp": "e",
            "pid": event["pid"],
            "tid": event["tid"],
            "ts": event["ts"],
        }


def write(
    path: str | Path, processes: Sequence[ProcessTrace], missing: Sequence[str]
) -> dict[str, Any]:
    """Write the file; what it holds. `missing`: what is not in it, and why."""
    content = {
        "traceEvents": chrome_events(processes),
        "displayTimeUnit": "ms",
        "otherData": {
            "missing": list(missing),
            "dropped": {p.name: p.harvest.dropped for p in processes if p.harvest.dropped},
            "clock_uncertainty_us": {
                p.name: p.uncertainty_ns / 1_000 for p in processes if p.uncertainty_ns
            },
        },
    }
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    return content
