"""The successive hosts of a group: which take calls, when others take over, when they end.

What a failure means for one set of hosts is left to `hosts`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from single_controller.errors import GroupBrokenError, WorkerDiedError
from single_controller.ray.hosts import Hosts
from single_controller.ray.start import Recipe

__all__ = ["RestartPolicy", "Supervisor"]

_logger = logging.getLogger(__name__)


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


class Supervisor:
    """Holds a group's hosts for all its views, so that they follow when the hosts are restarted.

    Hosts that are dropped without `close` end once their calls have; stuck ones are killed.
    """

    def __init__(
        self, hosts: Hosts, recipe: Recipe | None = None, policy: RestartPolicy = RestartPolicy()
    ) -> None:
        self.hosts = hosts
        self.restarts = 0
        self._recipe, self._policy = recipe, policy
        self._closed = False
        self._lock = threading.RLock()
        self._current = [hosts]
        if recipe is not None and not recipe.options.detached:
            weakref.finalize(self, _drop, self._current)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there is nothing to start them from."""
        return Supervisor, (self.hosts,)

    def usable(self) -> Hosts:
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
        if self._closed or self._recipe is None or self._policy.on_failure == "raise":
            raise error
        limit = self._policy.max_restarts
        if self.restarts >= limit:
            raise GroupBrokenError(
                f"{error} It was restarted {self.restarts} times, and max_restarts={limit}"
            ) from None
        _logger.warning("restarting the group (%d of %d): %s", self.restarts + 1, limit, error)
        self.restart()

    def restart(self) -> None:
        """End the hosts and start others from what these were started from, in their bundles.

        Raises:
            GroupBrokenError: the group is closed, or attached to hosts of another driver.
            What starting a group raises; the group is then broken, and may be restarted again.
        """
        with self._lock:
            if self._closed:
                raise GroupBrokenError("a closed group cannot be restarted; make a new one")
            if self._recipe is None:
                raise GroupBrokenError(
                    "this group is attached to running hosts; only where they were started from "
                    "can they be restarted"
                )
            self.hosts.retire()
            self.restarts += 1
            try:
                self.hosts = self._recipe.start(restored=True)
            except BaseException as error:
                self.hosts.closed_because = f"the group's restart failed: {error}"
                raise
            self._current[:] = [self.hosts]

    def watch(
        self, every_n_seconds: float, on_death: Callable[[WorkerDiedError], Any] | None
    ) -> None:
        """Look every so often, in a thread, for a process that has ended, until the group does."""
        mine = weakref.ref(self)

        def look() -> None:
            pause = threading.Event()
            reported: Hosts | None = None
            while (supervisor := mine()) is not None and not supervisor._closed:
                hosts = supervisor.hosts
                if hosts is not reported and (death := _find_dead(hosts)) is not None:
                    reported = hosts
                    if on_death is not None:
                        on_death(death)
                del supervisor, hosts
                pause.wait(every_n_seconds)

        threading.Thread(target=look, daemon=True, name="aliveness").start()

    def close(self) -> None:
        """End the hosts and return when they are gone. Calls raise GroupBrokenError afterwards."""
        with self._lock:
            self._closed = True
            self.hosts.close()


def _find_dead(hosts: Hosts) -> WorkerDiedError | None:
    try:
        return hosts.find_dead()
    except Exception:
        _logger.exception("the aliveness check could not look at the group")
        return None


def _drop(current: list[Hosts]) -> None:
    for hosts in current:
        if ray.is_initialized() and not hosts.closed and (hosts.broken or not hosts.settle(0)):
            hosts.close()
