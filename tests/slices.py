"""What the file of a trace holds, for tests of what it is to hold."""

from __future__ import annotations

import json
from typing import Any

from single_controller import trace

__all__ = ["processes", "slices"]


def slices(recorded: trace, *parts: str) -> list[dict[str, Any]]:
    """Of each part of a call, and of each of the user's spans, where it begins, with its `dur`."""
    events = json.loads(recorded.path.read_text())["traceEvents"]
    found = [event for event in events if event.get("part", "call") != "call"]
    return [event for event in found if not parts or event["part"] in parts]


def processes(recorded: trace) -> dict[int, str]:
    """The processes' names."""
    events = recorded.content["traceEvents"]
    return {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
