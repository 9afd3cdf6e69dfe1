"""Where a rank runs: its process, as others on its node see it, and its device.

`arrive` prepares the process itself. All else is done beside it: reading its stacks and its log,
its end, and the end of what it has started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from single_controller.base.worker import coroutine_stacks, own_frames
from single_controller.device import DeviceKind
from single_controller.errors import ResourceError

__all__ = [
    "DeviceIdentity",
    "ProcessInfo",
    "arrive",
    "beside",
    "check_versions",
    "collective",
    "end",
    "identify",
    "log_tail",
    "read_logs",
    "read_stacks",
    "versions",
]

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.01
_ASKED_S = 1.0  # how long a process gets to tell its stacks; it takes milliseconds
_CREDENTIALS = struct.Struct("3i")  # the process, user and group at the other end of a socket
_EXIT_S = 1.0  # how long a process that Ray ends, or calls dead, may take to be gone
_END_S = 5.0  # how long one that was killed may, with what it had started
_LOG_BYTES, _LOG_LINES = 16_384, 20

_MARK = "WG_PROCESS"  # what a process starts inherits it, also in a session of its own
_WATCHER = """
echo $$
exec >/dev/null
tail -s 0.1 --pid="$1" -f /dev/null || exit
kill -9 "-$1"
for pass in $(seq 50); do
    found=$(grep -lzsxF "$2" /proc/[0-9]*/environ | tr -dc '0-9\\n')
    [ "$found" ] || break
    kill -9 $found
done
"""


@dataclass(frozen=True)
class ProcessInfo:
    """A process, its node, and where its log is. `started` is the kernel's time of its start, since
    numbers of processes are used again; `watcher` ends what it has started, and then itself. Both
    are 0 where they are not known.
    """

    node_id: str
    node_ip: str
    pid: int
    started: int = 0
    log: str = ""
    watcher: int = 0


def arrive(
    node_id: str, node_ip: str, coroutines: Collection[Any]
) -> tuple[ProcessInfo, dict[str, str]]:
    """Let others on this node see this process's stacks, and what its `coroutines` await; who it
    is, with what versions.
    """
    pid, log = os.getpid(), ""
    found = _stat(pid)
    started = found.started if found else 0
    with contextlib.suppress(OSError):
        log = os.readlink("/proc/self/fd/2")
    with contextlib.suppress(OSError):  # no Linux
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(_address(pid, started))
        listening.listen()
        answers = listening, coroutines
        threading.Thread(target=_answer, args=answers, name="stacks", daemon=True).start()
    return ProcessInfo(node_id, node_ip, pid, started, log, _watched(pid, started)), versions()


def _address(pid: int, started: int) -> str:
    return f"\0single_controller:{pid}:{started}"  # in no folder, and gone with the process


def _answer(listening: socket.socket, coroutines: Collection[Any]) -> None:
    while True:
        try:
            asks, _ = listening.accept()
            with asks:
                who = asks.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(who)[1] in (0, os.getuid()):
                    asks.sendall(_own_stacks(coroutines).encode(errors="replace"))
        except OSError:  # whoever asked has left, or there are no more files for now
            time.sleep(_POLL_S)


def _watched(pid: int, started: int) -> int:
    """Have what this process starts ended when it ends itself, however that may be; the watcher's
    number. Ray only kills children, and only where their parent can still do it; so a shell
    watches, which is nobody's child. Forks do not show the mark; a group of its own is what they
    have in common with this process.
    """
    with contextlib.suppress(OSError):  # it leads a session
        os.setpgid(0, 0)  # ray 2.41 starts it in its own group
    environment = {name: value for name, value in os.environ.items() if name != _MARK}
    os.environ[_MARK] = mark = f"{pid}:{started}"
    command = ["setsid", "--fork", "sh", "-c", _WATCHER, "watcher", str(pid), f"{_MARK}={mark}"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):  # no Linux
        options: Any = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 5}
        told = subprocess.check_output(command, env=environment, cwd="/", **options)
        return int(told)
    return 0


def versions() -> dict[str, str]:
    """Python's, without its last digit, and those of packages as they are installed; none is
    imported.
    """
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in ("ray", "single-controller", "torch", "tensordict", "numpy", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_versions(found: Sequence[Mapping[str, str]], processes: Sequence[ProcessInfo]) -> None:
    """Log which of the versions that ranks found are not this process's.

    Raises:
        ResourceError: what one pickles, another may not read.
    """
    own, others = versions(), defaultdict(list)
    for rank, theirs in enumerate(found):
        for name in own.keys() & theirs.keys():
            if theirs[name] != own[name]:
                others[name, theirs[name]].append(rank)
    if not others:
        return
    told = []
    for (name, version), ranks in sorted(others.items()):
        nodes = ", ".join(sorted({processes[rank].node_ip for rank in ranks}))
        told.append(f"{name} {version} instead of {own[name]} on {nodes} (ranks {ranks})")
    text = f"ranks have other versions than the driver: {'; '.join(told)}"
    if {name for name, _ in others} & {"python", "ray", "single-controller"}:
        raise ResourceError(f"{text}. Install the same ones: calls travel by pickle")
    _logger.warning(text)


class _Stat(NamedTuple):
    state: str
    started: int


def _stat(pid: int) -> _Stat | None:
    """A process of this node that is there, and no zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else _Stat(fields[0], int(fields[19]))


def _is_running(process: ProcessInfo) -> bool:
    """Whether the process is there, on this node, and no zombie."""
    found = _stat(process.pid)
    return found is not None and process.started in (0, found.started)


def beside(
    function: Callable[..., list[T]],
    processes: Sequence[ProcessInfo],
    timeout_s: float,
) -> list[T | None]:
    """`function(processes)`, of those here, run on each one's own node with those of that node: one
    result for each, None where its node did not answer within `timeout_s`.
    """
    results: dict[ProcessInfo, T] = {}
    on_node: dict[str, list[ProcessInfo]] = {}
    for process in processes:
        on_node.setdefault(process.node_id, []).append(process)
    local = on_node.pop(ray.get_runtime_context().get_node_id(), [])
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    tasks = {}
    for node_id, there in on_node.items():
        place = NodeAffinitySchedulingStrategy(node_id, soft=False)
        tasks[remote.options(scheduling_strategy=place).remote(there)] = there
    if local:
        results.update(zip(local, function(local), strict=True))
    if tasks:
        ready, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout_s)
        for ref in ready:
            with contextlib.suppress(Exception):  # the node is gone
                results.update(zip(tasks[ref], ray.get(ref), strict=True))
        for ref in late:
            ray.cancel(ref)  # not by force: the next look needs that process
    return [results.get(process) for process in processes]


def read_stacks(processes: Sequence[ProcessInfo]) -> list[str]:
    """What each process does, as its `_own_stacks` tells, or why it does not say."""
    with ThreadPoolExecutor(len(processes) or 1) as threads:
        return [*threads.map(_stacks_of, processes)]


def _stacks_of(process: ProcessInfo) -> str:
    found = _stat(process.pid) if _is_running(process) else None
    if found is None:
        return f"no stack: process {process.pid} has ended"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asks:
        asks.settimeout(_ASKED_S)
        asks.connect(_address(process.pid, found.started))
        with asks.makefile(errors="replace") as told:
            return told.read()
    return f"no stack: process {process.pid} does not answer (its state is {found.state})"


_COLLECTIVES = ("/torch/distributed/", "/ray/util/collective/")
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_BATCHES = os.path.join(os.path.dirname(os.path.dirname(_PACKAGE)), "protocol") + os.sep
_RAY = os.path.dirname(ray.__file__) + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = ("/site-packages/", "/dist-packages/")
_ANOTHER = "\n  -- another thread --\n"


def _is_machinery(frame: FrameType) -> bool:
    """Whether it is Ray's, this package's or Python's own."""
    file = frame.f_code.co_filename
    python = file.startswith(_LIBRARY) and not any(part in file for part in _INSTALLED)
    return python or file.startswith(("<", _PACKAGE, _BATCHES, _RAY))


def _own_stacks(coroutines: Collection[Any]) -> str:
    """The stacks of this process's threads that run the user's code, the innermost frame first,
    and what its coroutines await. Frames below a call's start are Ray's and this package's, and
    left out.
    """
    shown = [coroutine_stacks([*coroutines], (_PACKAGE, _RAY))] if coroutines else []
    for thread, innermost in sys._current_frames().items():
        frames = [frame for frame, _ in walk_stack(innermost)]
        calls = thread == threading.main_thread().ident and any(
            frame.f_code.co_filename.startswith(_PACKAGE) for frame in frames
        )
        if not calls and all(map(_is_machinery, frames)):
            continue  # between calls, or Ray's own
        while len(frames) > 1 and _is_machinery(frames[-1]):
            frames.pop()
        shown.append("\n".join(own_frames(frames, ())) or "  waits for its arguments")
    return _ANOTHER.join(reversed(shown)) or "  in no call"


def collective(stacks: str) -> str | None:
    """The stack of a thread that waits in a collective, or to meet for one; None if none does.

    Only the innermost frame counts: a model wrapped by torch.distributed computes inside its
    frames. Waiting in the user's own frame, such as `tensor.item()` after an asynchronous
    collective, cannot be told from computing.
    """
    for stack in stacks.split(_ANOTHER):
        if any(part in stack.partition("\n")[0] for part in _COLLECTIVES):
            return stack
    return None


def log_tail(process: ProcessInfo) -> str:
    """The last lines on the process's stderr."""
    lines: list[str] = []
    with contextlib.suppress(OSError), open(process.log, "rb") as file:
        file.seek(max(0, os.path.getsize(process.log) - _LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    own = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
    return "\n".join(own[-_LOG_LINES:]).rstrip()


def read_logs(processes: Sequence[ProcessInfo]) -> list[str]:
    """The last lines that each process wrote, once it is gone, which Ray says it is."""
    _await_end(processes, _EXIT_S)
    return [*map(log_tail, processes)]


def end(processes: Sequence[ProcessInfo]) -> list[bool]:
    """Kill each process that does not end at Ray's request, and wait for what they have started to
    be ended, too; whether each is gone.
    """
    _await_end(processes, _EXIT_S)
    for process in filter(_is_running, processes):
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
    watchers = [ProcessInfo("", "", process.watcher) for process in processes if process.watcher]
    _await_end([*processes, *watchers], _END_S)
    return [not _is_running(process) for process in processes]


def _await_end(processes: Sequence[ProcessInfo], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_is_running, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


_P2P_READ = 0  # NVML_P2P_CAPS_INDEX_READ, which pynvml has as a tuple that no call takes


@dataclass(frozen=True)
class DeviceIdentity:
    """A device by its UUID, on a node. `peers` are others of the node that it can read."""

    node_id: str
    uuid: str
    peers: frozenset[str] = frozenset()

    def reads(self, other: DeviceIdentity) -> bool:
        """Whether a process on this device can map memory of a process on the other one."""
        return self.node_id == other.node_id and other.uuid in {self.uuid, *self.peers}


def identify(kind: DeviceKind, index: int, node_id: str) -> DeviceIdentity | None:
    """The device that torch calls `kind.name:index` in this process; None if it has no UUID."""
    if not kind.lends:
        return None
    import torch

    module = getattr(torch, kind.name)
    if not module.is_available():
        return None
    uuid = str(module.get_device_properties(index).uuid)
    return DeviceIdentity(node_id, uuid, _peers(uuid))


def _peers(uuid: str) -> frozenset[str]:
    """Asked of the driver, since a process does not see the devices of others; none where it does
    not say.
    """
    with contextlib.suppress(Exception):
        from ray._private.thirdparty.pynvml import pynvml as nvml

        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        found = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
        mine = found.pop(uuid)
        return frozenset(
            other
            for other, handle in found.items()
            if nvml.nvmlDeviceGetP2PStatus(mine, handle, _P2P_READ) == nvml.NVML_P2P_STATUS_OK
        )
    return frozenset()


def _text(uuid: Any) -> str:
    return (uuid.decode() if isinstance(uuid, bytes) else str(uuid)).removeprefix("GPU-")
