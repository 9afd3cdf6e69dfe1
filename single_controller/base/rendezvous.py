"""The address that `torch.distributed` meets at: bound before it is published, kept for good.

Who learns the address is left to the backends.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.machinery import ModuleSpec
from typing import Any

from single_controller.errors import ResourceError

__all__ = ["OnImport", "Rendezvous"]

_logger = logging.getLogger(__name__)

_ALONE_S = 10.0  # how long ranks that meet without this one wait for it to import torch
_MODULE = "torch.distributed.rendezvous"


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
        self._started = threading.Event()
        for candidate in ports:
            with contextlib.suppress(OSError, OverflowError):
                self._socket.bind(("", candidate))
                # From here on: nobody else could bind it, and torch can as soon as it is closed.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
        """Let ranks join a store from now on. It starts as soon as this process has torch: before
        rank 0's own code can ask torch for one, which finds this one then, since both are
        `multi_tenant`. Workers that never meet need no torch, which takes seconds to import.
        """
        module = sys.modules.get(_MODULE)
        if hasattr(module, "TCPStore"):
            self._start(module)
        else:
            sys.meta_path.insert(0, OnImport(_MODULE, self._start))
            threading.Thread(target=self._fetch_torch, daemon=True, name="rendezvous").start()

    def _hand_over(self, module: Any) -> None:
        """Leave the store to torch as soon as rank 0 joins it: it ends with their group, so that
        ranks can meet again, where what they wrote here first would lead them astray.
        """
        made = module.TCPStore

        def join(*args: Any, **kwargs: Any) -> Any:
            store = made(*args, **kwargs)
            if store.port == self.port and kwargs.get("is_master", True in args[3:4]):
                module.TCPStore, self._store = made, None
            return store

        module.TCPStore = join

    def _start(self, module: Any) -> None:
        here = "::1" if self._socket.family == socket.AF_INET6 else "127.0.0.1"
        listening = self._socket.detach()
        try:
            self._store = module.TCPStore(
                here,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(minutes=5),
                multi_tenant=True,
                master_listen_fd=listening,
            )
            self._hand_over(module)
        except Exception:  # not to be raised by whoever imports torch; rank 0 binds the port anew
            _logger.exception("the store that ranks meet in could not start")
            with contextlib.suppress(OSError):
                os.close(listening)
        self._started.set()

    def _fetch_torch(self) -> None:
        """Import torch where ranks come to the store and this rank's own code does not. While that
        code does, this waits: two threads that import it at once may dead-lock.
        """
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        waiting.poll()
        self._started.wait(_ALONE_S)
        if "torch" not in sys.modules:
            importlib.import_module("torch")


class OnImport(importlib.abc.MetaPathFinder):
    """Calls `then` with a module as soon as that has been imported."""

    def __init__(self, module: str, then: Callable[[Any], None]) -> None:
        self._module, self._then = module, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = spec.loader if spec else None
        if loader is not None:
            execute, then = loader.exec_module, self._then
            loader.exec_module = lambda module: (execute(module), then(module))
        return spec
