"""What users see on workers, groups, views and colocated roles. `# E` marks lines with an error."""

from typing_extensions import assert_type

from protocol import DataProto, DataProtoFuture
from single_controller import (
    Broadcast,
    ClassWithInitArgs,
    GroupView,
    Handle,
    PerRank,
    ResourcePool,
    Worker,
)
from single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.inline import Colocated, InlineWorkerGroup, colocate
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup


class Actor(Worker):
    def __init__(self, scale: float, name: str = "") -> None:
        super().__init__()
        self.scale = scale

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update(self, batch: DataProto, epochs: int = 1) -> DataProto:
        assert_type(self.loss(batch), float)
        return batch

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def loss(self, batch: DataProto) -> float:
        return self.scale

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def generate(self, prompt: str) -> str:
        return prompt

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def later(self, batch: DataProto) -> DataProto:
        return batch

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("mesh"), uneven=True)
    def meshed(self, batch: DataProto) -> DataProto:
        return batch

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def metric(self, batch: DataProto) -> dict[str, float]:
        return {}

    @register(execute_mode=Execute.RANK_ZERO)
    def save(self, path: str) -> str:
        return path

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def version(self) -> int:
        return 1

    @register()
    def scatter(self, x: int) -> int:
        return x


class ActorGroup(GroupView, Actor): ...


def on_the_worker(actor: Actor, batch: DataProto) -> None:
    assert_type(actor.update(batch), DataProto)
    assert_type(actor.loss(batch), float)
    assert_type(actor.later(batch), DataProto)
    assert_type(actor.scatter(1), int)
    actor.loss("batch")  # E


async def on_the_group(group: ActorGroup, batch: DataProto) -> None:
    assert_type(group.update(batch, epochs=2), DataProto)
    assert_type(group.loss(batch), list[float])
    assert_type(group.generate("x"), list[str])
    assert_type(group.later(batch), DataProtoFuture)
    assert_type(group.meshed(batch), DataProto)
    assert_type(group.metric(batch), list[dict[str, float]])
    group.save("path")
    assert_type(group.version(), int)
    group.scatter([1, 2])
    assert_type(group.loss.submit(batch).result(timeout=3), list[float])
    assert_type(await group.loss.submit(batch), list[float])
    assert_type(group.loss.options(ranks=[0])(batch), list[float])
    group.loss(3)  # E
    group.update(batch, epoch=2)  # E
    group.update()  # E
    group.nothing()  # E


def what_stands_for_a_value(group: ActorGroup, batch: DataProto) -> None:
    future = group.later(batch)
    assert_type(group.update(future.as_input()), DataProto)
    assert_type(group.update(batch, epochs=PerRank([1, 2]).as_input()), DataProto)
    assert_type(group.update(batch, epochs=Broadcast(1).as_input()), DataProto)
    group.update(future)  # E
    group.update(batch, epochs=PerRank(["1", "2"]).as_input())  # E
    group.update(batch, epochs=Broadcast(1))  # E


def deadlines(group: ActorGroup, batch: DataProto) -> None:
    assert_type(group.loss.submit(batch, timeout_s=3).result(), list[float])
    assert_type(group.loss.options(timeout_s=3).submit(batch).result(), list[float])
    group.loss.submit(3)  # E
    group.loss.submit(batch, timeout=3)  # E
    group.loss.options(timeout_s=3).submit(3)  # E


def by_a_view(group: RayWorkerGroup[Actor]) -> None:
    with ActorGroup.of(group) as actor:
        assert_type(actor, ActorGroup)
        assert_type(str(actor.describe()), str)


class Team(Colocated):
    actor: ActorGroup


def roles(pool: ResourcePool, batch: DataProto) -> None:
    spec = ClassWithInitArgs(Actor, 1.0, name="a")
    with Team.of(colocate(pool, actor=spec)) as team:
        assert_type(team.actor.loss(batch), list[float])
        team.actor.loss(3)  # E


def specs(pool: RayResourcePool) -> None:
    assert_type(RayWorkerGroup(pool, RayClassWithInitArgs(Actor, 1.0)), RayWorkerGroup[Actor])
    inline = InlineWorkerGroup(pool, ClassWithInitArgs(Actor, scale=2.0))
    assert_type(inline.workers[0].scale, float)
    ClassWithInitArgs(Actor, "large")  # E
    RayClassWithInitArgs(Actor, 1.0, nam="a")  # E
    ClassWithInitArgs(Actor)  # E


def untyped(group: RayWorkerGroup) -> None:
    group.anything("as before", still=True)


class Trainer(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def weights(self, since: int = 0) -> dict[str, str]:
        return {}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def state(self) -> str:
        return ""

    @register(dispatch_mode=Dispatch.RANK_ZERO, blocking=False)
    def first(self) -> str:
        return ""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, blocking=False)
    def metrics(self, batch: DataProto) -> float:
        return 0.0

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load(self, weights: dict[str, str]) -> None:
        assert_type(self.first(), str)


class TrainerGroup(GroupView, Trainer): ...


async def handles(group: TrainerGroup, batch: DataProto, any_one: Handle[object]) -> None:
    weights = group.weights(since=3)
    assert_type(weights, list[Handle[dict[str, str]]])
    assert_type(weights[0].get(timeout=3), dict[str, str])
    assert_type(await weights[0], dict[str, str])
    assert_type(group.state(), list[Handle[str]])
    group.load(group.first().as_input())
    assert_type(group.metrics(batch), list[Handle[float]])
    assert_type(group.load(weights[0].as_input()), list[None])
    group.load(PerRank([one.as_input() for one in weights]).as_input())
    group.load(any_one.as_input())  # E
    group.load(weights[0])  # E
    group.weights(since="now")  # E
    any_one = weights[0]
