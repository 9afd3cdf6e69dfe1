"""Runs the training: `python -m examples.ppo`, from the project's folder."""

from __future__ import annotations

import signal
import sys
from statistics import median
from typing import Any

from tqdm import tqdm

from examples.cluster import connect
from examples.ppo.records import Records
from examples.ppo.settings import Settings
from examples.ppo.train import Roles, make_tokenizer, started, train_step
from single_controller import SingleControllerError


class StopOnRequest:
    """Turns the first Ctrl-C into a wish to stop after the step under way; the second one acts."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGINT, self._request)

    def _request(self, *_: Any) -> None:
        self.requested = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(settings: Settings, records: Records, roles: Roles, stop: StopOnRequest) -> None:
    """All steps that are left, with a checkpoint every so often and at the end."""
    tokenizer = make_tokenizer(settings)
    records.load(roles)
    with tqdm(total=settings.steps, initial=records.steps_done, unit="step") as bar:
        while records.steps_done < settings.steps and not stop.requested:
            metrics = train_step(settings, roles, tokenizer, records.steps_done)
            records.add(metrics)
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.2f}")
            bar.update()
            if records.steps_done % settings.save_every == 0:
                records.save(roles)
    records.save(roles)


def report(records: Records) -> None:
    """The run in a few lines."""
    history = records.history
    seconds = [line["seconds"] for line in history]
    total = sum(s["step"] for s in seconds)
    print(f"\n{'phase':<15} seconds per step   share")
    for phase in records.phases:
        one = sum(s.get(phase, 0.0) for s in seconds)
        print(f"{phase:<15} {one / len(history):16.4f} {one / total:7.1%}")
    first, last = history[0]["reward"], history[-1]["reward"]
    pace = median(line["tokens_per_second"] for line in history)
    print(f"\nreward {first:.3f} → {last:.3f} in {len(history)} steps, {total:.0f} s")
    print(f"answer tokens per second, median: {pace:.0f}")
    moved = median(line["driver_bytes"] for line in history)
    print(f"kilobytes through the driver per step, median: {moved / 1000:.0f}")
    print(f"metrics, picture and checkpoint: {records.folder}/")


def main() -> int:
    settings = Settings.parse()
    try:
        records = Records(settings)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    connect(settings.ranks + settings.processes_of_rollout)
    stop = StopOnRequest()
    try:
        with started(settings, make_tokenizer(settings)) as roles:
            run(settings, records, roles, stop)
    except KeyboardInterrupt:
        stop.requested = True
    except SingleControllerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        records.draw()
    if records.history:
        report(records)
    if records.steps_done < settings.steps:
        how = "--resume goes on" if records.checkpoint else "with no checkpoint to go on from"
        print(f"stopped after {records.steps_done} steps; {how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
