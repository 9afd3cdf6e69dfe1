"""The successive hosts of a group: which take calls, and when others take over.

What hosts are, and what a failure means for one set of them, is left to the backends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from single_controller import checks
from single_controller.errors import GroupBrokenError, WorkerDiedError

__all__ = ["Replaceable", "RestartPolicy", "Supervisor", "check_watch", "tell"]

_logger = logging.getLogger(__name__)


class Replaceable(Protocol):
    """Hosts that others may take over from."""

    closed_because: str | None

    def check_usable(self) -> None:
        """Raise GroupBrokenError where a call could not be trusted."""

    def retire(self) -> None:
        """Close for others to take over: from then on, no result of these hosts counts."""

    def close(self) -> None:
        """End them, and return when they are gone; calls then raise GroupBrokenError."""


H = TypeVar("H", bound=Replaceable)


def check_watch(
    every_n_seconds: float, on_death: Callable[[WorkerDiedError], object] | None
) -> None:
    """Raise where nobody can look at this interval (ValueError), or be told (TypeError)."""
    checks.interval("every_n_seconds", every_n_seconds)
    checks.function("on_death", on_death)


def tell(on_death: Callable[[WorkerDiedError], object], death: WorkerDiedError) -> None:
    """Call a user's callback; what it raises is logged, since whoever tells has more to do."""
    try:
        on_death(death)
    except (Exception, SystemExit):
        _logger.exception("on_death raised when it was told: %s", death.args[0])


@dataclass(frozen=True)
class RestartPolicy:
    """What the next call on a broken group does: raise, or start the group anew first, at most
    `max_restarts` times.

    Raises:
        ValueError: neither "raise" nor "restart", or less than no restart.
    """

    on_failure: str = "raise"
    max_restarts: int = 3

    def __post_init__(self) -> None:
        if self.on_failure not in ("raise", "restart"):
            raise ValueError(f"on_failure must be 'raise' or 'restart'; got {self.on_failure!r}")
        if not (isinstance(self.max_restarts, int) and self.max_restarts >= 0):
            raise ValueError(f"max_restarts must be a count; got {self.max_restarts!r}")


class Supervisor(Generic[H]):
    """Holds a group's hosts for all its views, so that they follow when the hosts are restarted.

    `start_again` starts others like them; None where they were not started from here.
    """

    def __init__(
        self,
        hosts: H,
        start_again: Callable[[], H] | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.hosts = hosts
        self.restarts = 0
        self.closed = False
        self._start_again, self._policy = start_again, policy or RestartPolicy()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there is nothing to start them from."""
        return type(self), (self.hosts,)

    def usable(self) -> H:
        """The hosts to send a call to.

        Raises:
            GroupBrokenError: they cannot be trusted, and may not be restarted.
            What `restart` raises.
        """
        with self._lock:
            try:
                self.hosts.check_usable()
            except GroupBrokenError as error:
                self._restart_after(error)
            return self.hosts

    def _restart_after(self, error: GroupBrokenError) -> None:
        if self.closed or self._start_again is None or self._policy.on_failure == "raise":
            raise error
        limit = self._policy.max_restarts
        if self.restarts >= limit:
            raise GroupBrokenError(
                f"{error} It was restarted {self.restarts} times, and max_restarts={limit}"
            ) from None
        _logger.warning("restarting the group (%d of %d): %s", self.restarts + 1, limit, error)
        self.restart()

    def restart(self) -> None:
        """End the hosts and start others from what these were started from, in their places.

        Raises:
            GroupBrokenError: the group is closed, or attached to hosts of another driver.
            What starting a group raises; the group is then broken, and may be restarted again.
        """
        with self._lock:
            if self.closed:
                raise GroupBrokenError("a closed group cannot be restarted; make a new one")
            if self._start_again is None:
                raise GroupBrokenError(
                    "this group is attached to running hosts; only where they were started from "
                    "can they be restarted"
                )
            self.hosts.retire()
            self.restarts += 1
            try:
                self.hosts = self._start_again()
            except BaseException as error:
                self.hosts.closed_because = f"the group's restart failed: {error}"
                raise

    def close(self) -> None:
        """End the hosts and return when they are gone. Calls raise GroupBrokenError afterwards."""
        with self._lock:
            self.closed = True
            self.hosts.close()
