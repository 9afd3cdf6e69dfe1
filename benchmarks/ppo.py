"""Times a PPO step of examples/ppo by role, how much of it no worker was at work, and counts bytes.

PYTHONPATH=. python benchmarks/ppo.py --steps 30 -- --preset 0.5b --mini-batch 64
"""

from __future__ import annotations

import argparse
from statistics import median

from examples.cluster import connect
from examples.ppo.settings import Settings
from examples.ppo.train import make_tokenizer, started, train_step

WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="that are measured (default 30)")
    parser.add_argument("options", nargs="*", help="of the training itself, behind --")
    args = parser.parse_args()
    settings = Settings.parse(args.options)
    connect(settings.ranks + settings.processes_of_rollout)
    tokenizer = make_tokenizer(settings)
    with started(settings, tokenizer) as roles:
        print(roles["actor"].describe())
        metrics = [
            train_step(settings, roles, tokenizer, step) for step in range(WARM_UP + args.steps)
        ][WARM_UP:]
    steps = [one["seconds"] for one in metrics]
    whole = median(seconds["step"] for seconds in steps)
    for phase in steps[0]:
        one = median(seconds[phase] for seconds in steps)
        print(f"{phase:<15} median {1000 * one:9.1f} ms {one / whole:7.1%}")
    updates = settings.epochs * -(-settings.rows // settings.mini_batch)
    print(f"{settings.rows} rows, {updates} updates of each model per step")
    pace = median(one["tokens_per_second"] for one in metrics)
    print(f"answer tokens per second, median: {pace:.0f}")
    moved = median(one["driver_bytes"] for one in metrics)
    print(f"kilobytes through the driver per step, median: {moved / 1000:.0f}")


if __name__ == "__main__":
    main()
