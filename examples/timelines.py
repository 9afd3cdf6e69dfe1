"""When each role of `examples.pipeline` was at work, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["Run", "Span", "seconds", "show"]

Span = tuple[float, float]
Run = tuple[dict[str, list[Span]], list[float]]
"""The spans of each role, and the mean reward of each step."""


def seconds(run: Run) -> float:
    """From the first moment of work to the last."""
    spans, _ = run
    every = [moment for all_ in spans.values() for span in all_ for moment in span]
    return max(every) - min(every)


def timeline(spans: Sequence[Span], start: float, scale: float, width: int = 72) -> str:
    """A line with a block where a role was at work, in turns of two shades."""
    line = [" "] * width
    for i, (began, ended) in enumerate(spans):
        for at in range(int((began - start) / scale), int((ended - start) / scale) + 1):
            line[min(at, width - 1)] = "█▒"[i % 2]
    return "".join(line)


def show(runs: dict[str, Run], picture: str) -> None:
    """Both timelines on one scale, as text and, if asked for, as a PNG."""
    scale = max(map(seconds, runs.values())) / 72
    for name, (spans, rewards) in runs.items():
        start = min(began for all_ in spans.values() for began, _ in all_)
        took = seconds((spans, rewards))
        print(f"{name}: {took:.2f} s, reward {rewards[0]:.2f} → {rewards[-1]:.2f}")
        for role, all_ in spans.items():
            print(f"  {role:<9}|{timeline(all_, start, scale)}|")
    if picture:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for axis, (name, (spans, _)) in zip(axes, runs.items(), strict=True):
            start = min(began for all_ in spans.values() for began, _ in all_)
            for row, all_ in enumerate(spans.values()):
                bars = [(began - start, ended - began) for began, ended in all_]
                axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=[f"C{row}"], edgecolor="w")
            axis.set(yticks=[0, 1], yticklabels=list(spans), title=name, ylim=(1.6, -0.6))
        axes[1].set_xlabel("seconds")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=110)
