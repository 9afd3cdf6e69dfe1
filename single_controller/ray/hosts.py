"""The processes of a group: called in one order, trusted until one fails, ended once.

Starting them is left to `start`, what is called on them to `remote_batch`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any
from weakref import finalize

import ray
from ray.exceptions import GetTimeoutError

from single_controller.base.explain import RankState
from single_controller.base.hosts import Generation, Hosts
from single_controller.base.trace import Event, left
from single_controller.errors import CallTimeoutError, GroupBrokenError, WorkerDiedError
from single_controller.ray.failure import (
    GONE,
    CallSite,
    diagnose,
    died,
    get_all,
    not_ready,
    note_last_words,
    own_death,
    raised,
    session,
    shown_seconds,
    stacks_of,
    stuck_ranks,
)
from single_controller.ray.host import HostInfo
from single_controller.ray.placement import actor_info, dead, give_back
from single_controller.ray.process import ProcessInfo, beside, end
from single_controller.ray.stream import relay

__all__ = ["RayHosts", "end_processes", "end_when_dropped", "later"]

_logger = logging.getLogger(__name__)

_GONE_S = 10.0
_HARVEST_S = 10.0
_ELSEWHERE = (
    "the group was closed or restarted by another process, and these are its former processes: "
    "take its new ones from there, or by from_detached"
)


class RayHosts(Generation):
    """Handles of the processes that were started together, or attached to, one per rank."""

    def __init__(
        self,
        handles: Sequence[Any],
        names: Sequence[str],
        infos: Sequence[HostInfo],
        attached: bool = False,
    ) -> None:
        super().__init__(infos, infos[0].roles, infos[0].address)
        self.ordered = infos[0].ordered
        self.handles, self.names, self.attached = list(handles), list(names), attached
        # See remote_batch.
        self.read_elsewhere: dict[str, set[tuple[int, Any, bool]]] = {}
        self._session = session()
        self._sites: dict[tuple[str, str], list[CallSite]] = {}
        self._callables: dict[str, list[Any]] = {}
        self._caller = uuid.uuid4().hex
        self._turns = [0] * len(self.handles)
        self.calls = 0  # that were sent
        self._running: dict[Any, tuple[int, str]] = {}  # by reference: which rank, and why
        self._relay: Any = None
        self._lent: dict[str, list[Any]] = {}  # see `lent`
        self._lending = threading.Lock()  # held for it, never while waiting
        self.sending = threading.Lock()  # one call at a time, or ranks would see different orders
        self._half_sent = False
        if _started.acquire(blocking=False):  # here, since no garbage collection may start it
            threading.Thread(target=_run_jobs, daemon=True, name="release").start()

    @classmethod
    def attach(cls, handles: Sequence[Any], names: Sequence[str], timeout_s: float) -> RayHosts:
        """The hosts behind handles of running actors. Those of several groups, or some of one, are
        ranks in their order, which have no rendezvous; actors found by `names` must be one group.

        Raises:
            CallTimeoutError: some did not answer in time. ValueError: they are not all of a group.
        """
        refs = [handle.whoami.remote() for handle in handles]
        try:
            infos: list[HostInfo] = get_all(refs, timeout_s, "attaching", range(len(refs)))
        except GetTimeoutError:
            late = not_ready(refs, 0)
            raise CallTimeoutError(
                f"workers {[names[i] for i in late] if names else late} had not answered after "
                f"startup_timeout_s={timeout_s:g}: a call keeps them busy, perhaps another "
                "driver's. Attach once it has ended, or give it more time",
                late,
            ) from None
        kinds = {(info.roles, info.ordered) for info in infos}
        if len(kinds) > 1 or len({info.process for info in infos}) < len(infos):
            told = ", ".join("+".join(info.roles) + f" (pid {info.pid})" for info in infos)
            raise ValueError(
                f"worker_handles must be different workers with the same roles; got {told}"
            )
        order, ranks = [*range(len(infos))], [info.rank for info in infos]
        if len({info.address for info in infos}) == 1 and sorted(ranks) == order:
            order.sort(key=ranks.__getitem__)
        elif names:
            raise ValueError(f"workers must be all ranks of one group; got ranks {ranks}")
        else:
            infos = [replace(infos[i], rank=i, address=("", 0)) for i in order]
        return cls(
            [handles[i] for i in order],
            [names[i] for i in order] if names else [],
            [infos[i] for i in order],
            attached=True,
        )

    @property
    def processes(self) -> dict[int, ProcessInfo]:
        """Each rank's process."""
        return {rank: info.process for rank, info in enumerate(self.infos)}

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the hosts have another caller, with an order of its own."""
        return RayHosts, (self.handles, self.names, self.infos, True)

    def turn(self, rank: int) -> tuple[str, int] | None:
        """Take the next call's place in a rank's order, where Ray keeps none; no place is given
        twice, whatever becomes of the call.
        """
        if self.ordered:
            return None
        number = self._turns[rank]
        self._turns[rank] = number + 1
        return self._caller, number

    def lend(self, token: str, refs: Sequence[Any]) -> None:
        """Note calls that read results in the device memory of these hosts."""
        with self._lending:
            self._lent[token] = [*dict.fromkeys([*self._lent.get(token, ()), *refs])]

    def lent(self) -> dict[str, list[Any]]:
        """By token of results, the calls that read them there and have not ended."""
        with self._lending:
            for token, refs in [*self._lent.items()]:
                _, left = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
                self._lent[token] = left
            self._lent = {token: refs for token, refs in self._lent.items() if refs}
            return dict(self._lent)

    def relay(self) -> Any:
        """The relay of what its ranks send in buckets."""
        made = self._relay
        if made is None or actor_info(made._actor_id.hex()).HasField("death_cause"):
            self._relay = relay(self.infos[0].process.node_id)
        return self._relay

    @contextmanager
    def sending_a_call(self) -> Generator[list[Any], None, None]:
        """Within this context, send one call, and put its references into the list.

        If it is interrupted, as by Ctrl-C, some ranks have the call and wait for their peers, or
        for a turn that will not come. Rather than see that it is caught, which can be interrupted
        as well, the group counts as broken until the call has left whole.
        """
        with self.sending:
            self._check_whole()
            refs: list[Any] = []
            self._half_sent = True
            try:
                yield refs
            except Exception:
                self._half_sent = bool(refs) or not self.ordered  # else nothing has left
                raise
            self._half_sent = False

    def _check_whole(self) -> None:
        if self._half_sent:
            self._break("sending a call was interrupted, and not all ranks have it")
            raise GroupBrokenError(f"{self.broken}. restart() the group, or close() it")

    def cancel(self, turns: Mapping[int, tuple[str, int]]) -> bool:
        """Ask for calls to be dropped whose turn, by rank, has not come.

        Only hosts with a loop can be asked: another one reads nothing until its call returns, and
        Ray runs what is queued there even after `ray.cancel`.
        """
        for rank, turn in turns.items() if not self.gone else ():
            self.handles[rank].drop.remote(turn)
        return bool(turns) and not self.gone

    def find_dead(self) -> WorkerDiedError | None:
        """A rank whose process has ended, if there is one; the group is broken from then on."""
        if self.ended or self.gone or not (ranks := self._dead()) or self.ended:
            return None
        site = self.sites("+".join(self.roles), "no call")[ranks[0]]
        death = died(site, str(actor_info(self._ids[site.rank]).death_cause))
        note_last_words(death, self.infos[site.rank].process)
        self._lose(death)
        return death

    def states(self) -> list[RankState]:
        """How each rank is; a rank whose group takes no calls is broken, or dead."""
        ranks = range(len(self.infos))
        gone = set(ranks if self.ended or self.gone else self._dead())
        rest: RankState = "broken" if self.broken else "alive"
        return ["dead" if rank in gone else rest for rank in ranks]

    def _dead(self) -> list[int]:
        gone = dead(self._ids)
        return [rank for rank, key in enumerate(self._ids) if key in gone]

    @property
    def _ids(self) -> list[str]:
        return [handle._actor_id.hex() for handle in self.handles]

    def sites(self, role: str, method: str) -> Sequence[CallSite]:
        """Where a method runs, by rank."""
        found = self._sites.get((role, method))
        if found is None:
            found = self._sites[role, method] = [
                CallSite(role, method, rank, info.node_ip, info.pid)
                for rank, info in enumerate(self.infos)
            ]
        return found

    def callables(self, title: str) -> Sequence[Any]:
        """By rank, the `call` of its host, whose tasks Ray shows under the name of the method."""
        found = self._callables.get(title)
        if found is None:
            found = [handle.call.options(name=title) for handle in self.handles]
            self._callables[title] = found
        return found

    def stacks(self, ranks: Iterable[int] | None = None) -> dict[int, str]:
        """By rank, the Python stacks of the threads that run the user's code, and what coroutines
        of `async def` methods await; or why the process does not say.

        Raises:
            GroupBrokenError: Ray was shut down.
        """
        self.check_there()
        processes = self.processes
        asked = processes if ranks is None else ranks
        return stacks_of({rank: processes[rank] for rank in asked})

    def harvest(self) -> tuple[dict[str, tuple[int, Sequence[Event]]], list[str]]:
        """By name, each process's time and its notes for a trace; whose are missing."""
        roles = "+".join(self.roles)
        names = [f"{roles} rank {i.rank} on {i.node_ip}, pid {i.pid}" for i in self.infos]
        if self.gone:
            return {}, names
        refs = [handle.trace_harvest.remote() for handle in self.handles]
        ray.wait(refs, num_returns=len(refs), timeout=_HARVEST_S)
        found: dict[str, tuple[int, Sequence[Event]]] = {}
        for name, ref in zip(names, refs, strict=True):
            with contextlib.suppress(Exception):  # it has ended, or is busy
                found[name] = ray.get(ref, timeout=0)
        return found, [name for name in names if name not in found]

    def look(self) -> None:
        if self._half_sent:
            with self.sending:  # or it is merely being sent
                self._check_whole()
        if self.settle(0) or not (running := [*self._running.values()]):
            return
        why, ranks = running[0][1], sorted({rank for rank, _ in running})
        if stuck := stuck_ranks({rank: self.infos[rank].process for rank in ranks}):
            self._end_stuck([*stuck], why)
        if self.broken is None:
            raise GroupBrokenError(
                f"ranks {ranks} are still in a call that {why}. Calls are taken again once it has "
                "ended; restart() the group to end it, or close() it"
            )

    @property
    def gone(self) -> bool:
        """Whether Ray was shut down since: a later one knows nothing of these hosts."""
        return session() != self._session

    def check_there(self) -> None:
        """Raise GroupBrokenError where Ray was shut down."""
        if self.gone:
            raise GroupBrokenError(GONE)

    def settle(self, timeout_s: float) -> bool:
        """Wait for the ranks that were still busy when a call failed; whether they finished."""
        if refs := [*self._running]:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
            _read(done)
            for ref in done:
                self._running.pop(ref, None)
        return not self._running

    def failed(self, error: Exception, refs: Sequence[Any], sites: Sequence[CallSite]) -> Exception:
        """Note what a failed call means for the group; the error to raise."""
        if self.ended is not None:
            return GroupBrokenError(self.ended)
        if self.gone:
            return GroupBrokenError(GONE)
        first = diagnose(error, refs, sites, self.processes)
        if own_death(first, self.processes):
            first = self._lose(first)
        why = f"failed elsewhere: {first.args[0]}"
        self._note_late(refs, sites, why)
        if stuck := [*getattr(first, "stuck", ())]:
            self._end_stuck(stuck, why)
        return first

    def _lose(self, death: WorkerDiedError) -> Exception:
        """Note the death of a rank; the error to raise."""
        context = actor_info(self._ids[death.rank]).death_cause.actor_died_error_context
        if self.broken is None and context.reason == type(context).RAY_KILL:  # as groups are ended
            self._break(_ELSEWHERE)
            return GroupBrokenError(_ELSEWHERE)
        self._break(f"the group lost a rank: {death.args[0]}")
        return death

    def _end_stuck(self, ranks: Sequence[int], why: str) -> None:
        self._break(f"ranks {ranks} waited in a collective of a call that {why}")
        end_processes([self.handles[r] for r in ranks], [self.infos[r].process for r in ranks])

    def _break(self, why: str) -> None:
        if self.broken is None:
            self.broken = why
            _logger.error(why)

    def timed_out(
        self, refs: Sequence[Any], sites: Sequence[CallSite], timeout_s: float, give_up: bool
    ) -> CallTimeoutError:
        """The error to raise for ranks still running; with `give_up`, note them for later calls."""
        title, after = f"{sites[0].role}.{sites[0].method}", f"after {shown_seconds(timeout_s)} s"
        if give_up:
            self._note_late(refs, sites, f"was given up {after} ({title})")
        ranks = [sites[i].rank for i in not_ready(refs, 0)]
        text = f"{title}: ranks {ranks} of {len(self.handles)} had not finished {after}"
        return CallTimeoutError(text, ranks, self.stacks(ranks))

    def interrupted(self, refs: Sequence[Any], sites: Sequence[CallSite]) -> None:
        """Note that the driver stopped waiting for a call, as after Ctrl-C."""
        self._note_late(refs, sites, "was interrupted")

    def _note_late(self, refs: Sequence[Any], sites: Sequence[CallSite], why: str) -> None:
        for i in not_ready(refs, 0):
            self._running.setdefault(refs[i], (sites[i].rank, why))

    def end(self, why: str) -> None:
        was_ended, self.ended = self.ended is not None, self.ended or why
        if not was_ended and not self.gone:
            left(self)
            end_processes(self.handles, list(self.processes.values()))
            if self._relay is not None:
                ray.kill(self._relay)
            _read([*self._running])
            if self.attached and not self.replaced:
                # Detached placement groups that nothing else runs in go with them.
                give_back(self._ids)
        self._running.clear()


def end_processes(handles: Sequence[Any], processes: Sequence[ProcessInfo]) -> None:
    """End hosts, also stopped ones, and return when they are gone."""
    for handle in handles:
        with contextlib.suppress(Exception):
            ray.kill(handle)
    beside(end, processes, _GONE_S)


def _read(refs: Sequence[Any]) -> None:
    """See the errors of calls that nobody will ask for: Ray prints those that nobody has seen."""
    for ref in refs:
        raised(ref)


_jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
_started = threading.Lock()


def later(job: Callable[[], object]) -> None:
    """Have a thread run it soon. Garbage may be collected at any moment, with any lock held, so
    what is to be done about it has to be done elsewhere.
    """
    _jobs.put(job)


def _run_jobs() -> None:
    while True:
        job = _jobs.get()
        with contextlib.suppress(Exception):  # the cluster or the hosts are gone
            job()
        del job


def end_when_dropped(hosts: Hosts) -> None:
    """Hosts that are dropped without `close` end once their calls have, since Ray counts handles;
    stuck ones are to be killed. At the driver's end Ray ends all processes of its groups.
    """
    finalize(hosts, later, partial(_drop, hosts.current)).atexit = False


def _drop(current: list[RayHosts]) -> None:
    for hosts in current:
        if not hosts.gone and not hosts.ended and (hosts.broken or not hosts.settle(0)):
            why = "the group was dropped"
            threading.Thread(target=hosts.end, args=(why,), daemon=True).start()  # takes seconds
