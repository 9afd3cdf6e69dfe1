"""Programs in the shape in which veRL's users write them; only the import prefix is ours."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
import ray
import torch

from protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from single_controller.base import Worker
from single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, ResourcePoolManager
from single_controller.ray.base import (
    RayWorkerGroup,
    create_colocated_worker_cls,
    create_colocated_worker_cls_fused,
    create_colocated_worker_raw_cls,
    split_resource_pool,
)

pytestmark = pytest.mark.slow


class Role(Enum):
    ACTOR = "actor"
    CRITIC = "critic"


def one_number_per_rank(worker_group: Any, *args: Any, **kwargs: Any) -> Any:
    size = worker_group.world_size
    spread = tuple([arg + rank for rank in range(size)] for arg in args)
    return spread, {key: [value] * size for key, value in kwargs.items()}


def total(worker_group: Any, output: Any) -> Any:
    assert len(output) == worker_group.world_size
    return sum(output)


class Engine(Worker):
    """A worker inside a worker, as veRL's trainers nest them."""

    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info("train", dp_rank=self.rank, is_collect=True)


class ActorRolloutRef(Worker):
    def __init__(self, config: dict[str, Any], role: str) -> None:
        super().__init__()
        self.config, self.role, self.steps = config, role, 0
        self._register_dispatch_collect_info("rollout", dp_rank=0, is_collect=self.rank == 0)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        self.engine = Engine()
        self.set_dispatch_collect(mesh_name="actor", **self.engine.get_dispatch_collect())

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="rollout"))
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        responses = prompts.batch["input_ids"] * self.config["scale"]
        return DataProto.from_dict({"responses": responses}, meta_info={"timing": {"gen": 1.0}})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"old_log_probs": -data.batch["responses"].float()})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: DataProto) -> DataProto:
        self.steps += 1
        losses = [
            mini.batch["advantages"].mean().item()
            for mini in data.make_iterator(1, epochs=1, dataloader_kwargs={"shuffle": False})
        ]
        return DataProto(meta_info={"metrics": {"actor/loss": float(np.mean(losses))}})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def save_checkpoint(self, path: str, global_step: int = 0) -> str:
        return f"{path}/{self.role}/{global_step}/{self.rank}"

    @register(dispatch_mode={"dispatch_fn": one_number_per_rank, "collect_fn": total})
    def add(self, x: int, y: int = 0) -> int:
        return x + y

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def export_address(self) -> dict[str, str]:
        addr, port = self.get_master_addr_port()
        free_addr, free_port = self.get_available_master_addr_port()
        return {"MASTER_ADDR": addr, "MASTER_PORT": port, "ADDR": free_addr, "PORT": free_port}


class Critic(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def compute_values(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"values": data.batch["responses"].float() + 0.5})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def double_values(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"values": 2 * data.batch["values"]})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    async def measure(self, data: DataProto) -> float:
        return float(data.batch["values"].sum())


class Trainer:
    """The skeleton of veRL's RayPPOTrainer."""

    def __init__(self, manager: ResourcePoolManager, mapping: dict[Role, Any]) -> None:
        self.manager, self.mapping = manager, mapping
        self.hosts: list[RayWorkerGroup] = []

    def init_workers(self) -> None:
        self.manager.create_resource_pool()
        pools = self.manager.resource_pool_dict.values()
        classes: dict[RayResourcePool, dict[str, Any]] = {pool: {} for pool in pools}
        actor_pool = self.manager.get_resource_pool(Role.ACTOR)
        classes[actor_pool]["actor_rollout"] = RayClassWithInitArgs(
            cls=self.mapping[Role.ACTOR], config={"scale": 3}, role="actor_rollout"
        )
        critic_pool = self.manager.get_resource_pool(Role.CRITIC)
        classes[critic_pool]["critic"] = RayClassWithInitArgs(cls=self.mapping[Role.CRITIC])
        groups: dict[str, RayWorkerGroup] = {}
        for resource_pool, class_dict in classes.items():
            worker_dict_cls = create_colocated_worker_cls(class_dict=class_dict)
            wg_dict = RayWorkerGroup(
                resource_pool=resource_pool,
                ray_cls_with_init=worker_dict_cls,
                device_name="cpu",
                ray_wait_register_center_timeout=120,
            )
            groups.update(wg_dict.spawn(prefix_set=class_dict.keys()))
            self.hosts.append(wg_dict)
        self.actor_wg, self.critic_wg = groups["actor_rollout"], groups["critic"]
        self.actor_wg.init_model()

    def fit(self, prompts: DataProto) -> tuple[DataProto, dict[str, float]]:
        gen_batch = prompts.pop(batch_keys=["input_ids"], non_tensor_batch_keys=["raw_prompt"])
        output = self.actor_wg.generate_sequences(gen_batch)
        output.meta_info.pop("timing")
        batch = prompts.repeat(repeat_times=1, interleave=True)
        batch = batch.union(gen_batch).union(output)
        padded, pad_size = pad_dataproto_to_divisor(batch, self.actor_wg.world_size)
        log_prob = unpad_dataproto(self.actor_wg.compute_log_prob(padded), pad_size=pad_size)
        values = unpad_dataproto(self.critic_wg.compute_values(padded).get(), pad_size=pad_size)
        batch = batch.union(log_prob).union(values)
        batch.batch["advantages"] = batch.batch["values"] + batch.batch["old_log_probs"]
        order = torch.argsort(batch.batch["responses"], descending=True)
        batch.reorder(order)
        batch.meta_info["global_token_num"] = batch.batch["responses"].tolist()
        trainable = batch.select(batch_keys=["responses", "advantages"], non_tensor_batch_keys=[])
        ready, _ = pad_dataproto_to_divisor(trainable, self.actor_wg.world_size)
        metrics = self.actor_wg.update_actor(ready).meta_info["metrics"]
        return batch, {key: float(np.mean(value)) for key, value in metrics.items()}


@pytest.fixture(scope="module")
def trainer(cluster: None) -> Iterator[Trainer]:
    manager = ResourcePoolManager(
        resource_pool_spec={"global_pool": [2]},
        mapping={Role.ACTOR: "global_pool", Role.CRITIC: "global_pool"},
    )
    mapping = {Role.ACTOR: ray.remote(ActorRolloutRef), Role.CRITIC: ray.remote(Critic)}
    made = Trainer(manager, mapping)
    made.init_workers()
    yield made
    for hosts in made.hosts:
        hosts.close()
    for pool in manager.resource_pool_dict.values():
        pool.close()


def prompts(rows: int) -> DataProto:
    return DataProto.from_single_dict(
        {
            "input_ids": torch.arange(rows),
            "raw_prompt": np.array([[{"content": str(i)}] for i in range(rows)], dtype=object)[
                :, 0
            ],
            "uid": np.array([f"u{i}" for i in range(rows)], dtype=object),
        }
    )


def test_a_ppo_trainer_runs_a_step_on_rows_that_do_not_divide(trainer: Trainer) -> None:
    data = prompts(3)
    batch, metrics = trainer.fit(data)
    assert batch.batch["responses"].tolist() == [6, 3, 0]
    assert list(batch.non_tensor_batch["uid"]) == ["u2", "u1", "u0"]
    assert batch.non_tensor_batch["raw_prompt"][0] == {"content": "2"}
    assert batch.batch["advantages"].tolist() == [0.5, 0.5, 0.5]
    assert metrics == {"actor/loss": 0.5}
    assert set(data.batch.keys()) | set(data.non_tensor_batch) == {"uid"}


def test_futures_pass_from_call_to_call_and_meet_at_the_driver(trainer: Trainer) -> None:
    data = DataProto.from_dict({"responses": torch.arange(4)})
    future = trainer.critic_wg.compute_values(data)
    doubled = trainer.critic_wg.double_values(future)
    assert doubled.get().batch["values"].tolist() == [1.0, 3.0, 5.0, 7.0]
    assert doubled.chunk(2)[0].get().batch["values"].tolist() == [1.0, 3.0]
    assert trainer.critic_wg.measure(future) == [2.0, 6.0]


def test_references_functions_and_addresses_come_back(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = trainer.actor_wg
    paths = ray.get(group.save_checkpoint("/tmp", global_step=7))
    assert paths == [f"/tmp/actor_rollout/7/{rank}" for rank in (0, 1)]
    assert group.add(10, y=1) == 11 + 12
    done = group.execute_with_func_generator(lambda worker, data: data, prompts(2))
    assert list(done.non_tensor_batch["uid"]) == ["u0", "u1"]
    environment = {**group.export_address(), "DRIVER_PORT": group.master_port}
    for key, value in environment.items():  # strings, as an environment takes them
        monkeypatch.setenv(key, value)
    assert environment["MASTER_PORT"] == environment["DRIVER_PORT"]


def test_a_method_of_a_remote_class_shows_the_signature_that_the_user_wrote(
    trainer: Trainer,
) -> None:
    assert list(inspect.signature(trainer.actor_wg.add).parameters) == ["x", "y"]
    with pytest.raises(ValueError, match=r"^critic\.compute_values\(data: DataProto\)"):
        trainer.critic_wg.compute_values(prompts(3))


class Hybrid(
    create_colocated_worker_raw_cls(  # type: ignore[misc]
        {
            "actor": RayClassWithInitArgs(
                ray.remote(ActorRolloutRef), config={"scale": 2}, role="actor"
            ),
            "critic": RayClassWithInitArgs(ray.remote(Critic)),
        }
    )
):
    """A fused worker that a user extends with methods over several roles."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def roles(self) -> tuple[Any, ...]:
        same = self.get_fused_worker_by_name("actor") is self.actor
        return self.actor.role, type(self.critic).__name__, same, sorted(self.fused_worker_dict)


@pytest.fixture(scope="module")
def single(cluster: None) -> Iterator[RayResourcePool]:
    with RayResourcePool([2], cpus_per_process=0.5) as two:
        yield split_resource_pool(two, [1, 1])[0]


def test_a_fused_worker_reaches_its_roles_and_the_driver_fuses_and_spawns_them(
    single: RayResourcePool,
) -> None:
    data = DataProto.from_dict({"values": torch.ones(2)})
    with RayWorkerGroup(single, RayClassWithInitArgs(ray.remote(Hybrid))) as group:
        assert group.roles() == [("actor", "Critic", True, ["actor", "critic"])]
        group.fuse({"actor", "critic"})
        assert group.actor.add(1) == 1
        assert group.spawn({"critic"})["critic"].measure(data) == [2.0]
    classes = {"critic": RayClassWithInitArgs(ray.remote(Critic))}
    with RayWorkerGroup(single, create_colocated_worker_cls_fused(class_dict=classes)) as group:
        assert group.spawn(prefix_set=classes.keys())["critic"].measure(data) == [2.0]
