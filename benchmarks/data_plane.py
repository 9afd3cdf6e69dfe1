"""Times bytes to workers and back, beside plain Ray actors and, in its own environment, veRL.

    python benchmarks/data_plane.py --json figures.json --chart docs/data_plane.png

Ours and the floor (see `data_plane_cases`) share one process and one Ray, veRL has another. All
take turns in every round; figures are medians, and a ratio is the median over the rounds of the
ratio within one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("data_plane_cases.py")
NAMES = {"ours": "here", "floor": "plain Ray actors", "verl": "veRL"}
QUICK_S = 0.02  # a call shorter than this is repeated within a round
QUICK_CALLS = 60

Rounds = dict[str, dict[str, list[float]]]  # case, contestant: the median of every round


class Process:
    """A Python with one library, which measures when told to."""

    def __init__(self, python: Path, library: str) -> None:
        path = str(ROOT) if library == "ours" else ""
        self.process = subprocess.Popen(
            [str(python), str(PROGRAM), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PYTHONDONTWRITEBYTECODE": "",  # compiled once, as what pip installed is
                "RAY_DEDUP_LOGS": "0",
            },
        )
        self.versions, self.cases = self._answer()

    def values(self, contestant: str, case: str, calls: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([contestant, case, calls]) + "\n")
        self.process.stdin.flush()
        answer: list[float] = self._answer()
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended; its output is above")
        return json.loads(line)


def run(processes: list[Process], only: list[str], rounds: int) -> Rounds:
    """All contestants in every round, each time in another order."""
    measured: Rounds = {}
    for case in only:
        home = {n: p for p in processes for n, cases in p.cases.items() if case in cases}
        calls = {}
        for name, process in home.items():
            first = process.values(name, case, 2)[-1]
            calls[name] = QUICK_CALLS if first < QUICK_S else 1
        times: dict[str, list[float]] = {name: [] for name in home}
        names = list(home)
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(median(home[name].values(name, case, calls[name])))
        for process in processes:
            process.values("end", "", 0)
        measured[case] = times
        print(table(summary({case: times})).splitlines()[1], flush=True)
    return measured


def summary(measured: Rounds) -> dict[str, dict[str, float]]:
    """Medians (ms, or MiB of a peak), and the ratios of the others to ours."""
    figures = {}
    for case, times in measured.items():
        unit, scale = ("MiB", 1.0) if case.startswith("peak") else ("ms", 1e3)
        figure = {f"{name}_{unit}": scale * median(values) for name, values in times.items()}
        for other in [name for name in times if name != "ours"]:
            pairs = zip(times["ours"], times[other], strict=True)
            figure[f"ours/{other}"] = median(ours / theirs for ours, theirs in pairs)
        figures[case] = figure
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """One line per case."""
    head = ["here", "floor", "veRL", "here/floor", "veRL/here"]
    lines = [f"{'ms (peak: MiB)':36}" + "".join(f"{title:>13}" for title in head)]
    for case, figure in figures.items():
        unit = "MiB" if case.startswith("peak") else "ms"
        cells = [figure.get(f"{name}_{unit}") for name in NAMES]
        floor, verl = figure.get("ours/floor"), figure.get("ours/verl")
        cells += [floor, None if verl is None else 1 / verl]
        lines.append(
            f"{case:36}" + "".join(f"{'-' if c is None else f'{c:.2f}':>13}" for c in cells)
        )
    return "\n".join(lines)


def draw(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Bars on a logarithmic scale, one group per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in figures if not case.startswith("peak")][::-1]
    colors = {"ours": "#1b6ca8", "floor": "#9aa5b1", "verl": "#d1495b"}
    figure, axes = pyplot.subplots(figsize=(9, 0.62 * len(cases) + 1.2))
    for at, name in enumerate(reversed(NAMES)):
        shown = [(y, figures[case][f"{name}_ms"]) for y, case in enumerate(cases)
                 if f"{name}_ms" in figures[case]]  # fmt: skip
        if shown:
            bars = axes.barh(
                [y + (at - 1) * 0.27 for y, _ in shown],
                [ms for _, ms in shown],
                height=0.25,
                color=colors[name],
                label=NAMES[name],
            )
            axes.bar_label(bars, fmt=lambda ms: f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}",
                           padding=3, fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("ms, shorter is better (logarithmic)")
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser()
    default = ROOT / ".venv-verl/bin/python"
    parser.add_argument("--verl-python", type=Path, default=default)
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of others")
    parser.add_argument("--chart", type=Path, help="draw them here, as PNG")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of cases; all by default")
    options = parser.parse_args()

    processes = [Process(Path(sys.executable), "ours")]
    if options.verl_python.exists():
        processes.append(Process(options.verl_python, "verl"))
    else:
        print(f"without veRL: there is no {options.verl_python}; `make bench-verl` builds it")
    versions = [process.versions for process in processes]
    print(*versions)
    print(table({}))
    machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
    report = {"versions": versions, "machine": machine}
    rounds: Rounds = {}
    if options.json and options.json.exists():
        rounds = json.loads(options.json.read_text())["rounds"]
    try:
        known = processes[0].cases["ours"]
        if unknown := [case for case in options.only or [] if case not in known]:
            parser.error(f"no cases are called {unknown}; there are {known}")
        for case in options.only or known:
            rounds |= run(processes, [case], options.rounds)
            figures = summary(rounds)
            if options.json:
                report |= {"figures": figures, "rounds": rounds}
                options.json.write_text(json.dumps(report, indent=1) + "\n")
            if options.chart:
                draw(figures, options.chart)
    finally:
        for process in processes:
            process.close()


if __name__ == "__main__":
    main()
