"""A host's process as others on its node see it: its Python stacks, its log, how it ended.

`arrive` prepares the process itself. All else runs beside it and works whatever it is doing, also
where it never comes back from C code. Getting to the right node is left to `nodes`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import struct
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "ExitWatch",
    "ProcessInfo",
    "arrive",
    "end",
    "is_running",
    "log_tail",
    "read_logs",
    "read_stacks",
    "read_stacks_by_pid",
]

_SIGNAL = getattr(signal, "SIGRTMIN", 0) + 7  # a real-time one: programs use those with names
_STACKS = "stacks"  # the file in memory that they are written to
_POLL_S = 0.01
_QUIET_S = 0.03
_ASKED_S = 0.5  # how long a process gets to write its stacks by itself; it takes milliseconds
_STACKS_S = 1.0  # how long when it is made to
_LOG_BYTES = 16_384
_LOG_LINES = 20

_MARK = "WG_PROCESS"  # what a process starts inherits it, also in a session of its own
_PASSES = 3  # over all processes of the node: what is about to end may start others
_WATCHER = f"""
tail --pid="$1" -f /dev/null || exit
kill -9 "-$1"
for pass in $(seq {_PASSES}); do
    for file in $(grep -lzsxF "$2" /proc/[0-9]*/environ); do
        file=${{file%/environ}}
        kill -9 "${{file#/proc/}}"
    done
done
"""

_PIDFD_GET_INFO = 0xC040FF0B  # Linux 6.13, with an exit status since 6.15
_PIDFD_INFO = struct.Struct("QQ11Ii")
_PIDFD_INFO_EXIT = 8


@dataclass(frozen=True)
class ProcessInfo:
    """Where a process is, what to signal it for, and where its log is.

    `started` is the kernel's time of its start, since numbers of processes are used again;
    `stacks_fd` the descriptor, in it, that its stacks are written to, -1 for none.
    """

    node_id: str
    node_ip: str
    pid: int
    started: int
    stacks_fd: int
    log: str


def arrive(node_id: str, node_ip: str) -> ProcessInfo:
    """Let this process write all threads' stacks when it is asked to; who it is.

    A thread does, which needs the GIL: nothing else runs Python meanwhile. Only while another one
    holds the GIL for good, a signal is needed, in whose handler C code writes; where threads ran
    on, that would now and then read what they have just freed, and crash. The file is in memory and
    goes with the process; its name has the pipe to ask by.
    """
    descriptor = -1
    if hasattr(os, "memfd_create"):
        asked, asks = os.pipe()
        descriptor = os.memfd_create(f"{_STACKS}:{asks}:")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)  # whoever reads it empties it
        faulthandler.register(_SIGNAL, file=descriptor, all_threads=True)
        answer = threading.Thread(target=_answer, args=(asked, descriptor), name=_STACKS)
        answer.daemon = True
        answer.start()
    pid = os.getpid()
    found = _stat(pid)
    log = ""
    with contextlib.suppress(OSError):
        log = os.readlink("/proc/self/fd/2")
    process = ProcessInfo(node_id, node_ip, pid, found.started if found else 0, descriptor, log)
    _have_heirs_ended(process)
    return process


def _have_heirs_ended(process: ProcessInfo) -> None:
    """End what this process starts when it ends itself, however that may be. Ray only kills
    children, and only where their parent can still do it; so a shell watches. It is nobody's child.
    Forks do not show the mark; a group of its own is what they have in common with this process.
    """
    with contextlib.suppress(OSError):  # it leads a session
        os.setpgid(0, 0)  # ray 2.41 starts it in its own group
    environment = {name: value for name, value in os.environ.items() if name != _MARK}
    os.environ[_MARK] = _mark(process)
    argument = f"{_MARK}={_mark(process)}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no Linux, or a bare one
        subprocess.run(
            ["setsid", "--fork", "sh", "-c", _WATCHER, "watcher", str(process.pid), argument],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=5,
            check=False,
        )


def _mark(process: ProcessInfo) -> str:
    return f"{process.pid}:{process.started}"


def _answer(asked: int, descriptor: int) -> None:
    while os.read(asked, 1_024):
        faulthandler.dump_traceback(descriptor, all_threads=True)


def is_running(process: ProcessInfo) -> bool:
    """Whether the process is there, on this node, and no zombie."""
    found = _alive(process.pid)
    return found is not None and found.started == process.started


class _Stat(NamedTuple):
    state: str
    group: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Stat(fields[0], int(fields[2]), int(fields[19]))


def _alive(pid: int) -> _Stat | None:
    found = _stat(pid)
    return None if found is None or found.state in "ZX" else found


def read_stacks(processes: Sequence[ProcessInfo]) -> list[str]:
    """The stack of every thread of each process, as faulthandler writes them, or why not."""
    files = {process: file for process in processes if (file := _emptied(process))}
    found: dict[ProcessInfo, str] = {}
    for tell, seconds in ((_ask, _ASKED_S), (_signal, _STACKS_S)):
        told = [process for process in files if not found.get(process) and tell(process)]
        deadline = time.monotonic() + seconds
        found.update({process: _written(files[process], deadline) for process in told})
    return [found.get(process) or _silence(process) for process in processes]


def read_stacks_by_pid(processes: Sequence[ProcessInfo]) -> list[str]:
    """As `read_stacks`, of hosts that are known by nothing but their node and pid."""
    return read_stacks([_looked_up(process) for process in processes])


def _looked_up(process: ProcessInfo) -> ProcessInfo:
    """What `arrive` once said in that process, as far as its node shows it."""
    found = _stat(process.pid)
    started, descriptor = found.started if found else 0, -1
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            if os.readlink(file).startswith(f"/memfd:{_STACKS}:"):
                descriptor = int(file.name)
    return replace(process, started=started, stacks_fd=descriptor)


def _emptied(process: ProcessInfo) -> Path | None:
    """The file of a running process that its stacks go to."""
    if process.stacks_fd < 0 or not is_running(process):
        return None
    file = Path(f"/proc/{process.pid}/fd/{process.stacks_fd}")
    try:
        os.truncate(file, 0)
    except OSError:
        return None
    return file


def _ask(process: ProcessInfo) -> bool:
    opened = f"/proc/{process.pid}/fd"
    try:
        asks = os.readlink(f"{opened}/{process.stacks_fd}").split(":")[2]
        with open(f"{opened}/{asks}", "wb", buffering=0) as pipe:
            pipe.write(b"?")
    except (OSError, IndexError):  # it has ended, or has closed the file
        return False
    return True


def _signal(process: ProcessInfo) -> bool:
    try:
        os.kill(process.pid, _SIGNAL)
    except OSError:
        return False
    return True


def _written(file: Path, deadline: float) -> str:
    """What came, once no more comes."""
    text, changed = "", time.monotonic()
    with contextlib.suppress(OSError):  # it may end meanwhile
        while True:
            before, text = text, file.read_text(errors="replace")
            now = time.monotonic()
            changed = changed if text == before else now
            if (text and now - changed > _QUIET_S) or now > deadline:
                break
            time.sleep(_POLL_S)
    return text.strip() and text


def _silence(process: ProcessInfo) -> str:
    """Why there is no stack."""
    found = _stat(process.pid)
    if found is None or found.started != process.started:
        return f"no stack: process {process.pid} has ended"
    return f"no stack: process {process.pid} does not answer (its state is {found.state})"


def read_logs(processes: Sequence[ProcessInfo]) -> list[str]:
    """The last lines of what each process wrote; of a dead one, too."""
    return [log_tail(process) for process in processes]


def log_tail(process: ProcessInfo) -> str:
    """The last lines on the process's stderr; where there is nothing, on its stdout."""
    for name in (process.log, process.log.removesuffix(".err") + ".out"):
        lines: list[str] = []
        with contextlib.suppress(OSError), open(name, "rb") as file:
            file.seek(max(0, os.path.getsize(name) - _LOG_BYTES))
            lines = file.read(_LOG_BYTES).decode(errors="replace").splitlines()
        lines = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
        if lines:
            return "\n".join(lines[-_LOG_LINES:])
    return ""


def end(processes: Sequence[ProcessInfo], grace_s: float = 0.0, wait_s: float = 5.0) -> list[bool]:
    """Kill each process that does not end by itself within `grace_s`, and what they started;
    whether each is gone.
    """
    _until(lambda: not any(map(is_running, processes)), grace_s)
    for process in processes:
        if is_running(process):
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
    _until(lambda: not any(map(is_running, processes)), wait_s)
    gone = [process for process in processes if not is_running(process)]
    for _ in range(_PASSES):
        if not (gone and _end_heirs(gone, wait_s)):
            break
    return [process in gone for process in processes]


def _end_heirs(ended: Sequence[ProcessInfo], wait_s: float) -> bool:
    """Kill what these left behind; whether that was anything."""
    heirs = _heirs(ended)
    for heir in heirs:
        with contextlib.suppress(OSError):
            os.kill(heir, signal.SIGKILL)
    _until(lambda: not any(map(_alive, heirs)), wait_s)
    return bool(heirs)


def _heirs(ended: Sequence[ProcessInfo]) -> list[int]:
    """What processes that have ended left behind: their groups, and whatever has their mark."""
    marks = {f"{_MARK}={_mark(process)}".encode() for process in ended}
    found = []
    groups = set()  # led by one of them, and not by another process that has got its number
    for process in ended:
        now = _stat(process.pid)
        groups |= {process.pid} if now is None or now.started == process.started else set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        environment = b""
        with contextlib.suppress(OSError):  # another user's, or it has ended
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        is_marked = _MARK.encode() in environment and not marks.isdisjoint(environment.split(b"\0"))
        if (stat := _alive(pid)) and (is_marked or stat.group in groups):
            found.append(pid)
    return found


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


class ExitWatch:
    """Tells how a process on this node ended, though this one is not its parent.

    Needs Linux 6.15; elsewhere, and for a process that cannot be watched, nothing is known.
    """

    def __init__(self, process: ProcessInfo) -> None:
        self._descriptor = -1
        with contextlib.suppress(OSError, AttributeError):
            self._descriptor = os.pidfd_open(process.pid)
            weakref.finalize(self, os.close, self._descriptor)
        if not is_running(process):
            self._descriptor = -1

    def exit_code(self, timeout_s: float) -> int | None:
        """Wait for the end; the code that it exited with, or minus the signal that killed it."""
        if self._descriptor < 0:
            return None
        deadline = time.monotonic() + timeout_s
        while True:
            status = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 12, 0))
            try:
                fcntl.ioctl(self._descriptor, _PIDFD_GET_INFO, status)
            except OSError:
                return None
            mask, *_, code = _PIDFD_INFO.unpack(bytes(status))
            if mask & _PIDFD_INFO_EXIT:
                return os.waitstatus_to_exitcode(code)
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)  # it runs, or its parent has not asked, before which none is told
