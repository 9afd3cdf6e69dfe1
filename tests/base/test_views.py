"""Groups as values of a type: views, teams, and what an editor shows."""

from __future__ import annotations

import inspect
import pydoc

from protocol import DataProto
from single_controller import ClassWithInitArgs, GroupView, ResourcePool, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import Colocated, colocate
from single_controller.testing import InlineGroups


class Actor(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def where(self, x: int) -> int:
        """Where it is.

        Args:
            x: added to the rank.
        """
        return self.rank + x

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto, *, epochs: int = 1) -> DataProto:
        return batch

    def plain(self) -> None: ...


class ActorGroup(GroupView, Actor): ...


class Team(Colocated):
    actor: ActorGroup


def test_a_view_is_the_group_itself_and_a_team_the_roles_themselves(
    inline_group: InlineGroups,
) -> None:
    group = inline_group(Actor, ranks=2)
    assert ActorGroup.of(group) is group
    pool = ResourcePool([2])
    roles = inline_group.enter_context(colocate(pool, actor=ClassWithInitArgs(Actor)))
    assert Team.of(roles) is roles
    assert Team.of(roles).actor.where(1) == [1, 2]


def test_help_completion_and_signature_are_the_workers(inline_group: InlineGroups) -> None:
    group = inline_group(Actor)
    assert {"update", "where", "describe"} <= set(dir(group))
    assert "plain" not in dir(group)
    assert list(inspect.signature(group.update).parameters) == ["batch", "epochs"]
    shown = pydoc.plain(pydoc.render_doc(group.where))
    assert "Actor.where(x: int) -> int" in shown
    assert "x: added to the rank." in shown
