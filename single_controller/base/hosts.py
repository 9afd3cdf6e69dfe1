"""Hosts: the processes of a group, for all its views: whether calls can be trusted to them, and
which others take over.

What a host is, and how a call reaches it, is left to the backends.
"""

from __future__ import annotations

import abc
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from single_controller.base.explain import RankState
from single_controller.errors import GroupBrokenError, WorkerDiedError

__all__ = ["Generation", "Hosts", "allowed_restarts"]

_logger = logging.getLogger(__name__)


class Generation(abc.ABC):
    """The hosts that were started together, one per rank, and what is known against them.

    `broken`: why no call can be trusted to them. `ended`: why they are closed. `replaced`: others
    have taken over, or are about to, and no result of these counts any more.
    """

    def __init__(
        self, infos: Sequence[Any], roles: Sequence[str], address: tuple[str, int]
    ) -> None:
        self.infos, self.roles, self.address = list(infos), tuple(roles), address
        self.broken: str | None = None
        self.ended: str | None = None
        self.replaced = False

    def check_usable(self) -> None:
        """Raise GroupBrokenError where a call could not be trusted, or would wait for ever; these
        hosts are there.
        """
        if self.ended is not None:
            raise GroupBrokenError(self.ended)
        if self.broken is None:
            self.look()
        if self.broken is not None:
            raise GroupBrokenError(f"{self.broken}. restart() the group, or close() it")

    def check_current(self) -> None:
        """Raise GroupBrokenError where others have taken over, or these cannot be reached."""
        if self.replaced:
            raise GroupBrokenError(self.ended or "the group is being restarted")
        self.check_there()

    @property
    def gone(self) -> bool:
        """Whether what they ran on was shut down, so that nothing can be asked of them."""
        return False

    def check_there(self) -> None:  # noqa: B027
        """Raise GroupBrokenError where they are gone."""

    @abc.abstractmethod
    def look(self) -> None:
        """See whether ranks are still in a call that was given up; raise GroupBrokenError if so."""

    @abc.abstractmethod
    def find_dead(self) -> WorkerDiedError | None:
        """A rank that has ended, if there is one; they are broken from then on."""

    @abc.abstractmethod
    def states(self) -> Sequence[RankState]:
        """How each rank is; one whose group takes no calls is broken, or dead."""

    @abc.abstractmethod
    def stacks(self) -> dict[int, str]:
        """By rank, what the worker's code is doing now."""

    @abc.abstractmethod
    def end(self, why: str) -> None:
        """End them, and return when they are gone; calls then raise GroupBrokenError with `why`."""


def allowed_restarts(on_failure: str, max_restarts: int) -> int:
    """How often a call on a broken group may start it anew before it is sent.

    Raises:
        ValueError: neither "raise" nor "restart", or less than no restart.
    """
    if on_failure not in ("raise", "restart"):
        raise ValueError(f"on_failure must be 'raise' or 'restart'; got {on_failure!r}")
    if not (isinstance(max_restarts, int) and max_restarts >= 0):
        raise ValueError(f"max_restarts must be a count; got {max_restarts!r}")
    return max_restarts if on_failure == "restart" else 0


class Hosts:
    """The present generation of a group's hosts, which all views on them share.

    `start_again` starts others like them; None where they were not started from here. Calls do so
    themselves while there were fewer than the `allowed` restarts.
    """

    def __init__(
        self, now: Any, start_again: Callable[[], Any] | None = None, allowed: int = 0
    ) -> None:
        self.current: list[Any] = [now]  # for who outlives this
        self.restarts = 0
        self.closed = False
        self._start_again, self._allowed = start_again, allowed
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there is nothing to start them from."""
        return Hosts, (self.now,)

    @property
    def now(self) -> Any:
        """The generation that takes calls, or would."""
        return self.current[0]

    def usable(self) -> Any:
        """The generation to send a call to.

        Raises:
            GroupBrokenError: it cannot be trusted, and may not be restarted.
            What `restart` raises.
        """
        with self._lock:
            self.now.check_there()  # which no restart would mend
            try:
                self.now.check_usable()
            except GroupBrokenError as error:
                if self.closed or self._start_again is None or self.restarts >= self._allowed:
                    raise
                _logger.warning("restarting the group after %s", error)
                self.restart()
            return self.now

    def restart(self) -> None:
        """End the hosts and start others from what these were started from, in their places.

        Raises:
            GroupBrokenError: the group is closed, or attached to hosts of another driver.
            What starting a group raises; the group is then broken, and may be restarted again.
        """
        with self._lock:
            self.now.check_there()
            if self.closed:
                raise GroupBrokenError("a closed group cannot be restarted; make a new one")
            if self._start_again is None:
                raise GroupBrokenError(
                    "this group is attached to running hosts; only where they were started from "
                    "can they be restarted"
                )
            self.now.replaced = True
            self.now.end("the group was restarted, and this call was sent to its former processes")
            self.restarts += 1
            try:
                self.current[:] = [self._start_again()]
            except BaseException as error:
                self.now.ended = f"the group's restart failed: {error}"
                raise

    def close(self) -> None:
        """End the hosts and return when they are gone. Calls raise GroupBrokenError afterwards."""
        with self._lock:
            self.closed = True
            self.now.end("the group is closed")

    def watch(
        self, every_n_seconds: float, on_death: Callable[[WorkerDiedError], object] | None
    ) -> None:
        """Look every so often, in a thread, for a rank that has ended, until the group does.

        Raises:
            ValueError: `every_n_seconds` is no interval.
        """
        if not 0 < every_n_seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"every_n_seconds must be above 0 and finite; got {every_n_seconds!r}")
        mine = weakref.ref(self)

        def watch() -> None:
            pause, reported = threading.Event(), None
            while (hosts := mine()) is not None and not hosts.closed and not hosts.now.gone:
                now = hosts.now
                try:
                    if now is not reported and (death := now.find_dead()) is not None:
                        reported = now
                        if on_death is not None:
                            on_death(death)
                except (Exception, SystemExit):  # on_death's, too: there is more to watch
                    _logger.exception("the aliveness check failed")
                del hosts, now
                pause.wait(every_n_seconds)

        threading.Thread(target=watch, daemon=True, name="aliveness").start()
