"""What a run leaves on disk: metrics as JSON lines, a picture, and checkpoints to go on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.ppo.settings import Settings
from single_controller.ray import RayWorkerGroup

__all__ = ["Records"]

# Where a run is and how long it goes on may change when it is resumed.
FREE_TO_CHANGE = {
    *("steps", "ranks", "rollout_ranks", "device", "shard", "placement", "threads"),
    *("micro_rows", "output", "save_every", "resume"),
}


class Records:
    """The output folder of a run. One that was stopped before its first checkpoint is begun anew.

    Raises:
        ValueError: there is a checkpoint in the folder, and `resume` is not set; or it is, and the
            checkpoint is of a run with other settings.
        FileNotFoundError: `resume` is set, and there is no checkpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, Path(settings.output)
        self.metrics_file = self.folder / "metrics.jsonl"
        self.history: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = max(self.folder.glob("step-[0-9]*[0-9]"), default=None)
        if settings.resume:
            if self.checkpoint is None:
                raise FileNotFoundError(
                    f"--resume: there is no checkpoint in {self.folder}; without --resume the run "
                    "begins anew"
                )
            self._read(self.checkpoint)
        elif self.checkpoint is not None:
            raise ValueError(
                f"there is a run in {self.folder} already: pass --resume to go on with it, or "
                "another --output"
            )
        else:
            self.metrics_file.unlink(missing_ok=True)

    def _read(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        new = asdict(self.settings)
        different = [
            f"{key} was {old!r} and is {new.get(key)!r}"
            for key, old in state["settings"].items()
            if key not in FREE_TO_CHANGE and new.get(key) != old
        ]
        if different:
            raise ValueError(f"--resume: {checkpoint} is of another run: " + "; ".join(different))
        lines = [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        self.history = [line for line in lines if line["step"] < state["steps_done"]]
        text = "".join(json.dumps(line) + "\n" for line in self.history)
        unfinished = self.metrics_file.with_suffix(".partial")
        unfinished.write_text(text)
        os.replace(unfinished, self.metrics_file)

    @property
    def steps_done(self) -> int:
        return len(self.history)

    @property
    def phases(self) -> list[str]:
        """Of all steps, "step" last: a run that went on in another placement has others since."""
        found = dict.fromkeys(phase for line in self.history[::-1] for phase in line["seconds"])
        return sorted(found, key="step".__eq__)

    def add(self, metrics: dict[str, Any]) -> None:
        """Keep the metrics of a step, in memory and as a line of the file."""
        self.history.append(metrics)
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def load(self, roles: Mapping[str, RayWorkerGroup]) -> None:
        """Bring the roles that learn to where the checkpoint was, if there is one."""
        if self.settings.resume and self.checkpoint is not None:
            for name in ("actor", "critic"):
                if name in roles:
                    roles[name].load(str((self.checkpoint / name).resolve()))

    def save(self, roles: Mapping[str, RayWorkerGroup]) -> None:
        """Write a checkpoint, which appears only when it is complete; the one before it goes."""
        path = self.folder / f"step-{self.steps_done:06d}"
        if path == self.checkpoint:
            return
        unfinished = path.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name in ("actor", "critic"):
            if name in roles:
                roles[name].save(str((unfinished / name).resolve()))
        state = {"steps_done": self.steps_done, "settings": asdict(self.settings)}
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        os.replace(unfinished, path)
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint)
        self.checkpoint = path

    def draw(self) -> None:
        """Reward, KL and seconds per phase over the steps, as progress.png."""
        from matplotlib.figure import Figure  # without pyplot: no window system is looked for

        if not self.history:
            return
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        reward, kl, time = figure.subplots(1, 3)
        steps = [line["step"] for line in self.history]
        reward.plot(steps, [line["reward"] for line in self.history])
        reward.set(title="reward (fraction of positions right)", xlabel="step", ylim=(0, 1))
        kl.plot(steps, [line["kl"] for line in self.history])
        kl.set(title="KL from the reference (nats per token)", xlabel="step")
        phases = self.phases[:-1]
        seconds = [[line["seconds"].get(phase, 0.0) for line in self.history] for phase in phases]
        time.stackplot(steps, seconds, labels=phases)
        time.set(title="seconds per step", xlabel="step")
        time.legend(fontsize="x-small", loc="upper right")
        figure.savefig(self.folder / "progress.png", dpi=110)
