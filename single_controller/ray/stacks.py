"""What faulthandler wrote about a process, read: the threads that matter, and what they wait for.

Getting it written is left to `process`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import ray

__all__ = ["collective", "readable"]

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')
_COLLECTIVES = ("/torch/distributed/", "/ray/util/collective/")
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_OURS = (_PACKAGE + os.sep, os.path.dirname(ray.__file__) + os.sep)
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = ("/site-packages/", "/dist-packages/")
_MAIN = "/default_worker.py"  # where Ray's processes start
_SERVES = ("actor_method_executor", "async_func", "async_method_executor")  # Ray's side of a call


@dataclass(frozen=True)
class _Frame:
    file: str
    line: str
    name: str

    @property
    def is_machinery(self) -> bool:
        """Whether it is Ray's, this package's or Python's own."""
        python = self.file.startswith(_LIBRARY) and not any(i in self.file for i in _INSTALLED)
        return python or self.file.startswith(("<", *_OURS))


def _threads(dump: str) -> Iterator[list[_Frame]]:
    """The frames of each thread, the innermost first, as faulthandler writes them; of one that was
    asked for its stack twice, the last ones.
    """
    parts = re.split(r"\n(?=Thread 0x|Current thread 0x)", dump)
    for part in {_thread_id(part): part for part in parts}.values():
        frames = [_Frame(**match.groupdict()) for match in _FRAME.finditer(part)]
        if frames:
            yield frames


def _thread_id(part: str) -> str:
    found = re.search("hread (0x[0-9a-f]+)", part)
    return found[1] if found else ""


def readable(dump: str) -> str:
    """The main thread and those that run the user's code, the innermost frame first.

    Frames below a call's start are Ray's and this package's; they are left out, and so are
    threads that only serve.
    """
    shown = []
    for frames in _threads(dump):
        main = frames[-1].file.endswith(_MAIN)
        if all(frame.is_machinery for frame in frames) and not main:
            continue
        served = next((i for i, f in enumerate(frames) if f.name in _SERVES), len(frames))
        if main and served == len(frames):
            continue  # between calls
        lines = [f'  File "{f.file}", line {f.line}, in {f.name}' for f in frames[:served]]
        while len(lines) > 1 and frames[len(lines) - 1].is_machinery:
            lines.pop()
        shown.append("\n".join(lines))
    if shown:
        return "\n  -- another thread --\n".join(reversed(shown))
    return dump.strip() if "File" not in dump else "  in no call"


def collective(dump: str) -> str | None:
    """The stack of a thread that waits in a collective, or to meet for one; None if none does.

    Only the innermost frame counts: a model wrapped by torch.distributed computes inside its
    frames. Waiting in the user's own frame, such as `tensor.item()` after an asynchronous
    collective, cannot be told from computing.
    """
    for frames in _threads(dump):
        if any(part in frames[0].file for part in _COLLECTIVES):
            return str(frames)
    return None
