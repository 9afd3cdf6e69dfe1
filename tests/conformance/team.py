"""Three roles for one process: two whose names share a prefix, and one with async methods."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import torch

from protocol import DataProto
from single_controller import span
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register


class Actor(Worker):
    def __init__(self, scale: int = 1) -> None:
        self.scale = scale  # on purpose without super().__init__()

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto) -> DataProto:
        if data.meta_info.get("fails"):
            raise LookupError
        with span("inside", rows=len(data)):
            data.batch["a"] += self.rank * self.scale
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def name(self) -> str:
        return f"actor-{self.scale}"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def pid(self) -> int:
        return os.getpid()


class Rollout(Actor):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def name(self) -> str:
        return "rollout"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def generate(self) -> str:
        return "text"


class Critic(Worker):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.log: list[str] = []

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    async def sub(self, data: DataProto) -> DataProto:
        with span("inside", rows=len(data)):
            await asyncio.sleep(0)
        data.batch["a"] -= self.config["b"]
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def name(self) -> str:
        return "critic"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def pid(self) -> int:
        return os.getpid()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def wait_for_note(self) -> list[str]:
        while "go on" not in self.log:
            await asyncio.sleep(0.01)
        return self.log

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    async def hold(self, data: DataProto) -> DataProto:
        for _ in range(data.meta_info.get("rounds", 100_000)):
            if data.meta_info.get("until") in self.log:
                break
            await asyncio.sleep(0.01)
        return data

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def grow(self, x: Any) -> Any:
        await asyncio.sleep(0)
        return {"w": x["w"] + self.rank + 1}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, materialize_futures=False)
    async def awaited(self, handle: Any) -> Any:
        return await handle

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def notes(self) -> list[str]:
        return self.log

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def note(self, text: str) -> None:
        self.log.append(text)


ARGUMENTS: dict[str, tuple[type[Worker], dict[str, Any]]] = {
    "actor": (Actor, {"scale": 1}),
    "actor_rollout": (Rollout, {"scale": 7}),
    "critic": (Critic, {"config": {"b": 10}}),
}


def specs(backend: Any, *roles: str) -> dict[str, Any]:
    """What to start for these roles, by default all."""
    return {
        role: backend.spec(cls, **arguments)
        for role, (cls, arguments) in ARGUMENTS.items()
        if not roles or role in roles
    }


def zeros(**meta_info: Any) -> DataProto:
    return DataProto.from_dict({"a": torch.zeros(10)}, meta_info=meta_info)
