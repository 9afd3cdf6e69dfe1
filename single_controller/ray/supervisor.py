"""What only hosts that are processes need of a supervisor: someone who looks whether they live,
their end when nobody holds them, and that of a reservation which nobody else can give back.
Restarts are `base.supervisor`'s.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial

from single_controller.base.supervisor import RestartPolicy, Supervisor, check_watch, tell
from single_controller.errors import WorkerDiedError
from single_controller.ray.hosts import Hosts, later
from single_controller.ray.reservations import give_back
from single_controller.ray.start import Recipe

__all__ = ["RaySupervisor"]

_logger = logging.getLogger(__name__)


class RaySupervisor(Supervisor[Hosts]):
    """Hosts that are dropped without `close` end once their calls have; stuck ones are killed."""

    def __init__(
        self, hosts: Hosts, recipe: Recipe | None = None, policy: RestartPolicy | None = None
    ) -> None:
        start_again = partial(recipe.start, restored=True) if recipe is not None else None
        super().__init__(hosts, start_again, policy)
        self._current = [hosts]
        if recipe is not None and not recipe.options.detached:
            # At the driver's end Ray ends all processes of its groups.
            weakref.finalize(self, later, partial(_drop, self._current)).atexit = False

    def usable(self) -> Hosts:
        self.hosts.check_there()  # which no restart would mend
        return super().usable()

    def restart(self) -> None:
        self.hosts.check_there()
        super().restart()
        self._current[:] = [self.hosts]

    def close(self) -> None:
        """End the hosts and return when they are gone. Where they were not started from here, the
        detached placement groups that nothing else runs in go with them.
        """
        with self._lock:
            super().close()
            if self._start_again is None and not self.hosts.gone:
                give_back([handle._actor_id.hex() for handle in self.hosts.handles])

    def watch(
        self, every_n_seconds: float, on_death: Callable[[WorkerDiedError], object] | None
    ) -> None:
        """Look every so often, in a thread, for a process that has ended, until the group does.

        Raises:
            ValueError: `every_n_seconds` is no interval. TypeError: `on_death` is no function.
        """
        check_watch(every_n_seconds, on_death)
        mine = weakref.ref(self)

        def look() -> None:
            pause = threading.Event()
            reported: Hosts | None = None
            while (supervisor := mine()) is not None and not supervisor.closed:
                hosts = supervisor.hosts
                if hosts.gone:
                    return
                if hosts is not reported and (death := _find_dead(hosts)) is not None:
                    reported = hosts
                    if on_death is not None:
                        tell(on_death, death)
                del supervisor, hosts
                pause.wait(every_n_seconds)

        threading.Thread(target=look, daemon=True, name="aliveness").start()


def _find_dead(hosts: Hosts) -> WorkerDiedError | None:
    try:
        return hosts.find_dead()
    except Exception:
        _logger.exception("the aliveness check could not look at the group")
        return None


def _drop(current: list[Hosts]) -> None:
    for hosts in current:
        if not hosts.gone and not hosts.closed and (hosts.broken or not hosts.settle(0)):
            threading.Thread(target=hosts.close, daemon=True).start()  # it takes seconds
