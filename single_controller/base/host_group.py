"""Groups on hosts, which hold several roles each: a view for each role, all on the same hosts.

What a host is and how a call reaches it is left to the backends.
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from single_controller import checks
from single_controller.base.dispatch import Mode
from single_controller.base.plan import Layout
from single_controller.base.resource_pool import ResourcePool
from single_controller.base.roles import ClassWithInitArgs, W
from single_controller.base.supervisor import Replaceable, Supervisor
from single_controller.base.table import GroupTable, Place, RankState
from single_controller.base.worker import Worker, check_worker_env
from single_controller.base.worker_group import WorkerGroup
from single_controller.errors import UnknownRoleError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HostGroup", "SomeHosts"]


class SomeHosts(Replaceable, Protocol):
    """What a group needs of its hosts besides calling them."""

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def infos(self) -> Sequence[Place]: ...
    @property
    def address(self) -> tuple[str, int]: ...
    def states(self) -> Sequence[RankState]: ...


class HostGroup(WorkerGroup[W]):
    """A role's ranks on hosts, or, with the role "", the hosts of several roles.

    A context manager: leaving it closes the group, and all views on its hosts with it.
    """

    _classes: Mapping[str, type[Worker]]
    call_timeout_s: float | None
    _supervisor: Supervisor[Any]
    _layouts_of: SomeHosts

    def __init__(
        self,
        resource_pool: ResourcePool | None,
        name_prefix: str | None,
        worker_env: Mapping[str, str] | None,
        startup_timeout_s: float | None,
        call_timeout_s: float | None,
    ) -> None:
        """Refuse options that would fail on their first use.

        Raises:
            ValueError: no time, or a variable that each rank gets its own of.
            TypeError: no string, or no dict of strings.
        """
        super().__init__(resource_pool)
        prefix = "" if name_prefix is None else name_prefix
        checks.instance(str, "name_prefix", prefix, "a string, or None")
        checks.seconds("startup_timeout_s", startup_timeout_s)
        checks.seconds("call_timeout_s", call_timeout_s)
        check_worker_env(worker_env)

    @property
    @abc.abstractmethod
    def _hosts(self) -> SomeHosts: ...

    def _start(
        self,
        supervisor: Supervisor[Any],
        resource_pool: ResourcePool | None,
        ray_cls_with_init: ClassWithInitArgs | None,
        call_timeout_s: float | None,
    ) -> None:
        """Be the group of what the hosts hold.

        Raises:
            ValueError: they hold other roles than `ray_cls_with_init` says.
        """
        self._supervisor, self._layouts_of = supervisor, supervisor.hosts
        self.resource_pool = resource_pool
        self.ray_cls_with_init = ray_cls_with_init
        self.call_timeout_s = call_timeout_s
        self._classes = {}
        hosts = self._hosts
        if ray_cls_with_init is not None:
            roles, role = ray_cls_with_init.roles(), ray_cls_with_init.role
            if len(roles) == len(hosts.roles) == 1 and role:
                # Whatever its name: the class given says which methods the group has.
                roles, role = dict(zip(hosts.roles, roles.values(), strict=True)), hosts.roles[0]
            if tuple(roles) != hosts.roles:
                raise ValueError(
                    f"the running hosts hold roles {list(hosts.roles)}, and ray_cls_with_init says "
                    f"{list(roles)}"
                )
            self._classes = {name: spec.cls for name, spec in roles.items()}
            self._take_role(role)
        elif len(hosts.roles) == 1:
            self._take_role(hosts.roles[0])

    def _take_role(self, role: str) -> None:
        self.role = role
        if role in self._classes:
            self._bind(self._classes[role])

    def _usable(self) -> Any:
        return self._supervisor.usable()

    def _layout(self, mode: Mode) -> Layout:
        hosts = self._supervisor.usable()
        if hosts is not self._layouts_of:
            self._dispatch_info, self._collect_info, self._layouts_of = {}, {}, hosts
        return super()._layout(mode)

    @property
    def world_size(self) -> int:
        return len(self._hosts.infos)

    @property
    def master_address(self) -> str:
        """Where `torch.distributed` of this group meets; "" for workers of several groups."""
        return self._hosts.address[0]

    @property
    def master_port(self) -> str:
        """The port of `master_address`, as bound by rank 0's process."""
        return str(self._hosts.address[1])

    def spawn(self, prefix_set: Iterable[str]) -> dict[str, Self]:
        """A group for each named role of the hosts. They share the processes; closing one, or
        this group, ends them all.

        Raises:
            UnknownRoleError: the hosts hold no such role.
        """
        wanted = [prefix_set] if isinstance(prefix_set, str) else prefix_set
        return {role: self._view(role) for role in wanted}

    def fuse(self, prefix_set: Iterable[str]) -> None:
        """Make each named role's group an attribute of this one: `group.actor.update(batch)`.

        Raises:
            UnknownRoleError: the hosts hold no such role.
        """
        views = self.spawn(prefix_set)
        for role in views:
            if hasattr(type(self), role) or role in self._methods:
                raise ValueError(f"role {role!r} cannot be an attribute: groups have one already")
        for role, view in views.items():
            setattr(self, role, view)

    def _view(self, role: str) -> Self:
        roles = self._hosts.roles
        if role not in roles:
            close = difflib.get_close_matches(str(role), roles, n=1)
            hint = f": did you mean {close[0]!r}?" if close else "."
            raise UnknownRoleError(f"unknown role {role!r}{hint} The hosts hold {list(roles)}")
        view = object.__new__(type(self))
        WorkerGroup.__init__(view, self.resource_pool)
        view.resource_pool, view.ray_cls_with_init = self.resource_pool, self.ray_cls_with_init
        view.call_timeout_s = self.call_timeout_s
        view._classes = self._classes
        view._supervisor, view._layouts_of = self._supervisor, self._hosts
        view._take_role(role)
        return view

    def _explain_missing(self, name: str) -> str:
        if name == "spawn_fused":
            return "veRL's spawn_fused is spawn, or fuse, here: docs/from_verl.md has what differs"
        if not self.role:
            roles = list(self._hosts.roles)
            return f"this group is the host of roles {roles}: call {name!r} on spawn({roles})[role]"
        return super()._explain_missing(name)

    def __repr__(self) -> str:
        what = self.role or f"roles {list(self._hosts.roles)}"
        return f"<{type(self).__name__} of {what} on {self.world_size} ranks>"

    def describe(self) -> GroupTable:
        """rank → role → node → device → pid → state, as a value that prints as a table."""
        roles = (self.role,) if self.role else self._hosts.roles
        return GroupTable.of(self._hosts.infos, roles, self._hosts.states(), self._cluster())

    def _cluster(self) -> str:
        """The address of the cluster that the hosts run on; "" where there is none."""
        return ""

    @abc.abstractmethod
    def stacks(self) -> dict[int, str]:
        """By rank, the Python stack of each thread that runs the worker's code, now; also of
        ranks that are stuck.
        """

    def restart(self) -> None:
        """Start the group anew: other hosts and another rendezvous, the same ranks and devices, all
        roles built from their specs. Then each worker's `restore()` is called, if it has one.

        All groups on these hosts follow. Calls that were under way raise GroupBrokenError.

        Raises:
            GroupBrokenError: the group is closed, or was started by another driver.
            What starting a group raises; then it may be tried again.
        """
        self._supervisor.restart()

    @property
    def restarts(self) -> int:
        """How often the group was restarted."""
        return self._supervisor.restarts

    def close(self) -> None:
        """End the hosts, with all their roles, and return when they are gone.

        Calls raise GroupBrokenError from then on.
        """
        self._supervisor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
