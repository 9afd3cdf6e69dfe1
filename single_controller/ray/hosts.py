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
    dumps,
    explain_death,
    get_all,
    not_ready,
    raised,
    session,
    shown_seconds,
    stuck_ranks,
)
from single_controller.ray.host import HostInfo
from single_controller.ray.placement import actor_info, dead, give_back
from single_controller.ray.process import ProcessInfo, beside, end, readable
from single_controller.ray.stream import relay

__all__ = ["RayHosts", "end_processes", "end_when_dropped", "later"]

_logger = logging.getLogger(__name__)

_LOOP_S = 0.5  # how long a host with a loop gets to say what its calls await
_END_S = 2.0  # how long processes get to end at Ray's request before they are killed
_GONE_S = 10.0
_HARVEST_S = 10.0


class RayHosts(Generation):
    """Handles of the processes that were started together, or attached to, one per rank."""

    def __init__(
        self,
        handles: Sequence[Any],
        names: Sequence[str],
        infos: Sequence[HostInfo],
        address: tuple[str, int],
        ordered: bool,
        attached: bool = False,
    ) -> None:
        super().__init__(infos, infos[0].roles, address)
        self.handles, self.names, self.attached = list(handles), list(names), attached
        # See remote_batch.
        self.read_elsewhere: dict[str, set[tuple[int, Any, bool]]] = {}
        self._session = session()
        self._sites: dict[tuple[str, str], list[CallSite]] = {}
        self._callables: dict[str, list[Any]] = {}
        self._caller = uuid.uuid4().hex
        self._turns = None if ordered else [0] * len(self.handles)
        self._running: tuple[tuple[int, Any, str], ...] = ()  # rank, reference, why
        # Held for `broken`, `_running` and `_lent`, never while waiting.
        self._noting = threading.Lock()
        self._relay: Any = None
        self._lent: dict[str, list[Any]] = {}  # see `lent`
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
            found = get_all(refs, timeout_s, "attaching", range(len(refs)))
        except GetTimeoutError:
            late = not_ready(refs, 0)
            which = [names[i] for i in late] if names else f"number {late} of worker_handles"
            raise CallTimeoutError(
                f"workers {which} had not answered after startup_timeout_s="
                f"{shown_seconds(timeout_s)}: a call keeps them busy, perhaps another driver's. "
                "Attach once it has ended, or give it more time",
                late,
            ) from None
        infos = [info for info, _, _ in found]
        addresses = {address for _, address, _ in found}
        order = sorted(range(len(infos)), key=lambda i: infos[i].rank)
        is_whole = len(addresses) == 1 and [infos[i].rank for i in order] == [*range(len(infos))]
        if names and not is_whole:
            raise ValueError(
                f"workers must be all ranks of one group; got ranks {[i.rank for i in infos]}"
            )
        kinds = {(info.roles, ordered) for info, _, ordered in found}
        if len(kinds) > 1 or len({info.process for info in infos}) < len(infos):
            raise ValueError(
                "worker_handles must be different workers with the same roles; got "
                + ", ".join(f"{'+'.join(info.roles)} in process {info.pid}" for info in infos)
            )
        if not is_whole:
            order = list(range(len(infos)))
            addresses = {("", 0)}
        return cls(
            [handles[i] for i in order],
            [names[i] for i in order] if names else [],
            [replace(infos[i], rank=rank) for rank, i in enumerate(order)],
            addresses.pop(),
            found[0][2],
            attached=True,
        )

    @property
    def processes(self) -> dict[int, ProcessInfo]:
        """Each rank's process."""
        return {rank: info.process for rank, info in enumerate(self.infos)}

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the hosts have another caller, with an order of its own."""
        fields = self.handles, self.names, self.infos, self.address, self.ordered, True
        return RayHosts, fields

    @property
    def ordered(self) -> bool:
        """Whether Ray keeps the order of calls."""
        return self._turns is None

    def turn(self, rank: int) -> tuple[str, int] | None:
        """Take the next call's place in a rank's order, where Ray keeps none; no place is given
        twice, whatever becomes of the call.
        """
        if self._turns is None:
            return None
        number = self._turns[rank]
        self._turns[rank] = number + 1
        return self._caller, number

    def lend(self, token: str, refs: Sequence[Any]) -> None:
        """Note calls that read results in the device memory of these hosts."""
        with self._noting:
            self._lent[token] = [*dict.fromkeys([*self._lent.get(token, ()), *refs])]

    def lent(self) -> dict[str, list[Any]]:
        """By token of results, the calls that read them there and have not ended."""
        with self._noting:
            for token, refs in [*self._lent.items()]:
                _, left = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
                self._lent[token] = left
            self._lent = {token: refs for token, refs in self._lent.items() if refs}
            return dict(self._lent)

    def relay(self) -> Any:
        """The relay of what its ranks send in buckets."""
        if self._relay is None:
            self._relay = relay()
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
        rank = ranks[0]
        site = self.sites("+".join(self.roles), "no call")[rank]
        death = died(site, str(actor_info(self._ids[rank]).death_cause))
        death = explain_death(death, self.infos[rank].process)
        self._break(self._ended_elsewhere(rank) or f"the group lost a rank: {death.args[0]}")
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
        """By rank, the Python stacks of the threads that run the user's code, whatever the
        process is doing; with `async def` methods, what their coroutines await as well.

        Raises:
            GroupBrokenError: Ray was shut down.
        """
        self.check_there()
        chosen = range(len(self.infos)) if ranks is None else list(ranks)
        processes = self.processes
        awaited = self._awaited(chosen)
        found = dumps({rank: processes[rank] for rank in chosen if not awaited.get(rank)})
        return {rank: awaited.get(rank) or readable(found[rank]) for rank in chosen}

    def _awaited(self, ranks: Iterable[int]) -> dict[int, str]:
        if self._turns is None:
            return {}
        refs = {self.handles[rank].coroutines.remote(): rank for rank in ranks}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_LOOP_S)
        found = {}
        for ref in ready:
            with contextlib.suppress(Exception):  # the rank is gone, and its stack says so
                found[refs[ref]] = ray.get(ref)
        return found

    def harvest(self) -> tuple[dict[str, tuple[int, Sequence[Event]]], list[str]]:
        """By name, each process's time and its notes for a trace; whose are missing, and why."""
        roles = "+".join(self.roles)
        names = [f"{roles} rank {i.rank} on {i.node_ip}, pid {i.pid}" for i in self.infos]
        if self.gone:
            return {}, [f"{name}: Ray was shut down before it was asked" for name in names]
        refs = [handle.trace_harvest.remote() for handle in self.handles]
        ray.wait(refs, num_returns=len(refs), timeout=_HARVEST_S)
        found: dict[str, tuple[int, Sequence[Event]]] = {}
        missing = []
        for name, ref in zip(names, refs, strict=True):
            try:
                found[name] = ray.get(ref, timeout=0)
            except Exception as error:
                missing.append(f"{name}: {type(error).__name__} when asked for its spans")
        return found, missing

    def look(self) -> None:
        if self._half_sent:
            with self.sending:  # or it is merely being sent
                self._check_whole()
        if not self.settle(0) and (running := self._running):
            why = running[0][2]
            self._end_stuck(stuck_ranks(self._processes_of(running)), why)
            if self.broken is None:
                ranks = sorted({rank for rank, _, _ in running})
                raise GroupBrokenError(
                    f"ranks {ranks} are still in a call that {why}. Calls are taken again once it "
                    "has ended; restart() the group to end it, or close() it"
                )

    @property
    def gone(self) -> bool:
        """Whether Ray was shut down since: a later one knows nothing of these hosts."""
        return session() != self._session

    def check_there(self) -> None:
        """Raise GroupBrokenError where Ray was shut down."""
        if self.gone:
            raise GroupBrokenError(GONE)

    def _processes_of(self, running: Iterable[tuple[int, Any, str]]) -> dict[int, ProcessInfo]:
        processes = self.processes
        return {rank: processes[rank] for rank, _, _ in running}

    def settle(self, timeout_s: float) -> bool:
        """Wait for the ranks that were still busy when a call failed; whether they finished."""
        if self._running:
            refs = [ref for _, ref, _ in self._running]
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
            _read(done)
            ended = set(done)
            with self._noting:
                self._running = tuple(item for item in self._running if item[1] not in ended)
        return not self._running

    def failed(self, error: Exception, refs: Sequence[Any], sites: Sequence[CallSite]) -> Exception:
        """Note what a failed call means for the group; the error to raise."""
        if self.ended is not None:
            return GroupBrokenError(self.ended)
        if self.gone:
            return GroupBrokenError(GONE)
        diagnosis = diagnose(error, refs, sites, self.processes)
        first = diagnosis.error
        if diagnosis.own_death and isinstance(first, WorkerDiedError):
            if self.broken is None and (elsewhere := self._ended_elsewhere(first.rank)):
                self._break(elsewhere)
                return GroupBrokenError(elsewhere)
            first = explain_death(first, self.infos[first.rank].process)
        why = first.args[0]
        self._note_running(diagnosis.running, f"failed elsewhere: {why}")
        if diagnosis.own_death:
            self._break(f"the group lost a rank: {why}")
        self._end_stuck(diagnosis.stuck, f"failed elsewhere: {why}")
        return first

    def _ended_elsewhere(self, rank: int) -> str | None:
        """What became of a group that another process closed, restarted or killed; None where the
        rank ended by itself.
        """
        key = self._ids[rank]
        found = actor_info(key)
        context = found.death_cause.actor_died_error_context
        if context.reason != type(context).RAY_KILL:  # by which groups are ended
            return None
        with contextlib.suppress(ValueError):  # there is nobody of that name
            if ray.get_actor(found.name)._actor_id.hex() != key:
                return (
                    "the group was restarted by another process, and these are its former "
                    "processes: take its new ones from there, or by from_detached"
                )
        return "the group was closed, or is being restarted, by another process"

    def _end_stuck(self, stuck: Mapping[int, str], why: str) -> None:
        if stuck:
            self._break(f"ranks {list(stuck)} waited in a collective of a call that {why}")
            end_processes(
                [self.handles[rank] for rank in stuck], [self.infos[r].process for r in stuck], 0
            )
            self.settle(_LOOP_S)

    def _break(self, why: str) -> None:
        with self._noting:
            if self.broken is not None:
                return
            self.broken = why
        _logger.error(why)

    def timed_out(
        self, refs: Sequence[Any], sites: Sequence[CallSite], timeout_s: float, give_up: bool
    ) -> CallTimeoutError:
        """The error to raise for ranks still running; with `give_up`, note them for later calls."""
        title = f"{sites[0].role}.{sites[0].method}"
        late = not_ready(refs, 0)
        ranks = [sites[i].rank for i in late]
        if give_up:
            why = f"was given up after {shown_seconds(timeout_s)} s ({title})"
            self._note_running([(sites[i].rank, refs[i]) for i in late], why)
        return CallTimeoutError(
            f"{title}: ranks {ranks} of {len(self.handles)} had not "
            f"finished after {shown_seconds(timeout_s)} s",
            ranks,
            self.stacks(ranks),
        )

    def interrupted(self, refs: Sequence[Any], sites: Sequence[CallSite]) -> None:
        """Note that the driver stopped waiting for a call, as after Ctrl-C."""
        ranks = [(site.rank, ref) for ref, site in zip(refs, sites, strict=True)]
        self._note_running(ranks, "was interrupted")

    def _note_running(self, running: Sequence[tuple[int, Any]], why: str) -> None:
        with self._noting:
            known = {ref for _, ref, _ in self._running}
            added = tuple((rank, ref, why) for rank, ref in running if ref not in known)
            self._running = (*self._running, *added)

    def end(self, why: str) -> None:
        was_ended, self.ended = self.ended is not None, self.ended or why
        if not was_ended and not self.gone:
            left(self)
            end_processes(self.handles, list(self.processes.values()), _END_S)
            if self._relay is not None:
                ray.kill(self._relay)
            _read([ref for _, ref, _ in self._running])
            if self.attached and not self.replaced:
                # Detached placement groups that nothing else runs in go with them.
                give_back(self._ids)
        with self._noting:
            self._running = ()


def end_processes(handles: Sequence[Any], processes: Sequence[ProcessInfo], grace_s: float) -> None:
    """End hosts, also stopped ones, and return when they are gone."""
    for handle in handles:
        with contextlib.suppress(Exception):
            ray.kill(handle)
    beside(end, processes, grace_s + _GONE_S, grace_s=grace_s)


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
