"""The address that `torch.distributed` meets at: bound before it is published, kept for good.

Who learns the address is left to the backends.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from single_controller.errors import ResourceError

__all__ = ["Rendezvous"]

_ALONE_S = 10.0  # how long ranks that meet without this one wait for it to import torch
_POLL_S = 0.01


class Rendezvous:
    """A port held in rank 0's process, and the store that listens on it.

    The socket is bound at once, so that no other program can take the port between its choice
    and its use; torch is needed only once a rank comes to the store.

    Args:
        address: what the other ranks connect to.
        port: the port to bind; 0 lets the system choose.
        port_range: `[first, last]`: bind the first free port of these instead.

    Raises:
        ResourceError: the port, or every port of the range, is taken.
    """

    def __init__(
        self, address: str, port: int = 0, port_range: Sequence[int] | None = None
    ) -> None:
        self.address = address
        ports = [port] if port_range is None else range(port_range[0], port_range[-1] + 1)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._store: Any = None
        for candidate in ports:
            with contextlib.suppress(OSError, OverflowError):
                self._socket.bind(("", candidate))
                self._socket.listen(2048)
                self.port: int = self._socket.getsockname()[1]
                return
        self._socket.close()
        asked = f"master_port {port}" if port_range is None else f"master_port_range {port_range}"
        raise ResourceError(
            f"{asked} cannot be bound on {address}, being taken or no port at all. Name a free "
            "port, or none to let the system choose one"
        )

    def close(self) -> None:
        """Give the port back, unless a store serves it."""
        self._socket.close()

    def serve(self) -> None:
        """Let ranks join a store from now on. It starts when the first one connects, in a thread:
        workers that never meet need no torch, which takes seconds to import.
        """
        threading.Thread(target=self._serve, daemon=True, name="rendezvous").start()

    def _serve(self) -> None:
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        waiting.poll()
        store, listening = _store_class(), self._socket.detach()
        try:
            self._store = store(
                self.address,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(minutes=5),
                master_listen_fd=listening,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(listening)  # ranks are refused, rather than wait
            raise


def _store_class() -> Any:
    """`TCPStore`, once this rank's own code has imported torch: two threads that import it at once
    may dead-lock. Only where that code has not begun to within `_ALONE_S` is it imported here.
    """
    began = time.monotonic()
    while "torch" in sys.modules or time.monotonic() - began < _ALONE_S:
        found = getattr(sys.modules.get("torch.distributed"), "TCPStore", None)
        if found is not None:
            return found
        time.sleep(_POLL_S)
    import torch  # not a part of it: this one waits for who imports torch, and holds nothing

    return torch.distributed.TCPStore  # type: ignore[attr-defined]
