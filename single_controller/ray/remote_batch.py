"""Calls on hosts, and batches that stay in the workers that made them: where they are, who reads
them, when they go.

A result without blocking stays with its host (`shelf`), and the driver gets a `RemoteBatch` for it.
A call on the same process takes it there; before a call goes to other processes, and when the
driver itself or a pickler asks, the driver puts `publish` into the queue of the host that has it.
A publication waits behind what its host was told before, so that of a method whose last result was
read elsewhere is sent right behind the call.

Each rank is told only of the batches that it reads. Who reads what depends on how many rows there
are. A caller who waits anyway waits for these first. For others the first rank called sorts it out
for all of them, when its turn comes: `resolve` tells each its own, and if batches may be read in
their own process as well as elsewhere, `weigh` tells their hosts which to publish. So what that
rank was told before holds up its peers, too.

No order of calls can dead-lock. Put all tasks (calls, publications, and those that sort out who
reads what) in the order in which the driver sent them. A task waits for earlier tasks in its host's
queue, for earlier calls whose rows it needs to know, and for what else it reads. All of these were
sent before it: for a call, first the task that weighs, then the publications that wait for it, then
the one that resolves; and all after the calls that make the batches. So the first unfinished task
waits for nothing.

Pairs that are yielded are made and read at the same time, by tasks that wait for each other. So all
that is sent for a call that reads what comes later is sent together, under one lock: what must be
published, then the tasks that make pairs, then the call. Take the first of these calls that has not
ended. What its tasks find before them in their queues was sent for earlier ones, or waits for
nothing but its own queue; so all get their turn, and then wait only for each other. None stands
before another of them: a process that makes pairs for others either makes them in the very call
that reads them, or is refused if it reads any. Two streams of one process are made one after the
other; that all ranks read them in this order is left to the user, and so are drivers that pass
pairs to and fro between the same groups at the same time.

A host on an event loop runs more than its first task at a time, and waits for no more: a call's
turn comes after earlier calls have started, what waits for others does so in threads of their own,
and only calls, releases and the tasks that make pairs have a turn. A method that reads pairs in the
loop itself stops it meanwhile: what makes them must not wait for what is awaited there.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.exceptions import GetTimeoutError

from single_controller.base.dispatch import padding_setting
from single_controller.base.message import (
    ONLY_PASSED,
    READ_BEFORE,
    Message,
    Outbox,
    Outgoing,
    how_to_read,
    packed,
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
    session,
    shown_seconds,
    translate,
)
from single_controller.ray.hosts import RayHosts, later
from single_controller.ray.message import LARGE, SMALL, Answer, Head, Packer, sealed
from single_controller.ray.placement import check_started
from single_controller.ray.shelf import Kept
from single_controller.ray.stream import Offer, Pairs, borrowed, made_here

if TYPE_CHECKING:
    from protocol import DataProtoFuture
    from protocol.batches import Batch

# Held while a call and what it needs of others are sent: or two could wait for each other.
_together = threading.RLock()
Columns: TypeAlias = "tuple[tuple[str, ...], bool] | None"  # which, and whether all must be there
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
    ranks: dict[int, list[int]] = {}  # of each of the different ones
    for rank, out in enumerate(outbox.by_rank):
        ranks.setdefault(id(out), []).append(rank)
    different = {id(out): out for out in outbox.by_rank if out is not None}
    # Before any is sent: ranks whose peers get no call would wait for them.
    routes = _Routes([(out, ranks[key]) for key, out in different.items()], hosts, request, began)
    padding, answering = padding_setting(), frozenset(request.answers)
    sites, callables = hosts.sites(request.role, request.method), hosts.callables(request.title)
    lent = hosts.lent()
    alike: dict[Any, Any] = {}  # the same for ranks that are told the same
    with routes.together():
        letters = {
            key: (placed(out, len(ranks[key])), routes.parts(out)) for key, out in different.items()
        }
        made = RemoteCall(hosts, request, began)
        meeting = routes.meeting(made) if routes.streams else contextlib.nullcontext()
        with meeting, hosts.sending_a_call() as refs:
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
                    made.token if request.deferred and rank in answering else None,
                    tuple(routes.claims.get(rank, ())),
                    mark(request.record.number, hosts) if request.record.number else None,
                    padding,
                    request.bucket_bytes is not None and request.deferred,
                    lent,
                )
                key = id(outgoing), head
                if key not in alike:
                    alike[key] = sealed(head, *letters[id(outgoing)])
                refs.append(callables[rank].remote(*alike[key]))
                made.sent(sites[rank], refs[-1], head.turn)
    routes.sent(made)
    made.publish_ahead()
    return made


class RemoteCall(Pending):
    """One call on its way: for each called rank a reference to its output, or, where outputs stay
    with their hosts, to the rows of it. Those are let go of once nobody holds this any more.
    """

    def __init__(self, hosts: RayHosts, request: Request, began: float) -> None:
        self.hosts, self.request, self.record = hosts, request, request.record
        self.sites: list[CallSite] = []
        self.refs: list[Any] = []
        self.known: _Rows | None = None  # by rank called
        self.streamed = set[int]()  # the ranks whose pairs are being read, or were
        self._turns: dict[int, tuple[str, int]] = {}
        self.limit = request.timeout_s
        self._deadline = None if self.limit is None else began + self.limit
        self._lock = threading.RLock()
        self._hold = _Hold(hosts, f"{uuid.uuid4().hex}", request) if request.deferred else None
        if self._hold is not None:
            weakref.finalize(self, later, self._hold.release).atexit = False

    @property
    def token(self) -> str:
        """What the hosts know its results by."""
        return "" if self._hold is None else self._hold.token

    def sent(self, site: CallSite, ref: Any, turn: tuple[str, int] | None) -> None:
        """Note that a rank has its call."""
        self.sites.append(site)
        self.refs.append(ref)
        if turn is not None:
            self._turns[site.rank] = turn

    def __reduce__(self) -> tuple[Any, ...]:
        return _Made, (self.refs, tuple(self.sites))

    def _ranks(self) -> list[int]:
        return [site.rank for site in self.sites]

    def _answers(self) -> list[int]:
        """Which of the called ranks answer, in order."""
        at = {rank: i for i, rank in enumerate(self._ranks())}
        return [at[rank] for rank in self.request.answers]

    def _left(self, timeout_s: float | None) -> float | None:
        """The seconds asked for, or else what is left of the call's own time."""
        if timeout_s is not None or self._deadline is None:
            return timeout_s
        return max(0.0, self._deadline - time.monotonic())

    def wait(self, timeout_s: float | None) -> list[Any]:
        outputs = self._outputs(timeout_s)
        return [self._read(outputs[i], self.sites[i]) for i in self._answers()]

    def _outputs(self, timeout_s: float | None) -> list[Any]:
        hosts = self.hosts
        hosts.check_current()
        try:
            left = self._left(timeout_s)
            outputs = get_all(self.refs, left, self.request.title, self._ranks())
            hosts.check_current()
        except GetTimeoutError:
            seconds = self.limit if timeout_s is None else timeout_s
            raise hosts.timed_out(
                self.refs, self.sites, seconds or 0, give_up=timeout_s is None
            ) from None
        except GroupBrokenError:
            raise
        except Exception as error:
            hosts.check_current()
            raise hosts.failed(error, self.refs, self.sites) from None
        except BaseException:
            hosts.interrupted(self.refs, self.sites)
            raise
        return outputs

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
        left = self._left(None)
        return await all_arrived(self.refs, left, self.request.title, self._ranks())

    def done(self) -> bool:
        if self.hosts.gone:
            return True
        ready, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        return len(ready) == len(self.refs)

    def cancel(self) -> bool:
        return self.hosts.cancel(self._turns)

    def handles(self, batched: bool) -> list[Any]:
        if self._hold is None:
            return [self.refs[i] for i in self._answers()]
        found = [RemoteBatch(self.token, self.sites[i], self, i) for i in self._answers()]
        return found if batched else [RayHandle(source, source.reference) for source in found]

    def rows(self, timeout_s: float | None) -> _Rows:
        """Wait for all ranks, also those whose output is not needed; what each keeps."""
        if self.known is None:
            self.known = _told(self._outputs(timeout_s))
        return self.known

    def publish(
        self, rank: int, columns: Columns = None, lends: bool = False, ahead: bool = False
    ) -> Any:
        """A reference to a rank's batch in shared memory, or with `lends` to claims on it. `ahead`:
        nobody has asked for it yet.
        """
        hold = self._checked_hold()
        if self.request.bucket_bytes is not None:
            raise TypeError(ONLY_PASSED.format(self.request.title))
        key = rank, columns, lends
        with self._lock:
            if not ahead:
                hold.unread.discard(key)
                self.hosts.read_elsewhere.setdefault(hold.habit, set()).add(key)
            if key not in hold.published:
                hold.published[key] = self._publication(*key)
            return hold.published[key]

    def publish_if(self, wanted: Any, rank: int, columns: Columns, lends: bool) -> Any:
        """The same; to None unless `wanted`, a reference, turns out to be true."""
        self._checked_hold()
        with self._lock:
            return self._publication(rank, columns, lends, [wanted])

    @property
    def published(self) -> Mapping[tuple[int, Columns, bool], Any]:
        """What is, whether a reader needs it or not."""
        return self._checked_hold().published

    def publish_ahead(self) -> None:
        """Publish what the last call's readers would have had to wait for behind later calls."""
        if (hold := self._hold) is not None:
            habits, ranks = self.hosts.read_elsewhere.get(hold.habit, ()), {*self.request.answers}
            hold.unread = {key for key in habits if key[0] in ranks}
            for key in [*hold.unread]:
                self.publish(*key, ahead=True)

    def _checked_hold(self) -> _Hold:
        self.hosts.check_current()
        if self.hosts.ended:
            raise GroupBrokenError(
                f"{self.hosts.ended}: results that were still in its workers are gone. "
                "Fetch what you need of a future before the group closes"
            )
        assert self._hold is not None
        return self._hold

    def _publication(
        self, rank: int, columns: Columns, lends: bool, wanted: list[Any] | None = None
    ) -> Any:
        hosts, hold = self.hosts, self._hold
        assert hold is not None
        hold.publications[rank] += 1
        publish = hosts.handles[rank].publish
        batch, size = publish.remote(hold.token, columns, lends, wanted)
        self._moves(size)
        return batch

    def _moves(self, size: Any) -> None:
        """Count bytes that a task says it has moved, once it does."""
        self._checked_hold()
        size.future().add_done_callback(partial(_count_moved, self.record))

    def check_unread(self, rank: int) -> None:
        """Raise SendError where what a rank yields was passed on before."""
        self._checked_hold()
        if rank in self.streamed:
            raise SendError(READ_BEFORE.format(self.request.title, rank))

    def stream(self, rank: int, offer: Offer) -> Any:
        """Have a rank make what it yields for others; the reference to its task."""
        hosts, hold = self.hosts, self._checked_hold()
        hold.publications[rank] += 1
        with hosts.sending:
            make = hosts.handles[rank].stream
            ref = make.remote(hold.token, offer, hosts.turn(rank))
        self._moves(ref)
        return ref

    def can_lend(self, rank: int, hosts: RayHosts, readers: Iterable[int]) -> bool:
        """Whether all these ranks of some hosts can map device memory of a rank's batch."""
        device = self.hosts.infos[rank].identity
        ids = (hosts.infos[reader].identity for reader in readers)
        lends = self.request.transport == "device" and device is not None
        return lends and all(i and i.reads(device) for i in ids)

    def lent_to(self, refs: Iterable[Any]) -> None:
        """Keep the memory at least until these calls have ended."""
        assert self._hold is not None
        self._hold.lend(refs)
        self.hosts.lend(self._hold)


def _told(outputs: Iterable[Any]) -> _Rows:
    return tuple(o if not isinstance(o, Answer) else o.message or 1 for o in outputs)


def _count_moved(record: Any, size: Any) -> None:
    if size.exception() is None:  # of which whoever reads what was to move is told
        record.count("bytes_between", size.result())


class _Hold:
    """The driver's hold on the results of one call: without it, their hosts let go of them."""

    def __init__(self, hosts: RayHosts, token: str, request: Request) -> None:
        self._hosts, self.token = hosts, token
        self.habit = request.role, request.method
        self.publications = dict.fromkeys(request.answers, 0)  # by rank: how many tasks were sent
        self.published: dict[tuple[int, Columns, bool], Any] = {}
        self._lock = threading.Lock()
        self.borrowers: list[Any] = []
        self.unread = set[tuple[int, Columns, bool]]()  # published ahead, and nobody asked

    def release(self) -> None:
        """Let hosts let go of the results, once nobody borrows them any more."""
        hosts = self._hosts
        if hosts.gone:
            return
        if self.unread and (habits := hosts.read_elsewhere.get(self.habit)):
            habits -= self.unread
            if not habits:
                hosts.read_elsewhere.pop(self.habit, None)
        self.published.clear()
        if self.borrowers:
            threading.Thread(target=self._release_after, daemon=True).start()
            return
        with hosts.sending:
            for rank, count in self.publications.items() if not hosts.ended else ():
                hosts.handles[rank].release.remote(self.token, count, hosts.turn(rank))

    def lend(self, refs: Iterable[Any]) -> None:
        """Note calls that borrow."""
        with self._lock:
            self.borrowers = list(dict.fromkeys([*self.borrowers, *refs]))

    def lasts(self) -> bool:
        """Whether a call that borrows has not ended."""
        with self._lock:
            if self.borrowers and not self._hosts.gone:
                count = len(self.borrowers)
                _, left = ray.wait(self.borrowers, num_returns=count, timeout=0, fetch_local=False)
                self.borrowers = left
            return bool(self.borrowers)

    def _release_after(self) -> None:
        borrowers = self.borrowers
        with contextlib.suppress(Exception):  # the cluster is gone
            ray.wait(borrowers, num_returns=len(borrowers), timeout=None, fetch_local=False)
        with self._lock:
            self.borrowers = []
        later(self.release)


class _Made:
    """What another process knows of a call whose rows were not known when it was told."""

    def __init__(self, refs: Sequence[Any], sites: tuple[CallSite, ...]) -> None:
        self.refs, self.sites = list(refs), sites
        self.known: _Rows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Made, (self.refs, self.sites)

    def rows(self, timeout_s: float | None) -> _Rows:
        """Wait for all ranks; see `RemoteCall.rows`."""
        if self.known is None:
            title = f"{self.sites[0].role}.{self.sites[0].method}"
            ranks = [site.rank for site in self.sites]
            try:
                self.known = _told(get_all(self.refs, timeout_s, title, ranks))
            except GetTimeoutError:
                raise CallTimeoutError(
                    f"{title}: its ranks {ranks} had not all finished after "
                    f"{shown_seconds(timeout_s)} s",
                    ranks,
                ) from None
            except GroupBrokenError:
                raise
            except Exception as error:
                raise diagnose(error, self.refs, self.sites, {}).error from None
        return self.known


class RemoteBatch:
    """One rank's batch of a call, or value of any kind: a `protocol.future.Source`.

    On the driver it holds the call. Sent on, it has an `offer` instead: a reference to where the
    batch is published, unless no process that reads it needs that; or what is `kept` in the process
    that reads it.
    """

    def __init__(
        self,
        token: str,
        site: CallSite,
        made: RemoteCall | _Made | None,
        at: int,
        rows: int | Message | None = None,
        offer: Any = None,
        columns: Columns = None,
    ) -> None:
        self.token, self.site, self.made, self.at = token, site, made, at
        self._rows, self.offer, self.columns = rows, offer, columns
        self.kept: Kept | None = None
        self.reader = -1  # the rank that reads it, in the process where it is
        self.opened: list[Pairs] | None = None  # by the call that reads it
        self.session: Any = None  # in which it was pinned

    @property
    def call(self) -> RemoteCall | None:
        """The call, where it was made by this process."""
        return self.made if isinstance(self.made, RemoteCall) else None

    @property
    def home(self) -> tuple[str, int]:
        """By what its process finds it."""
        return self.token, self.site.rank

    @property
    def key(self) -> tuple[str, int, Columns]:
        """What is published."""
        return *self.home, self.columns

    def select(self, keys: Sequence[str], strict: bool) -> RemoteBatch:
        """Only these columns of it."""
        where = self.token, self.site, self.made, self.at, self._rows, self.offer
        made = RemoteBatch(*where, (tuple(keys), strict))
        made.kept, made.session = self.kept, self.session
        return made

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

    def done(self) -> bool:
        """Whether its rank has finished."""
        if self.known or (self.call is not None and self.call.hosts.gone):
            return True
        return bool(ray.wait([self.reference], timeout=0, fetch_local=False)[0])

    def rows(self, timeout: float | None = None) -> int:
        """Wait for the worker to finish, and its peers, without fetching the batch."""
        rows = self._told(timeout)
        if rows is None:
            where = {"role": self.site.role, "method": self.site.method}
            raise translate(TypeError(NO_BATCH.format(**where)), self.site)
        return 1 if isinstance(rows, Message) else rows

    def _told(self, timeout: float | None) -> int | Message | None:
        return self._rows if self.made is None else self.made.rows(timeout)[self.at]

    @property
    def came(self) -> bool:
        """Whether it is known to be here: it came along with the answer."""
        return self.known and isinstance(self._told(0), Message)

    def fetch(self, start: int, stop: int, timeout: float | None = None) -> Any:
        """Rows `start` to `stop` of the batch."""
        call, rows = self.call, self.rows(timeout)
        if isinstance(message := self._told(timeout), Message):
            if call is not None:
                call.hosts.check_current()
                call.record.count("bytes_in", message.size)
            return message.read()
        if isinstance(self.offer, Offer):
            return self._pairs(self.offer)
        if self.kept is not None:
            return self.kept.rows(start, stop, self.columns)
        ref, whole = self.offer, (start, stop) == (0, rows)
        if call is not None:
            ref = call.publish(self.site.rank, self.columns)
            timeout = call.limit if timeout is None else timeout
        message = self._published(ref, timeout)
        assert message is not None, f"{self.key} is neither here nor published"
        batch = self._read(message, whole)
        if self.columns is None and whole:
            return batch
        from protocol.batches import lend_rows, select_keys

        if self.columns is not None:
            if isinstance(batch, Exception):
                raise translate(batch, self.site)
            batch = select_keys(batch, *self.columns)
        return batch if whole else lend_rows(batch, start, stop)

    def _pairs(self, offer: Offer) -> Pairs:
        if self.opened is None:
            raise SendError(f"what {self.title} yields was passed twice, and can be read once")
        if self.kept is None:
            found = borrowed(offer, self.reader, how_to_read())
        else:
            found = made_here(*self.kept.pairs(), offer, how_to_read())
        self.opened.append(found)
        self.opened = None
        return found

    def _check_there(self) -> None:
        if self.session not in (None, session()):
            raise GroupBrokenError(GONE)

    def _published(self, ref: Any, timeout: float | None) -> Message | None:
        call, site = self.call, self.site
        self._check_there()
        try:
            message: Any
            [message] = get_all([ref], timeout, f"rows of {self.title}", [site.rank])
        except GetTimeoutError:
            raise CallTimeoutError(
                f"{self.title}: rank {site.rank} has finished, and had not sent its "
                f"rows after {shown_seconds(timeout)} s: a later call keeps it busy",
                [site.rank],
                call.hosts.stacks([site.rank]) if call else {},
            ) from None
        except GroupBrokenError:
            raise
        except Exception as error:
            if call is None:
                raise translate(error, site) from None
            call.hosts.check_current()
            raise call.hosts.failed(error, [ref], [site]) from None
        if call is not None:
            call.hosts.check_current()
            if message is not None:
                call.record.count("bytes_in", message.size)
        return message  # type: ignore[no-any-return]

    def _read(self, message: Message, whole: bool) -> Any:
        if whole:
            return message.read()
        from protocol.wire import read_as, reading

        how = reading()
        with read_as("join" if how == "own" else how):
            return message.read()

    async def arrive(self, whole: bool) -> bool:
        """Wait on the running event loop for the rows of all ranks, or for the `whole` batch to be
        here; whether they came in time.
        """
        call, made = self.call, self.made
        if call is not None:
            call.hosts.check_current()
        if whole and self.kept is None and not self.came:
            ref = self.offer if call is None else call.publish(self.site.rank, self.columns)
            limit = call.limit if call else None
            return await all_arrived([ref], limit, f"rows of {self.title}", [self.site.rank])
        if made is None or made.known is not None:
            return True
        limit = call._left(None) if call else None
        ranks = [site.rank for site in made.sites]
        return await all_arrived(made.refs, limit, self.title, ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.offered({})

    def offered(self, offers: Mapping[Any, Any]) -> tuple[Any, ...]:
        """As it is pickled, with what is offered of it, else with all of it published."""
        offer, call = self.offer, self.call
        self._check_there()
        if self.key in offers:
            offer = offers[self.key]
        elif call is not None and not self.came:
            offer = call.publish(self.site.rank, self.columns)
        made, rows = (None, self._told(0)) if self.known else (self.made, None)
        return RemoteBatch, (self.token, self.site, made, self.at, rows, offer, self.columns)


class RayHandle(Handle[Any], ray.ObjectRef):  # type: ignore[type-arg]  # 2.41 has no parameter
    """A handle that Ray's own functions take, as those that wait: see `Answer` for what Ray gets.

    On its way to other processes it is a handle, and no reference.
    """

    def __init__(self, source: Any, ref: ray.ObjectRef[Any]) -> None:
        ray.ObjectRef.__init__(self, ref.binary(), ref.owner_address(), ref.call_site())
        self._source = source

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self._source,)


def _remote(late: Sequence[Any]) -> list[RemoteBatch]:
    return [origin for origin in origins(late) if isinstance(origin, RemoteBatch)]


class _Routes:
    """How the futures among a call's values reach its ranks: what must be published for whom is
    sent before these calls are, and nothing else. `called`: what is sent, and to which ranks.

    Where a future itself is the argument (`materialize=False`), the worker may keep it for later:
    then all that it reads is published.
    """

    def __init__(
        self,
        called: Sequence[tuple[Outgoing, list[int]]],
        hosts: RayHosts,
        request: Request,
        began: float,
    ) -> None:
        self.claims: dict[int, dict[tuple[str, int], None]] = {}  # by rank: what it has itself
        self._loans: dict[RemoteCall, set[int]] = {}  # to which ranks
        self.streams: list[tuple[RemoteBatch, Offer, int | None]] = []  # and who reads its own
        self._parts: dict[int, Any] = {}  # by id of what is sent: its futures
        self._called = [(out, ranks) for out, ranks in called if out.futures]
        self._hosts, self._request = hosts, request
        self._futures = {id(future): future for out, _ in self._called for future in out.futures}
        self._known = _learn_rows([*self._futures.values()], request, began)

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Within this context the call is sent; what it needs of others is."""
        with _together if self._called else contextlib.nullcontext():
            if self._called:
                self._plan()
            yield

    def _plan(self) -> None:
        futures, known = self._futures, self._known
        if known:
            futures = {key: future.resolved() for key, future in futures.items()}
        lists = [[futures[id(future)] for future in out.futures] for out, _ in self._called]
        batches = {batch.key: batch for batch in _remote([*futures.values()])}
        readers: dict[Any, Any] = {key: [] if known else range(len(lists)) for key in batches}
        for i, read in enumerate(lists if known else ()):
            for batch in _remote(read):
                readers[batch.key].append(i)
        offers, perhaps = self._offers(batches, readers, known)
        self._check_streams()
        first = self._hosts.handles[self._called[0][1][0]]
        if perhaps:
            reading = [(ranks, read) for (_, ranks), read in zip(self._called, lists, strict=True)]
            asked = reading, [batch.key for batch, _ in perhaps]
            told = packed(asked, Packer, offers=dict.fromkeys(batches))
            wanted = _several(first.weigh, told, perhaps)
            for (batch, lends), flag in zip(perhaps, wanted, strict=True):
                where = batch.site.rank, batch.columns, lends
                offers[batch.key] = batch.call.publish_if(flag, *where)
        if known:
            parts = [packed(read, Packer, offers=offers) for read in lists]
        else:
            parts = _several(first.resolve, packed(lists, Packer, offers=offers), lists)
        self._parts = {id(out): part for (out, _), part in zip(self._called, parts, strict=True)}

    def _offers(
        self, batches: Mapping[Any, RemoteBatch], readers: Mapping[Any, Any], known: bool
    ) -> tuple[dict[Any, Any], list[tuple[Any, bool]]]:
        """By key, where a batch is published; and those of which the rows decide whether any rank
        but their own reads them, with whether they are lent.
        """
        hosts, keeps = self._hosts, not self._request.materialize
        number = {rank: i for i, (_, ranks) in enumerate(self._called) for rank in ranks}
        offers, perhaps = {}, []
        for key, batch in batches.items():
            call, rank, offers[key] = batch.call, batch.site.rank, batch.offer
            if call is None or batch.came:
                continue
            if call.request.bucket_bytes is not None:
                offers[key] = self._stream(batch)
                continue
            here = call.hosts is hosts and number.get(rank) in readers[key]
            if here:
                self.claims.setdefault(rank, {})[batch.home] = None
            others = partial(self._others, readers[key], rank if here else None)
            if next(others(), None) is None and not keeps:
                continue
            if lends := not keeps and call.can_lend(rank, hosts, others()):
                self._loans.setdefault(call, set()).update(others())
            where = rank, batch.columns, lends
            if here and not (known or keeps or where in call.published):
                perhaps.append((batch, lends))
            else:
                offers[key] = call.publish(*where)
        return offers, perhaps

    def _stream(self, batch: RemoteBatch) -> Offer:
        """How all ranks that are passed the handle read what is yielded, together."""
        call, rank = batch.call, batch.site.rank
        assert call is not None
        size = call.request.bucket_bytes
        assert size is not None
        call.check_unread(rank)
        if not self._request.materialize:
            raise SendError(
                f"{self._request.title} is registered with materialize_futures=False, and what "
                f"{batch.title} yields is read in the call that it is passed to"
            )
        passed = [
            i
            for i, (out, _) in enumerate(self._called)
            if any(one.key == batch.key for one in _remote(out.futures))
        ]
        ranks = {reader for i in passed for reader in self._called[i][1]}
        here = rank if call.hosts is self._hosts and rank in ranks else None
        others = tuple(sorted(ranks - {here}))
        if here is not None:
            self.claims.setdefault(rank, {})[batch.home] = None
        lends = bool(others) and call.can_lend(rank, self._hosts, others)
        offer = Offer(batch.home, call.hosts.relay() if others else None, others, size, lends)
        self.streams.append((batch, offer, here))
        return offer

    def _check_streams(self) -> None:
        """Raise SendError where a process would have to read before it has made what others read
        with it.
        """
        infos = self._hosts.infos
        read = {
            r for _, offer, here in self.streams for r in (*offer.readers, here) if r is not None
        }
        reading = {(infos[rank].node_ip, infos[rank].pid) for rank in read}
        for batch, _, here in self.streams:
            site = batch.site
            if here is None and (site.node_ip, site.pid) in reading:
                raise SendError(
                    f"rank {site.rank} of {batch.title} is to read what another rank yields, and "
                    "to make for others what it does not read itself: pass it that, too, or send "
                    "one call after another"
                )

    def _others(self, numbers: Iterable[int], rank: int | None) -> Iterator[int]:
        return (other for i in numbers for other in self._called[i][1] if other != rank)

    def parts(self, outgoing: Outgoing) -> list[Any]:
        """The parts of what is sent, of which its futures are the last."""
        found = self._parts.get(id(outgoing))
        return outgoing.parts if found is None else [*outgoing.parts, found]

    def sent(self, made: RemoteCall) -> None:
        """Note the calls that read what is lent to their ranks."""
        refs = {site.rank: ref for site, ref in zip(made.sites, made.refs, strict=True)}
        for call, ranks in self._loans.items():
            call.lent_to(refs[rank] for rank in ranks)

    @contextlib.contextmanager
    def meeting(self, made: RemoteCall) -> Generator[None]:
        """Within this context readers of streams are sent their call; the makers have theirs."""
        makers: list[Any] = []
        try:
            for batch, offer, here in self.streams:
                assert batch.call is not None
                batch.call.streamed.add(batch.site.rank)
                alone = offer.at is None or here is not None
                makers.append(None if alone else batch.call.stream(batch.site.rank, offer))
            yield
        finally:
            calls = {s.rank: (s, [ref]) for s, ref in zip(made.sites, made.refs, strict=False)}
            for (batch, offer, here), ref in zip(self.streams, makers, strict=False):
                if offer.at is not None:
                    maker = (batch.site, [ref]) if here is None else calls.get(here)
                    readers = [calls[rank] for rank in offer.readers if rank in calls]
                    offer.at.watch.remote(offer, maker, readers)


def _several(method: Any, message: Message, of: Sequence[Any]) -> list[Any]:
    """References to what a host's method returns for each of these."""
    refs = method.options(num_returns=len(of)).remote(message)
    return [refs] if len(of) == 1 else refs


def _learn_rows(futures: Sequence[Any], request: Request, began: float) -> bool:
    """Wait for the rows of what is to be read, where the caller waits anyway: what goes wrong is
    raised. For others, look whether they are known by now.
    """
    found = _remote(futures)
    calls = {id(batch.call): batch.call for batch in found if batch.call is not None}
    for call in calls.values():
        call.hosts.check_current()
    for call in calls.values():
        if request.awaited:
            limit = request.timeout_s
            call.rows(None if limit is None else max(0.0, began + limit - time.monotonic()))
        elif call.known is None and call.done():
            with contextlib.suppress(Exception):  # which whoever reads it runs into
                call.rows(0)
    return all(batch.known for batch in found)


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
    batch = RemoteBatch(
        uuid.uuid4().hex,
        CallSite("", "pin", 0, "", 0),
        None,
        0,
        batch_rows(data),
        ray.put(Message.of(data, Packer)),
    )
    batch.session = session()
    return DataProtoFuture([batch], isinstance(data, DataProto) and data.is_padding_enabled())
