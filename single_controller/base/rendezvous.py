"""The address that `torch.distributed` meets at: bound before it is published, kept for good.

Who learns the address is left to the backends.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from single_controller.errors import ResourceError

__all__ = ["Rendezvous"]


class Rendezvous:
    """A port held in rank 0's process, and the store that listens on it.

    The socket is bound at once, so that no other program can take the port between its choice
    and its use; torch is needed, and imported, only by `serve`.

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
        """Start the store that ranks join. Ranks that connect earlier simply wait for it."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._store = TCPStore(
            self.address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=5),
            master_listen_fd=self._socket.detach(),
        )
