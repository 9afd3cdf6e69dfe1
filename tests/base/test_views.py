"""Groups as values of a type: methods by the worker class's, views, roles; what an editor shows."""

from __future__ import annotations

import inspect
import pydoc

import pytest

from protocol import DataProto
from single_controller import (
    ClassWithInitArgs,
    GroupView,
    RegistrationError,
    ResourcePool,
    UnknownMethodError,
    Worker,
)
from single_controller.base.decorator import Dispatch, register
from single_controller.inline import Colocated, colocate
from single_controller.testing import InlineGroups


class Base(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def where(self, x: int) -> int:
        """Where it is.

        Args:
            x: added to the rank.
        """
        return self.rank + x


class Actor(Base):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto, *, epochs: int = 1) -> DataProto:
        return batch

    def plain(self) -> None: ...


class Other(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def where(self, x: int) -> int:
        return x


class BaseGroup(GroupView, Base): ...


class ActorGroup(GroupView, Actor): ...


class OtherGroup(GroupView, Other): ...


class NoGroup(GroupView): ...


class Team(Colocated):
    actor: ActorGroup


class OtherTeam(Colocated):
    actor: OtherGroup


class LargeTeam(Team):
    critic: OtherGroup


def test_register_returns_the_function_itself() -> None:
    assert inspect.isfunction(Actor.update)
    assert inspect.isfunction(Base.where)


def test_a_method_is_found_by_that_of_the_worker_class(inline_group: InlineGroups) -> None:
    group = inline_group(Actor, ranks=2)
    assert group[Actor.where](3) == group[Base.where](3) == group.where(3) == [3, 4]
    assert group[Base.where].options(ranks=[1]).submit(x=1).result() == [2]
    with pytest.raises(UnknownMethodError, match=r"Other\.where is no method of Actor"):
        group[Other.where]
    with pytest.raises(UnknownMethodError, match=r"Actor\.plain is not registered"):
        group[Actor.plain]  # type: ignore[index]
    with pytest.raises(TypeError, match=r"by that of the worker class.*group\.where"):
        group["where"]  # type: ignore[index]


def test_a_view_is_the_group_itself(inline_group: InlineGroups) -> None:
    group = inline_group(Actor, ranks=2)
    assert ActorGroup.of(group) is group
    assert BaseGroup.of(group).where(1) == [1, 2]


def test_a_view_of_another_worker_class_is_refused(inline_group: InlineGroups) -> None:
    group = inline_group(Base)
    for view, message in (
        (OtherGroup, "OtherGroup is a view of groups of Other; this is of Base"),
        (ActorGroup, "ActorGroup is a view of groups of Actor; this is of Base"),
        (NoGroup, r"NoGroup is a view of no worker class: say class NoGroup\(GroupView, Actor\)"),
    ):
        with pytest.raises(RegistrationError, match=message):
            view.of(group)


def test_roles_are_viewed_as_a_team_whose_members_are_checked(inline_group: InlineGroups) -> None:
    pool = ResourcePool([2])
    roles = inline_group.enter_context(colocate(pool, actor=ClassWithInitArgs(Actor)))
    team = Team.of(roles)
    assert team is roles
    assert team.actor.where(1) == [1, 2]
    with pytest.raises(RegistrationError, match="OtherGroup is a view of groups of Other; this"):
        OtherTeam.of(roles)
    with pytest.raises(RegistrationError, match=r"has the role 'critic'; there are \['actor'\]"):
        LargeTeam.of(roles)

    class Local(GroupView, Actor): ...

    class LocalTeam(Colocated):
        actor: Local

    assert LocalTeam.of(roles).actor.where(1) == [1, 2]


def test_help_completion_and_signature_are_the_workers(inline_group: InlineGroups) -> None:
    group = inline_group(Actor)
    assert {"update", "where", "describe"} <= set(dir(group))
    assert "plain" not in dir(group)
    assert list(inspect.signature(group.update).parameters) == ["batch", "epochs"]
    shown = pydoc.plain(pydoc.render_doc(group.where))
    assert "Actor.where(x: int) -> int" in shown
    assert "x: added to the rank." in shown
