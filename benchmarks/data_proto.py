"""Times DataProto's operations against the plain torch and numpy calls that they stand for, and
against veRL's DataProto in an environment of its own (`make bench-verl` builds one).

    python benchmarks/data_proto.py --verl-python .venv-verl/bin/python --json figures.json

Ours and the plain calls share one process, veRL has another. All take turns in every round, so that
a noisy machine slows all alike, and a ratio is the median over the rounds of the ratio within one
round. Two things that would drown every difference are held still: freed memory stays with the
processes (`MALLOC`), since page faults depend on what ran before; and torch has one thread, as Ray
gives a worker with one CPU, since on a busy machine threads wait for each other most of the time.
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
PROGRAM = Path(__file__).with_name("data_proto_cases.py")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

ALLOWED = {"plain": 1.3, "verl": 1.05}  # no slower than veRL; 5 % is noise
EXTRA = ("chunk, then .batch", "union, none in common", "slice", "one row")  # have no target
QUICK_S = 0.003  # a call shorter than this is repeated within a round
QUICK_CALLS = 200

Rounds = dict[str, dict[str, list[float]]]  # case, contestant: the median of every round in seconds
Figures = dict[str, dict[str, float]]


class Process:
    """A Python with one library, which measures when told to."""

    def __init__(self, python: Path, library: str, threads: int) -> None:
        path = str(ROOT) if library == "ours" else ""
        settings = {**MALLOC, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [str(python), str(PROGRAM), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )
        self.versions, self.cases = self._answer()

    def seconds(self, contestant: str, case: str, calls: int) -> float:
        """The median over so many calls."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([contestant, case, calls]) + "\n")
        self.process.stdin.flush()
        return median(self._answer())

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
    home = {name: process for process in processes for name in process.cases}
    measured: Rounds = {}
    for case in only:
        calls = {}
        for name, process in home.items():
            process.seconds(name, case, 1)  # warms up
            calls[name] = QUICK_CALLS if process.seconds(name, case, 1) < QUICK_S else 1
        times: dict[str, list[float]] = {name: [] for name in home}
        names = list(home)
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(home[name].seconds(name, case, calls[name]))
        measured[case] = times
    return measured


def summary(measured: Rounds) -> Figures:
    """Medians in ms, and the ratios of ours to the others."""
    figures: Figures = {}
    for case, times in measured.items():
        figures[case] = {f"{name}_ms": 1e3 * median(times[name]) for name in times}
        for other in [name for name in times if name != "ours"]:
            pairs = zip(times["ours"], times[other], strict=True)
            figures[case][f"ours/{other}"] = median(ours / theirs for ours, theirs in pairs)
    return figures


def table(figures: Figures) -> str:
    """One line per case; a ratio above its target is marked."""
    names = ["ours", "plain", "verl"]
    head = [f"{name} ms" for name in names] + ["ours/plain", "ours/veRL"]
    lines = [f"{'':24}" + "".join(f"{title:>13}" for title in head)]
    for case, figure in figures.items():
        cells = [f"{figure[f'{n}_ms']:.3f}" if f"{n}_ms" in figure else "-" for n in names]
        for other, most in ALLOWED.items():
            ratio = figure.get(f"ours/{other}")
            missed = ratio is not None and round(ratio, 2) > most and case not in EXTRA
            cells.append("-" if ratio is None else f"{ratio:.2f}" + " !" * missed)
        lines.append(f"{case:24}" + "".join(f"{cell:>13}" for cell in cells))
    limits = ", ".join(f"<= {most} x {name}" for name, most in ALLOWED.items())
    return "\n".join([*lines, f"targets: {limits}; ! marks a miss; none for: {'; '.join(EXTRA)}"])


def main() -> None:
    parser = argparse.ArgumentParser()
    default = ROOT / ".venv-verl/bin/python"
    parser.add_argument("--verl-python", type=Path, default=default)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of cases; all by default")
    options = parser.parse_args()

    processes = [Process(Path(sys.executable), "ours", options.threads)]
    if options.verl_python.exists():
        processes.append(Process(options.verl_python, "verl", options.threads))
    else:
        print(f"without veRL: there is no {options.verl_python}; `make bench-verl` builds it")
    versions = [process.versions for process in processes]
    print("1000 x 4096 int64 x 6 and 1000 strings;", *versions)
    try:
        only = options.only or processes[0].cases["ours"]
        measured = run(processes, only, options.rounds)
    finally:
        for process in processes:
            process.close()
    figures = summary(measured)
    print(table(figures))
    if options.json:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
        report = {"versions": versions, "machine": machine, "threads": options.threads}
        report |= {"figures": figures, "rounds_s": measured}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
