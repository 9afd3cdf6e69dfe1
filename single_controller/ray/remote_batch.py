"""Calls on hosts, and batches that stay in the workers that made them: where they are, who reads
them, when they go.

A result without blocking stays with its host (`shelf`), and the driver gets a `RemoteBatch` for it.
A call on the same process takes it there. For anyone else it is published: before a call goes to
other processes, and when the driver itself or a pickler asks, the driver puts `publish` into the
queue of the host that has it. What was read elsewhere of a method's last result is published right
behind its next call, before later ones can hold that up.

Each rank is told only of the batches that it reads. Who reads what depends on how many rows there
are. A caller who waits anyway waits for these first. For others the first rank called sorts it out
for all of them, when its turn comes: it tells each its own, and before that, where batches may be
read in their own process as well as elsewhere, it tells their hosts which to publish. So what that
rank was told before holds up its peers, too.

No order of calls can dead-lock. Put all tasks (calls, publications, those that sort out who reads
what) in the order in which the driver sent them. A task waits for earlier ones in its host's queue,
for earlier calls whose rows it needs to know, and for what else it reads, all of which was sent
before it: after the calls that make the batches first what tells the hosts which to publish, then
the publications, then what tells each rank its own, then the call. So the first unfinished task
waits for nothing.

Pairs that are yielded are made and read at the same time, by tasks that wait for each other. So all
that a call needs which reads pairs is sent together with it, under one lock: publications, then the
tasks that make pairs, then the call. Take the first of these calls that has not ended. What its
tasks find before them in their queues was sent for earlier ones, or waits for nothing but its own
queue; so all get their turn, and then wait only for each other. None stands before another of them:
a process that makes pairs for others makes them in the very call that reads them, or is refused if
it reads any. Two streams of one process are made one after the other; that all ranks read them in
this order is left to the user, and so are drivers that pass pairs to and fro between the same
groups at the same time.

A host on an event loop runs more than its first task at a time, and waits for no more: the turn of
a task comes after what was sent before has started (and has read what this host has made for it),
and what waits for others does so in threads of their own. A method that reads pairs in the loop
itself stops it meanwhile: what makes them must not wait for what is awaited there.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.exceptions import GetTimeoutError

from single_controller.base.dispatch import padding_setting
from single_controller.base.message import (
    ONLY_PASSED,
    READ_BEFORE,
    RESULT_GONE,
    Message,
    Outbox,
    Outgoing,
    how_to_read,
    packed,
    read_rows,
)
from single_controller.base.method import Pending, Request
from single_controller.base.plan import Call, Handle, origins
from single_controller.base.trace import mark
from single_controller.base.worker import NO_BATCH
from single_controller.errors import CallTimeoutError, GroupBrokenError, SendError
from single_controller.ray.failure import (
    GONE,
    CallSite,
    all_arrived,
    diagnose,
    get_all,
    raised,
    session,
    shown_seconds,
    translate,
)
from single_controller.ray.hosts import RayHosts, later
from single_controller.ray.message import LARGE, SMALL, Answer, Head, Packer, sealed
from single_controller.ray.placement import check_started
from single_controller.ray.process import ProcessInfo
from single_controller.ray.shelf import Home, Kept
from single_controller.ray.stream import Offer, Pairs, borrowed, made_here

if TYPE_CHECKING:
    from protocol import DataProtoFuture
    from protocol.batches import Batch

# Held while a call and what it needs of others are sent: or two could wait for each other.
_together = threading.RLock()
Columns: TypeAlias = "tuple[tuple[str, ...], bool] | None"  # which, and whether all must be there
_NAMED = 8
_What: TypeAlias = "tuple[int, Columns, bool]"  # what is published: of which rank, whether lent
# By rank how many rows there are, 1 for a value of any kind, None for no batch; or the value
# itself, where it came along with the answer.
_Rows: TypeAlias = "tuple[int | Message | None, ...]"

__all__ = ["RayHandle", "RemoteBatch", "RemoteCall", "pin", "send"]


def send(hosts: RayHosts, request: Request, calls: Sequence[Call | None]) -> RemoteCall:
    """Send each rank its call.

    Raises:
        SendError: an argument cannot be pickled; then nothing was sent.
        GroupBrokenError: the group was restarted meanwhile.
        What went wrong with the calls whose batches are to be read, where the caller waits.
    """
    hosts.check_current()
    began, count = time.monotonic(), partial(request.record.count, "bytes_out")

    def share(message: Message, ranks: int) -> Any:
        if message.size < SMALL:
            return None
        count(message.size)
        return ray.put(message)

    def placed(out: Outgoing, readers: int) -> Any:
        """What Ray gives a task before its turn, it can neither spill nor free."""
        stores = out.message.size > LARGE and (readers > 1 or not hosts.ordered)
        count(out.size if stores else out.size * readers)
        return ray.put(out.message) if stores else out.message

    outbox = Outbox(calls, Packer, share)
    different: dict[int, tuple[Outgoing, list[int]]] = {}  # by id, with the ranks that get it
    for rank, out in enumerate(outbox.by_rank):
        if out is not None:
            different.setdefault(id(out), (out, []))[1].append(rank)
    reads = [(out, ranks) for out, ranks in different.values() if out.futures]
    # Before any is sent: ranks whose peers get no call would wait for them.
    known = _learn_rows([future for out, _ in reads for future in out.futures], request, began)
    padding, answering = padding_setting(), frozenset(request.answers)
    sites, callables = hosts.sites(request.role, request.method), hosts.callables(request.title)
    lent = tuple(hosts.lent())
    with _together if reads else contextlib.nullcontext():
        routes = _Routes(reads, hosts, request, known)
        letters = {
            key: (placed(out, len(ranks)), [*out.parts, *routes.parts.get(key, ())])
            for key, (out, ranks) in different.items()
        }
        made = RemoteCall(hosts, request, began)
        meeting = routes.meeting(made) if routes.streams else contextlib.nullcontext()
        with meeting, hosts.sending_a_call() as refs:
            hosts.calls += 1
            for rank, outgoing in enumerate(outbox.by_rank):
                if outgoing is None:
                    continue
                head = Head(
                    request.role,
                    request.method,
                    request.materialize,
                    request.reads_only,
                    rank in answering,
                    request.opens,
                    hosts.turn(rank),
                    (made.token, rank) if request.deferred and rank in answering else None,
                    mark(request.record.number, hosts) if request.record.number else None,
                    padding,
                    request.bucket_bytes is not None and request.deferred,
                    lent,
                    tuple(routes.own.get(rank, ())),
                )
                refs.append(callables[rank].remote(*sealed(head, *letters[id(outgoing)])))
                made.sent(sites[rank], refs[-1], head.turn)
    routes.sent(made)
    made.publish_ahead()
    return made


class _Answers:
    """Where each called rank's answer is: its output, or of what stays with its host, the rows.
    This is what other processes know of a call whose rows were not known when they were told.
    """

    def __init__(self, refs: Iterable[Any] = (), sites: Iterable[CallSite] = ()) -> None:
        self.refs, self.sites = list(refs), list(sites)
        self.known: _Rows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Answers, (self.refs, self.sites)

    @property
    def title(self) -> str:
        return f"{self.sites[0].role}.{self.sites[0].method}"

    @property
    def ranks(self) -> list[int]:
        return [site.rank for site in self.sites]

    def rows(self, timeout_s: float | None) -> _Rows:
        """Wait for all ranks, also those whose output is not needed; what each keeps."""
        if self.known is None:
            answers = self.outputs(timeout_s)
            self.known = tuple(
                one.message or 1 if isinstance(one, Answer) else one for one in answers
            )
        return self.known

    def outputs(self, timeout_s: float | None) -> list[Any]:
        """Wait for all ranks. Raises what went wrong."""
        try:
            return _got(self.refs, timeout_s, self.title, self.sites)
        except GetTimeoutError:
            raise CallTimeoutError(
                f"{self.title}: its ranks had not all finished after {shown_seconds(timeout_s)} s",
                self.ranks,
            ) from None

    async def arrive(self) -> bool:
        return await all_arrived(self.refs, None, self.title, self.ranks)


class RemoteCall(_Answers, Pending):
    """One call on its way. Results that stay with their hosts are let go of once nobody holds this
    any more.
    """

    def __init__(self, hosts: RayHosts, request: Request, began: float) -> None:
        super().__init__()
        self.hosts, self.request, self.record = hosts, request, request.record
        self.token = uuid.uuid4().hex if request.deferred else ""  # what hosts know its results by
        self.published: dict[_What, Any] = {}  # whether a reader needs it or not
        self.streamed = set[int]()  # the ranks whose pairs are being read, or were
        self.sources: list[str] = []  # what makes that which it reads
        self.limit = request.timeout_s
        self._deadline = None if self.limit is None else began + self.limit
        self._turns: dict[int, tuple[str, int]] = {}
        self._lock = threading.RLock()
        self._lent_at = 0  # after how many calls to these hosts
        self._unread = set[_What]()  # what was published ahead, and nobody has asked for
        if request.deferred:
            release = partial(_release, hosts, self.token, request, self._unread)
            weakref.finalize(self, later, release).atexit = False

    def sent(self, site: CallSite, ref: Any, turn: tuple[str, int] | None) -> None:
        """Note that a rank has its call."""
        self.sites.append(site)
        self.refs.append(ref)
        if turn is not None:
            self._turns[site.rank] = turn

    def _answering(self) -> list[int]:
        """Which of the called ranks answer, in order."""
        at = {rank: i for i, rank in enumerate(self.ranks)}
        return [at[rank] for rank in self.request.answers]

    def _left(self, timeout_s: float | None) -> float | None:
        """The seconds asked for, or else what is left of the call's own time."""
        if timeout_s is not None or self._deadline is None:
            return timeout_s
        return max(0.0, self._deadline - time.monotonic())

    def wait(self, timeout_s: float | None) -> list[Any]:
        outputs = self.outputs(timeout_s)
        return [self._read(outputs[i], self.sites[i]) for i in self._answering()]

    def outputs(self, timeout_s: float | None) -> list[Any]:
        hosts = self.hosts
        hosts.check_current()
        try:
            return _got(self.refs, self._left(timeout_s), self.title, self.sites, hosts)
        except GetTimeoutError:
            seconds = self.limit if timeout_s is None else timeout_s
            late = hosts.timed_out(self.refs, self.sites, seconds or 0, give_up=timeout_s is None)
            if self.sources:
                told = ", ".join(self.sources[:_NAMED]) + ", …" * (len(self.sources) > _NAMED)
                late.args = (f"{late.args[0]}. They read what comes from {told}", *late.args[1:])
            raise late from None
        except (KeyboardInterrupt, SystemExit):
            hosts.interrupted(self.refs, self.sites)
            raise

    def _read(self, output: Any, site: CallSite) -> Any:
        if not isinstance(output, Message):
            return output
        self.record.count("bytes_in", output.size)
        try:
            return output.read()
        except Exception as error:
            raise translate(error, site) from None

    async def arrive(self) -> bool:
        self.hosts.check_current()
        return await all_arrived(self.refs, self._left(None), self.title, self.ranks)

    def done(self) -> bool:
        if self.hosts.gone:
            return True
        ready, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        return len(ready) == len(self.refs)

    def cancel(self) -> bool:
        return self.hosts.cancel(self._turns)

    def handles(self, batched: bool) -> list[Any]:
        if not self.request.deferred:
            return [self.refs[i] for i in self._answering()]
        found = [RemoteBatch(self.token, self.sites[i], self, i) for i in self._answering()]
        return found if batched else [RayHandle(source, source.reference) for source in found]

    def rows(self, timeout_s: float | None) -> _Rows:
        self.check_current()
        return super().rows(timeout_s)

    def publish(
        self, rank: int, columns: Columns = None, lends: bool = False, wanted: Any = None
    ) -> Any:
        """A reference to a rank's batch in shared memory, or with `lends` to claims on it; to None
        where `wanted`, a reference, turns out to be false.
        """
        self.check_there()
        if self.request.bucket_bytes is not None:
            raise TypeError(ONLY_PASSED.format(self.request.title))
        what = rank, columns, lends
        if wanted is not None:
            return self._publication(what, [wanted])
        with self._lock:
            self._unread.discard(what)
            self.hosts.read_elsewhere.setdefault(self.request.title, set()).add(what)
            calls = self.hosts.calls
            if lends and self.request.opens and self._lent_at != calls:
                # Calls since then may have written into it: claims are made as it is now.
                self.published = {one: ref for one, ref in self.published.items() if not one[2]}
            if what not in self.published:
                self.published[what] = self._publication(what)
                self._lent_at = calls
            return self.published[what]

    def publish_ahead(self) -> None:
        """Publish what was read of the last call's results: later calls would hold it up."""
        if self.request.deferred:
            read, ranks = self.hosts.read_elsewhere, {*self.request.answers}
            found = [*read.get(self.request.title, ())]  # others may drop some now
            self._unread |= {what for what in found if what[0] in ranks}
            self._lent_at = self.hosts.calls
            self.published |= {what: self._publication(what) for what in self._unread}

    def check_current(self) -> None:
        """Raise GroupBrokenError where the group was restarted."""
        try:
            self.hosts.check_current()
        except GroupBrokenError as error:
            raise GroupBrokenError(f"what {self.title} returned is gone: {error}") from None

    def check_there(self) -> None:
        """Raise GroupBrokenError where the results are gone."""
        self.check_current()
        if self.hosts.ended:
            raise GroupBrokenError(RESULT_GONE.format(self.title, self.hosts.ended))

    def _publication(self, what: _What, wanted: list[Any] | None = None) -> Any:
        rank, columns, lends = what
        return self.task("publish", rank, columns, lends, wanted)

    def task(self, name: str, rank: int, *args: Any) -> Any:
        """A reference to what a host does about a rank's result, in its turn. The last that it
        returns are the bytes that this moves, or None.
        """
        hosts = self.hosts
        # A turn that is taken and lost would hold up the host for ever.
        sending: Any = contextlib.nullcontext([]) if hosts.ordered else hosts.sending_a_call()
        with sending as refs:
            method, turn = getattr(hosts.handles[rank], name), hosts.turn(rank)
            if name == "stream":  # which may take long, and is then looked for
                method = method.options(name=self.title)
            returned = method.remote((self.token, rank), *args, turn)
            refs += [returned] if isinstance(returned, ray.ObjectRef) else returned
        refs[-1].future().add_done_callback(partial(_count_moved, self.record, refs[0]))
        return refs[0]

    def can_lend(self, rank: int, hosts: RayHosts, readers: Iterable[int]) -> bool:
        """Whether all these ranks of some hosts can map device memory of a rank's batch."""
        device = self.hosts.infos[rank].identity
        ids = (hosts.infos[reader].identity for reader in readers)
        lends = self.request.transport == "device" and device is not None
        return lends and all(i and i.reads(device) for i in ids)


def _got(
    refs: Sequence[Any],
    timeout_s: float | None,
    what: str,
    sites: Sequence[CallSite],
    hosts: RayHosts | None = None,
) -> list[Any]:
    """What tasks on these sites have returned, whose references these are.

    Raises:
        GetTimeoutError: some have not. GroupBrokenError: the group was restarted, or Ray is gone.
        The first cause of what went wrong.
    """
    try:
        found = get_all(refs, timeout_s, what, [site.rank for site in sites])
        if hosts is not None:
            hosts.check_current()
        return found
    except Exception as error:
        # What a worker raised may be of such a type, too.
        if type(error) in (GetTimeoutError, GroupBrokenError):
            raise
        if hosts is None:
            raise diagnose(error, refs, sites, {}) from None
        hosts.check_current()
        raise hosts.failed(error, refs, sites) from None


def _count_moved(record: Any, ref: Any, size: Any) -> None:
    if size.exception() is None:
        record.count("bytes_between", size.result() or 0)
    else:
        later(partial(raised, ref))  # whoever reads it is told, and Ray need not print it


def _release(hosts: RayHosts, token: str, request: Request, unread: set[_What]) -> None:
    """Have the hosts of a call let go of its results, once nobody borrows them any more; what was
    published ahead for nobody is not any more.
    """
    if hosts.gone or hosts.ended:
        return
    hosts.read_elsewhere.get(request.title, set()).difference_update(unread)
    if refs := hosts.lent().get(token):
        again = partial(_release, hosts, token, request, unread)
        threading.Thread(target=_after, args=(refs, again), daemon=True).start()
        return
    with hosts.sending:
        for rank in request.answers:
            hosts.handles[rank].release.remote((token, rank), hosts.turn(rank))


def _after(refs: list[Any], job: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # the cluster is gone
        ray.wait(refs, num_returns=len(refs), timeout=None, fetch_local=False)
    later(job)


class RemoteBatch:
    """One rank's batch of a call, or value of any kind: a `protocol.future.Source`.

    On the driver it has the call. Sent on, it has an `offer` instead: a reference to where the
    batch is published, unless no process that reads it needs that; or what is `kept` in the process
    that reads it.
    """

    def __init__(
        self,
        token: str,
        site: CallSite,
        made: _Answers | None,
        at: int,
        rows: int | Message | None = None,
        offer: Any = None,
        columns: Columns = None,
    ) -> None:
        self.token, self.site, self.made, self.at = token, site, made, at
        self._rows, self.offer, self.columns = rows, offer, columns
        self.kept: Kept | None = None
        self.reader: ProcessInfo | None = None  # where it is read
        self.opened: list[Pairs] | None = None  # by the call that reads it
        self.session: Any = None  # in which it was pinned

    def select(self, keys: Sequence[str], strict: bool) -> RemoteBatch:
        """Only these columns of it."""
        made = object.__new__(RemoteBatch)
        # A driver's own kind of string is one that hosts may not know.
        vars(made).update(vars(self), columns=(tuple(map(str.__str__, keys)), strict))
        return made

    @property
    def call(self) -> RemoteCall | None:
        """The call, where it was made by this process."""
        return self.made if isinstance(self.made, RemoteCall) else None

    @property
    def home(self) -> Home:
        """By what its process finds it."""
        return self.token, self.site.rank

    @property
    def key(self) -> tuple[str, int, Columns]:
        """What is published."""
        return *self.home, self.columns

    @property
    def rank(self) -> int:
        return self.site.rank

    @property
    def title(self) -> str:
        """The method that makes it, for messages."""
        return f"{self.site.role}.{self.site.method}".strip(".")

    @property
    def reference(self) -> Any:
        """Ray's reference to what says that the rank has finished."""
        return None if self.made is None else self.made.refs[self.at]

    @property
    def known(self) -> bool:
        """Whether the rows are, without waiting."""
        return self.made is None or self.made.known is not None

    @property
    def came(self) -> bool:
        """Whether it is known to be here: it came along with the answer."""
        return self.known and isinstance(self._told(), Message)

    def _told(self) -> int | Message | None:
        """What is known of it."""
        known = None if self.made is None else self.made.known
        return self._rows if known is None else known[self.at]

    def done(self) -> bool:
        """Whether its rank has finished."""
        if self.known or (self.call is not None and self.call.hosts.gone):
            return True
        return bool(ray.wait([self.reference], timeout=0, fetch_local=False)[0])

    def rows(self, timeout: float | None = None) -> int:
        """Wait for the worker to finish, and its peers, without fetching the batch."""
        if self.made is not None:
            self.made.rows(timeout)
        told = self._told()
        if told is None:
            where = {"role": self.site.role, "method": self.site.method}
            raise translate(TypeError(NO_BATCH.format(**where)), self.site)
        return 1 if isinstance(told, Message) else told

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        """Rows `start` to `stop` of the batch."""
        whole = (start, stop) == (0, self.rows(timeout))
        if isinstance(message := self._told(), Message):
            if self.call is not None:
                self.call.check_there()
                self.call.record.count("bytes_in", message.size)
            return message.read()
        if isinstance(self.offer, Offer):
            return self._pairs(self.offer)
        if self.kept is not None:
            return self.kept.rows(start, stop, self.columns)
        message = self._message(timeout)
        if whole and self.columns is None:
            return message.read()
        return read_rows(message, start, stop, self.columns)

    def _pairs(self, offer: Offer) -> Pairs:
        if self.opened is None:
            raise SendError(f"what {self.title} yields was passed twice, and can be read once")
        if self.kept is None:
            assert self.reader is not None
            found = borrowed(offer, self.reader, how_to_read(), self.title)
        else:
            found = made_here(*self.kept.pairs(), offer, how_to_read())
        self.opened.append(found)
        self.opened = None
        return found

    def published(self) -> Any:
        """A reference to where it is published; None where none is needed."""
        if self.session not in (None, session()):
            raise GroupBrokenError(GONE)
        if self.call is not None:
            self.call.check_there()
        if self.call is None or self.came:
            return self.offer
        return self.call.publish(self.site.rank, self.columns)

    def _message(self, timeout: float | None) -> Message:
        call, site = self.call, self.site
        if call is not None and timeout is None:
            timeout = call.limit
        hosts = None if call is None else call.hosts
        try:
            ref, title = self.published(), f"rows of {self.title}"
            [message] = _got([ref], timeout, title, [site], hosts)
        except GetTimeoutError:
            raise CallTimeoutError(
                f"{self.title}: rank {site.rank} has finished, and had not sent its "
                f"rows after {shown_seconds(timeout)} s: a later call keeps it busy",
                [site.rank],
                hosts.stacks([site.rank]) if hosts else {},
            ) from None
        assert message is not None, f"{self.key} is neither here nor published"
        if call is not None:
            call.record.count("bytes_in", message.size)
        return message  # type: ignore[no-any-return]

    async def arrive(self, whole: bool) -> bool:
        """Wait on the running event loop for the rows of all ranks, or for the `whole` batch to be
        here; whether they came in time.
        """
        if not whole and self.made is not None and not self.known:
            return await self.made.arrive()
        if not whole or self.kept is not None or self.came:
            return True
        limit = self.call.limit if self.call else None
        title = f"rows of {self.title}"
        return await all_arrived([self.published()], limit, title, [self.site.rank])

    def __reduce__(self) -> tuple[Any, ...]:
        return self.offered({})

    def offered(self, offers: Mapping[Any, Any]) -> tuple[Any, ...]:
        """As it is pickled, with what is offered of it, else with all of it published."""
        offer = offers[self.key] if self.key in offers else self.published()
        made, rows = (None, self._told()) if self.known else (self.made, None)
        return RemoteBatch, (self.token, self.site, made, self.at, rows, offer, self.columns)


class RayHandle(Handle[Any], ray.ObjectRef):  # type: ignore[type-arg]  # 2.41 has no parameter
    """A handle that Ray's own functions take, as those that wait: see `Answer` for what Ray gets.

    On its way to other processes it is a handle, and no reference.
    """

    def __init__(self, source: Any, ref: ray.ObjectRef[Any]) -> None:
        ray.ObjectRef.__init__(self, ref.binary(), ref.owner_address(), ref.call_site())
        self.source = source


def _remote(late: Sequence[Any]) -> list[RemoteBatch]:
    return [origin for origin in origins(late) if isinstance(origin, RemoteBatch)]


def _learn_rows(futures: Sequence[Any], request: Request, began: float) -> bool:
    """Wait for the rows of what is to be read, where the caller waits anyway: what goes wrong is
    raised. For others, look whether they are known by now.
    """
    found = _remote(futures)
    calls = {id(batch.call): batch.call for batch in found if batch.call is not None}
    for call in calls.values():
        call.check_current()
    for call in calls.values():
        if request.awaited:
            limit = request.timeout_s
            call.rows(None if limit is None else max(0.0, began + limit - time.monotonic()))
        elif call.known is None and call.done():
            with contextlib.suppress(Exception):  # which whoever reads it runs into
                call.rows(0)
    return all(batch.known for batch in found)


class _Routes:
    """How the futures among a call's values reach its ranks: what must be published for whom is
    sent before these calls are, and nothing else. `called`: what is sent that has futures, and to
    which ranks; `known`: whether their rows are.

    Where a future itself is the argument (`materialize=False`), the worker may keep it for later:
    then all that it reads is published.
    """

    def __init__(
        self,
        called: Sequence[tuple[Outgoing, list[int]]],
        hosts: RayHosts,
        request: Request,
        known: bool,
    ) -> None:
        # Which, by which ranks of other processes, and whether its own reads it, too.
        self.streams: list[tuple[RemoteBatch, Offer, tuple[int, ...], bool]] = []
        self._called, self._hosts, self._request = called, hosts, request
        self._relays: dict[RayHosts, Any] = {}
        self._loans: dict[RemoteCall, set[int]] = {}  # to which ranks
        self._perhaps: list[tuple[RemoteBatch, bool]] = []  # see `_offer`
        self.parts: dict[int, list[Any]] = {}  # by id of what is sent: the one of its futures
        self.own: dict[int, list[Home]] = {}  # by rank: what it reads of its own process
        self._sources: list[str] = []
        if called:
            self._plan(known)

    def _plan(self, known: bool) -> None:
        hosts = self._hosts
        futures = {id(future): future for out, _ in self._called for future in out.futures}
        if known:
            futures = {key: future.resolved() for key, future in futures.items()}
        lists = [[futures[id(future)] for future in out.futures] for out, _ in self._called]
        readers: dict[Any, tuple[RemoteBatch, Sequence[int]]] = {}  # of what, which lists
        for i, found in enumerate(lists):
            for batch in _remote([one for one in found if known or isinstance(one, Handle)]):
                readers.setdefault(batch.key, (batch, []))[1].append(i)  # type: ignore[attr-defined]
        rest = [] if known else [one for one in futures.values() if not isinstance(one, Handle)]
        for batch in _remote(rest):
            readers[batch.key] = batch, range(len(lists))
        away = (batch for batch, _ in readers.values() if batch.call and not batch.came)
        first = itertools.islice(away, _NAMED + 1)
        self._sources = [f"{batch.title} on rank {batch.rank}" for batch in first]
        number = {rank: i for i, (_, ranks) in enumerate(self._called) for rank in ranks}
        for batch, at in () if hosts.ordered else readers.values():
            if batch.call and batch.call.hosts is hosts and number.get(batch.rank) in at:
                self.own.setdefault(batch.rank, []).append(batch.home)
        offers = {key: self._offer(*read, number) for key, read in readers.items()}
        self._check_streams()
        self._sort_streams(lists)
        if self._perhaps:
            ranks = [ranks for _, ranks in self._called]
            keys = [batch.key for batch, _ in self._perhaps]
            ask = partial(_read_elsewhere, ranks, lists, keys)
            wanted = self._sorted_out(ask, len(self._perhaps), dict.fromkeys(readers))
            for (batch, lends), flag in zip(self._perhaps, wanted, strict=True):
                assert batch.call is not None
                offers[batch.key] = batch.call.publish(batch.site.rank, batch.columns, lends, flag)
        if known:
            parts: Sequence[Any] = [packed(found, Packer, offers=offers) for found in lists]
        else:
            parts = self._sorted_out(partial(_resolved, lists), len(lists), offers)
        self.parts = {id(out): [part] for (out, _), part in zip(self._called, parts, strict=True)}

    def _sorted_out(
        self, what: Callable[[], Any], count: int, offers: Mapping[Any, Any]
    ) -> Sequence[Any]:
        """References to what the first rank called finds out, so many values."""
        first = self._hosts.handles[self._called[0][1][0]]
        refs = first.sort_out.options(num_returns=count).remote(packed(what, Packer, offers=offers))
        return [refs] if count == 1 else refs

    def _offer(self, batch: RemoteBatch, at: Sequence[int], number: Mapping[int, int]) -> Any:
        """What a batch is sent with, for lists number `at` to read: where it is published, or None
        where only its own process reads it. Whether that is so may be left to the rows.
        """
        call, rank, hosts = batch.call, batch.site.rank, self._hosts
        if call is None or batch.came:
            return batch.published()
        here = call.hosts is hosts and number.get(rank) in at
        others = partial(self._others, at, rank if here else None)
        if call.request.bucket_bytes is not None:
            return self._stream(batch, tuple(sorted({*others()})), here)
        keeps = not self._request.materialize
        if next(others(), None) is None and not keeps:
            return None
        if lends := not keeps and call.can_lend(rank, hosts, others()):
            self._loans.setdefault(call, set()).update(others())
        what = rank, batch.columns, lends
        if here and isinstance(at, range) and not keeps and what not in call.published:
            self._perhaps.append((batch, lends))
            return None
        return call.publish(*what)

    def _stream(self, batch: RemoteBatch, others: tuple[int, ...], here: bool) -> Offer:
        """How all ranks that are passed the handle read what is yielded, together."""
        call, rank = batch.call, batch.site.rank
        assert call is not None
        assert call.request.bucket_bytes is not None
        call.check_there()
        if rank in call.streamed:
            raise SendError(READ_BEFORE.format(call.request.title, rank))
        if not self._request.materialize:
            raise SendError(
                f"{self._request.title} is registered with materialize_futures=False, and what "
                f"{batch.title} yields is read in the call that it is passed to"
            )
        readers = tuple(self._hosts.infos[other].process for other in others)
        lends = bool(others) and call.can_lend(rank, self._hosts, others)
        if others and call.hosts not in self._relays:
            self._relays[call.hosts] = call.hosts.relay()
        relay = self._relays[call.hosts] if others else None
        offer = Offer(batch.home, relay, readers, call.request.bucket_bytes, lends)
        self.streams.append((batch, offer, others, here))
        return offer

    def _check_streams(self) -> None:
        """Raise SendError where a process would have to read before it has made what others read
        with it.
        """
        infos = self._hosts.infos
        reading = {
            infos[rank].process
            for batch, _, others, here in self.streams
            for rank in (*others, *([batch.site.rank] if here else ()))
        }
        for batch, _, _, here in self.streams:
            assert batch.call is not None
            if not here and batch.call.hosts.infos[batch.site.rank].process in reading:
                raise SendError(
                    f"rank {batch.site.rank} of {batch.title} is to read what another rank yields, "
                    "and to make for others what it does not read itself: pass it that, too, or "
                    "send one call after another"
                )

    def _sort_streams(self, lists: Sequence[Sequence[Any]]) -> None:
        """Put them in the order in which all ranks are passed them: a process makes one after
        another. Raises SendError where there is none.
        """
        if len(self.streams) < 2:
            return
        streams = {stream[0].key: stream for stream in self.streams}
        order = TopologicalSorter[Any](dict.fromkeys(streams, ()))
        for found in lists:
            keys = [batch.key for batch in _remote(found) if batch.key in streams]
            for before, key in itertools.pairwise(keys):
                order.add(key, before)
        try:
            self.streams = [streams[key] for key in order.static_order()]
        except CycleError:
            raise SendError(
                "ranks are passed what is yielded in different orders, and would wait for one "
                "another: pass it to all of them in the same order"
            ) from None

    def _others(self, at: Iterable[int], rank: int | None) -> Iterator[int]:
        return (other for i in at for other in self._called[i][1] if other != rank)

    def sent(self, made: RemoteCall) -> None:
        """Note the calls that read what is lent to their ranks, and what this one reads."""
        made.sources = self._sources
        refs = {site.rank: ref for site, ref in zip(made.sites, made.refs, strict=True)}
        for call, ranks in self._loans.items():
            call.hosts.lend(call.token, [refs[rank] for rank in ranks])

    @contextlib.contextmanager
    def meeting(self, made: RemoteCall) -> Generator[None]:
        """Within this context readers of streams are sent their call; the makers have theirs."""
        makers: list[Any] = []
        try:
            for batch, offer, _, here in self.streams:
                assert batch.call is not None
                rank = batch.site.rank
                batch.call.streamed.add(rank)
                makers.append(None if here else batch.call.task("stream", rank, offer))
            yield
        finally:
            calls = {s.rank: (s, [ref]) for s, ref in zip(made.sites, made.refs, strict=False)}
            for (batch, offer, others, here), ref in zip(self.streams, makers, strict=False):
                if others and batch.call is not None:
                    maker = calls.get(batch.site.rank) if here else (batch.site, [ref])
                    readers = {
                        process: calls[rank]
                        for process, rank in zip(offer.readers, others, strict=True)
                        if rank in calls
                    }
                    ended = offer.at.watch.remote(offer, maker, readers)
                    count = partial(_count_moved, batch.call.record, ended)
                    ended.future().add_done_callback(count)


def _read_elsewhere(
    ranks: Sequence[list[int]], lists: Sequence[Sequence[Any]], keys: Sequence[Any]
) -> list[bool]:
    """By batch, whether any rank but the one that made it reads rows of it."""
    needed = set()
    for readers, futures in zip(ranks, lists, strict=True):
        for batch in _remote([future.resolved() for future in futures]):
            if readers != [batch.site.rank]:
                needed.add(batch.key)
    return [key in needed for key in keys]


def _resolved(lists: Sequence[Sequence[Any]]) -> list[Message]:
    """By list of futures, the same made of nothing that is not read."""
    return [Message.of([future.resolved() for future in futures], Packer) for futures in lists]


def pin(data: Batch) -> DataProtoFuture:
    """Copy a batch into shared memory, as a future that is done.

        pinned = pin(data)
        log_probs = actor.log_probs(pinned)  # each rank takes its rows from shared memory
        values = critic.values(pinned)       # and no byte leaves the driver again

    It is the batch as it is now: what is written into `data` later does not show. The memory is
    free once the future, and what was made of it, are gone. Sent on, it is as any future: to groups
    of any size, by rows, `select`ed, and without a copy where the method is `reads_only`.

    Raises:
        BatchTypeError: neither a DataProto nor a TensorDict.
        ResourceError: Ray has not been started.
    """
    from protocol import BatchTypeError, DataProto, DataProtoFuture
    from protocol.batches import batch_rows, is_batch

    if not is_batch(data):
        raise BatchTypeError(f"data must be a DataProto or TensorDict; got {type(data).__name__}")
    check_started()
    site, stored = CallSite("", "pin", 0, "", 0), ray.put(Message.of(data, Packer))
    batch = RemoteBatch(uuid.uuid4().hex, site, None, 0, batch_rows(data), stored)
    batch.session = session()
    return DataProtoFuture([batch], isinstance(data, DataProto) and data.is_padding_enabled())
