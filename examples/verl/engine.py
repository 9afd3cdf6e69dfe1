"""A rollout engine for veRL without vLLM or SGLang: one Ray actor per replica samples with
transformers. What it samples depends on the request alone, not on who asks first.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncIterable, Iterable
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.single_controller.ray import RayClassWithInitArgs
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

__all__ = ["EngineClient", "Replica", "Server"]


def _server_name(replica_rank: int) -> str:
    return f"tiny_engine_{replica_rank}"


class EngineClient(BaseRollout):
    """The engine as a training worker sees it: weights go to the server of its replica."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """Nothing is held here."""

    async def update_weights(self, weights: Any, **more: Any) -> None:
        """Send all weights; one rank of each replica does."""
        state = {name: tensor async for name, tensor in _each(weights)}
        rank, ranks = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        if rank % ranks == 0:
            server = ray.get_actor(_server_name(rank // ranks))
            await server.load.remote(state, more.get("global_steps"))


async def _each(weights: AsyncIterable[Any] | Iterable[Any]) -> Any:
    """The pairs of a plain or an asynchronous iterable, in memory of their own."""
    if isinstance(weights, AsyncIterable):
        async for name, tensor in weights:
            yield name, tensor.detach().float().clone()
    else:
        for name, tensor in weights:
            yield name, tensor.detach().float().clone()


class Server:
    """The engine itself: a model that answers, with its log-probs, and takes new weights."""

    def __init__(self, path: str, response_length: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        self.response_length = response_length
        self.step: int | None = None

    async def load(self, state: dict[str, torch.Tensor], step: int | None) -> None:
        self.model.load_state_dict(state)
        self.step = step

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """Up to `response_length` tokens, until the end of the answer; greedy at temperature 0."""
        greedy = float(sampling_params.get("temperature", 1.0)) == 0
        seed = zlib.crc32(repr((request_id, self.step, list(prompt_ids))).encode())
        chance = torch.Generator().manual_seed(seed)
        limit = int(sampling_params.get("max_tokens") or self.response_length)
        ids, log_probs = list(prompt_ids), []
        with torch.no_grad():
            for _token in range(min(limit, self.response_length)):
                log_p = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                sampled = torch.multinomial(log_p.exp(), 1, generator=chance)
                ids.append(int(log_p.argmax() if greedy else sampled))
                log_probs.append(float(log_p[ids[-1]]))
                if ids[-1] == self.model.config.eos_token_id:
                    break
        return TokenOutput(
            token_ids=ids[len(prompt_ids) :],
            log_probs=log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    async def _nothing(self, *_: Any, **__: Any) -> None:
        """What engines that hold device memory do around a step."""

    ready = wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    abort_all_requests = resume_generation = set_global_steps = _nothing
    start_profile = stop_profile = wait_for_requests_to_drain = _nothing


class Replica(RolloutReplica):
    """Starts a server beside the training workers of one replica."""

    def get_ray_class_with_init_args(self) -> RayClassWithInitArgs:
        """The workers of a replica that is not part of the trainer's."""
        from verl.checkpoint_engine.base import CheckpointEngineWorker

        return RayClassWithInitArgs(
            cls=ray.remote(CheckpointEngineWorker),
            rollout_config=self.config,
            model_config=self.model_config,
            replica_rank=self.replica_rank,
        )

    async def launch_servers(self) -> None:
        nodes = [
            worker.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
            for worker in self.workers
        ]
        beside = NodeAffinitySchedulingStrategy((await asyncio.gather(*nodes))[0], soft=False)
        options = {"name": _server_name(self.replica_rank), "num_cpus": 0, "max_concurrency": 1000}
        server = (
            ray.remote(Server)
            .options(scheduling_strategy=beside, **options)
            .remote(self.model_config.path, self.config.response_length)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle, self._server_address = server, _server_name(self.replica_rank)
