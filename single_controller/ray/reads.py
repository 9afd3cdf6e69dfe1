"""Finds a method that wrote into arguments which it was registered to read only.

numpy refuses such writes; torch does not know of them, and the memory may be that of other ranks,
or of the role that made it. With `SINGLE_CONTROLLER_CHECK_READS=1` in the worker's environment
every tensor is summed up before and after a call, which takes time and is meant for debugging.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from single_controller.errors import SharedMemoryWriteError

__all__ = ["Reads", "checks_reads"]


def checks_reads() -> bool:
    """Whether this process is to check what methods write."""
    return os.environ.get("SINGLE_CONTROLLER_CHECK_READS", "") not in ("", "0")


class Reads:
    """The tensors among some arguments as they were."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        named = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
        self._before = [
            (f"{name}{path}", tensor, _checksum(tensor))
            for name, value in named.items()
            for path, tensor in _tensors(value)
        ]

    def check(self, title: str) -> None:
        """Raise SharedMemoryWriteError, naming the method as `title`, where one has changed."""
        changed = [name for name, tensor, before in self._before if _checksum(tensor) != before]
        if changed:
            raise SharedMemoryWriteError(
                f"{title} is registered with reads_only=True, and has written into "
                f"{', '.join(changed)}, which others read too: write into a copy, x.clone(), or "
                "register it without reads_only"
            )


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors in a value, each with the way to it; none where torch is not loaded."""
    if "torch" not in sys.modules:
        return
    if isinstance(value, sys.modules["torch"].Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")
    elif hasattr(value, "non_tensor_batch"):
        yield from _tensors(value.batch, f"{path}.batch")
        yield from _tensors(value.meta_info, f"{path}.meta_info")
    elif hasattr(value, "items"):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")


def _checksum(tensor: Any) -> int:
    from protocol.columns import elements, flat_bytes, is_nested

    dense = elements(tensor) if is_nested(tensor) else tensor
    return zlib.crc32(flat_bytes(dense).numpy().data)
