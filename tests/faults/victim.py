"""A worker that does, when asked, whatever can go wrong with one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register


class Victim(Worker):
    """`act(what)` fails as told; `all_reduce` shows that the group is whole."""

    def __init__(self, what: Sequence[str] = ()) -> None:
        """`what[rank]` is done at once."""
        self.state = f"new on {self.rank}"
        if what:
            self.act(what[self.rank])

    def restore(self) -> None:
        self.state = f"restored on {self.rank}"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def act(self, what: str) -> Any:
        return getattr(self, f"_{what}")()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, timeout_s=0.2)
    def hurry(self) -> None:
        self._moment()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def look(self) -> tuple[int, int, str, str]:
        return self.rank, os.getpid(), self.state, self.get_master_addr_port()[1]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def all_reduce(self) -> float:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        total = torch.tensor([self.rank + 1.0])
        dist.all_reduce(total)
        return total.item()

    def _fine(self) -> str:
        return "fine"

    def _collective(self) -> float:
        return self.all_reduce()

    def _raise(self) -> None:
        os.write(2, b"about to fail\n")
        raise KeyError("broken on purpose")

    def _sleep(self) -> None:
        threading.Event().wait()

    def _moment(self) -> None:
        threading.Event().wait(1)

    def _engines(self) -> list[int]:
        """Processes that outlive their parent: one's child, nobody's child, a fork, and one that
        shows nothing of where it comes from.
        """
        import multiprocessing
        import subprocess

        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        orphan = subprocess.run(
            "setsid sleep 1000 >/dev/null 2>&1 & echo $!",
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        )
        fork = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
        fork.start()
        assert fork.pid is not None
        bare = subprocess.Popen(["env", "-i", "sleep", "1000"])
        return [child.pid, int(orphan.stdout), fork.pid, bare.pid]

    def _spin(self) -> None:
        """Threads that never stop running Python."""
        self.spins = True
        for _ in range(3):
            threading.Thread(target=self._spin_on, daemon=True).start()

    def _spin_on(self) -> None:
        while self.spins:
            exec("def f(n): return n and f(n - 1)\nf(30)", {})

    def _spin_down(self) -> None:
        self.spins = False

    def _in_c(self) -> None:
        """Holds the interpreter's lock in C code for good."""
        ctypes.PyDLL(None).pause()

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _kill(self) -> None:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def _segfault(self) -> None:
        ctypes.string_at(0)

    def _exit0(self) -> None:
        sys.exit(0)

    def _exit3(self) -> None:
        os._exit(3)

    def _hoard(self) -> None:
        held = []
        while True:
            held.append(os.urandom(1) * 100_000_000)
            threading.Event().wait(0.05)

    def _large(self) -> Any:
        import numpy as np

        return np.ones(40_000_000)

    def _sizeable(self) -> Any:
        import numpy as np

        return np.ones(400_000)

    def _lock(self) -> Any:
        return threading.Lock()

    def _unreadable(self) -> Unreadable:
        return Unreadable()


class Unreadable:
    """It pickles, and cannot be unpickled anywhere."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)
