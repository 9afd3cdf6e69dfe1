"""What veRL 0.9's trainer needs on a machine without accelerators, the same under both cores.

veRL imports this module in each of its processes, as VERL_USE_EXTERNAL_MODULES says: a platform
"cpu" for its registry, the rollout engine for its other registry, and three places where it takes
CUDA for granted.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

__all__ = ["PlatformCPU"]


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _zero(*_: Any, **__: Any) -> int:
    return 0


class _Device(types.ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that it lacks."""

    memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _zero
    empty_cache = ipc_collect = reset_peak_memory_stats = _nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, *_: Any) -> str:
        return "cpu"

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """A CPU as veRL's platforms describe devices."""

    device_name = vendor_name = property(lambda self: "cpu")  # type: ignore[assignment]
    device_module = property(lambda self: _Device("cpu"))  # type: ignore[assignment]
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Any:
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False


def _register_engine() -> None:
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def load() -> Any:
        from examples.verl.engine import Replica

        return Replica

    _ROLLOUT_REGISTRY["tiny", "async"] = "examples.verl.engine.EngineClient"
    RolloutReplicaRegistry.register("tiny", load)


def _meet_by_gloo() -> None:
    """veRL asks for "cpu:gloo,cpu:gloo" here, which torch refuses."""
    from verl.utils import distributed

    original = distributed.initialize_global_process_group_ray

    def initialize(timeout_second: Any = None, backend: str | None = None) -> Any:
        return original(timeout_second, backend or "gloo")

    distributed.initialize_global_process_group_ray = initialize


def _critic_without_flash_attention() -> None:
    from verl.utils import model

    def load_valuehead_model(
        local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool
    ) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path, torch_dtype=torch_dtype, config=model_config, attn_implementation="sdpa"
        )

    model.load_valuehead_model = load_valuehead_model


def _no_pinned_memory() -> None:
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]


_register_engine()
_meet_by_gloo()
_critic_without_flash_attention()
_no_pinned_memory()
