"""`make verl`: runs veRL's trainer on veRL's core and on this one, and compares the metrics.

veRL itself is not changed: the second run goes through `python -m single_controller.verl`. Both
have two ranks on CPUs, FSDP2, validation and checkpoints; PPO has a critic and a reference, too.
`make verl ARGS="--trainer sft"` fine-tunes instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.verl import data
from examples.verl.metrics import compare

__all__ = ["main", "run"]

_ROOT = Path(__file__).parents[2]

_BOTH = [
    "trainer.n_gpus_per_node=2",
    "trainer.nnodes=1",
    "trainer.device=cpu",
    "trainer.logger=[console,file]",
    "trainer.total_epochs=1",
    "trainer.total_training_steps=3",
    "trainer.test_freq=2",
    "trainer.save_freq=2",
    "trainer.resume_mode=disable",
]

_PPO = [
    *_BOTH,
    "data.train_batch_size=8",
    "data.max_prompt_length=16",
    "data.max_response_length=12",
    "data.seed=1",
    "data.dataloader_num_workers=0",
    "data.return_raw_chat=True",
    "actor_rollout_ref.model.use_remove_padding=False",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
    "+actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32",
    "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.name=tiny",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.agent.num_workers=2",
    "actor_rollout_ref.rollout.full_determinism=True",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "critic.strategy=fsdp2",
    "critic.model.use_remove_padding=False",
    "critic.model.enable_gradient_checkpointing=False",
    "+critic.model.override_config.attn_implementation=sdpa",
    "critic.ppo_micro_batch_size_per_gpu=4",
    "critic.optim.lr=1e-3",
    "critic.fsdp.use_torch_compile=False",
    "+critic.fsdp.mixed_precision.param_dtype=fp32",
    "reward.num_workers=1",
    "reward.custom_reward_function.name=compute_score",
    "algorithm.use_kl_in_reward=True",
    "trainer.use_v1=False",
    "trainer.val_before_train=True",
    "+ray_kwargs.ray_init.num_gpus=2",
    "+ray_kwargs.ray_init.include_dashboard=False",
    "ray_kwargs.ray_init.num_cpus=16",
]

_SFT = [
    *_BOTH,
    "data.train_batch_size=8",
    "data.micro_batch_size_per_gpu=4",
    "data.use_dynamic_bsz=False",
    "model.use_remove_padding=False",
    "model.enable_gradient_checkpointing=False",
    "+model.override_config.attn_implementation=sdpa",
    "engine.strategy=fsdp2",
    "engine.use_torch_compile=False",
    "optim.lr=1e-3",
]

_PROGRAMS = {"ppo": ("verl.trainer.main_ppo", _PPO), "sft": ("verl.trainer.sft_trainer_ray", _SFT)}

_ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "examples.verl.cpu",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # the FSDP engines are registered for CUDA alone
    "VERL_ENGINE_VENDOR": "nvidia",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": "1",
    "HYDRA_FULL_ERROR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(trainer: str, core: str, folder: Path, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train on "verl" or on "ours"; the metrics of each step.

    Raises:
        subprocess.CalledProcessError: the trainer failed; its log is in `folder`.
    """
    made, metrics = folder / "data", folder / f"{trainer}_{core}.jsonl"
    metrics.unlink(missing_ok=True)
    launcher = ["-m", "single_controller.verl"] if core == "ours" else []
    program, settings = _PROGRAMS[trainer]
    paths = {
        "data.train_files": made / f"{trainer}_train.parquet",
        "data.val_files": made / f"{trainer}_val.parquet",
        "trainer.default_local_dir": folder / f"{trainer}_{core}.checkpoint",
        "hydra.run.dir": folder / f"{trainer}_{core}.hydra",
    }
    if trainer == "ppo":
        paths |= {
            "actor_rollout_ref.model.path": made / "model",
            "critic.model.path": made / "critic",
            "reward.custom_reward_function.path": _ROOT / "examples/verl/reward.py",
        }
    else:
        paths |= {"model.path": made / "model"}
    settings = [*settings, *(f"{name}={path}" for name, path in paths.items()), *more]
    with (folder / f"{trainer}_{core}.log").open("w") as log:
        ended = subprocess.run(
            [sys.executable, *launcher, "-m", program, *settings],
            env={
                **os.environ,
                **_ENVIRONMENT,
                "PYTHONPATH": str(_ROOT),
                "VERL_FILE_LOGGER_PATH": str(metrics),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode:
        raise RuntimeError(f"the trainer ended with {ended.returncode}: see {log.name}")
    return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if any metric differs."""
    parser = argparse.ArgumentParser(prog="make verl", description=__doc__)
    parser.add_argument("--output", type=Path, default=_ROOT / "runs/verl")
    parser.add_argument("--trainer", choices=[*_PROGRAMS], default="ppo")
    parser.add_argument("--core", choices=["verl", "ours"], help="only one of the two")
    parser.add_argument("settings", nargs="*", help="more of veRL's, such as trainer.use_v1=True")
    options = parser.parse_args(arguments)
    folder: Path = options.output.resolve()
    data.make(folder / "data")
    if options.core:
        run(options.trainer, options.core, folder, options.settings)
        return 0
    cores = ("verl", "ours")
    found = {core: run(options.trainer, core, folder, options.settings) for core in cores}
    gaps = dict(compare(found["verl"], found["ours"]))
    worst = max(gaps, key=lambda name: gaps[name])
    print(f"metrics compared    {len(gaps)}, of {len(found['ours'])} records")
    print(f"largest difference  {gaps[worst]:g}{f' ({worst})' if gaps[worst] else ''}")
    for core, steps in found.items():
        if seconds := [s["timing_s/step"] for s in steps if "timing_s/step" in s]:
            print(f"seconds per step    {statistics.median(seconds):.2f} on {core}")
    return int(gaps[worst] > 0)


if __name__ == "__main__":
    sys.exit(main())
