"""Times what a driver does for 8 to 4,096 ranks, without their processes; or for some, with them.

    cd docs; WRITE="--json scaling.json --page scaling.md"
    python ../benchmarks/scale.py $WRITE --chart scaling.png
    python ../benchmarks/scale.py $WRITE --processes 4 24

How ranks are stood in for is said in `scale_cases`. Figures are medians over the rounds of one run.
A line that takes longer than `--enough` seconds a round is not tried with more ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
import torch
from scale_cases import CASES, ROWS, Cluster, Member, batch, measured

from protocol import DataProto
from single_controller.base.plan import Broadcast
from single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

SIZES = (8, 16, 64, 256, 1024, 4096)
SMALL, LARGE = 64, 1024  # cost per rank is compared between these
SKEW = 256  # ranks, for which a page says when the last one is sent its call
PANELS = {
    "values and rows": ("no-op", "int", "1 MB", "6 columns"),
    "results that stay": ("future.get", "chain", "union"),
    "failures, and questions": ("one rank", "alive", "describe", "stats", "attach", "close"),
}

DETAILS = (": make", ": get", ": release")  # are in the JSON, and in no picture

Figures = dict[str, dict[str, dict[str, float]]]  # line, ranks


def figure(part: dict[str, float], size: int, bare_us: float) -> dict[str, float]:
    """What one line shows of a part: ms in all; per rank the µs in all, those of CPU that are the
    driver's own and those at Ray's doors, the tasks, and what bare Ray takes to submit as many.
    """
    tasks = part["tasks"] / size
    return {
        "ms": part["seconds"] * 1e3,
        "us": part["seconds"] / size * 1e6,
        "own_us": part["own_s"] / size * 1e6,
        "doors_us": part["ray_seconds"] / size * 1e6,
        "tasks": tasks,
        "bare_us": tasks * bare_us,
        "kb": part["bytes"] / size / 1e3,
        "references": part["references"] / size,
        "waits": part["waits"] / size,
        "lookups": part["lookups"],
        "skew_ms": part["skew_s"] * 1e3,
        "skew_with_ray_ms": (part["skew_s"] + (bare_us * size / 1e6 if part["skew_s"] else 0))
        * 1e3,
    }


COLUMNS = {
    "ms": "ms in all",
    "us": "µs/rank",
    "own_us": "own",
    "doors_us": "in Ray",
    "bare_us": "submit",
    "tasks": "tasks",
    "kb": "kB",
    "references": "refs",
    "waits": "waits",
    "lookups": "look-ups",
    "skew_ms": "skew ms",
    "skew_with_ray_ms": "+submit",
}


def row(line: str, size: int, found: dict[str, float]) -> str:
    cells = "".join(f"{found[key]:>10,.{1 if found[key] < 100 else 0}f}" for key in COLUMNS)
    return f"{line:42}{size:>6}{cells}"


def with_stand_ins(
    sizes: Iterable[int], only: list[str], rounds: int, enough_s: float
) -> tuple[Figures, dict[str, dict[str, float]]]:
    """Each line for each number of ranks; and what bare Ray takes for a task, by that number."""
    cluster = Cluster()
    figures: Figures = {}
    bare: dict[str, dict[str, float]] = {}
    cluster.bare(64)
    for size in sizes:
        took = [cluster.bare(size) for _ in range(rounds)]
        submit, get = (statistics.median(times) / size * 1e6 for times in zip(*took, strict=True))
        bare[str(size)] = {"submit_us": submit, "get_us": get}
    print(f"{'per rank':42}{'ranks':>6}" + "".join(f"{title:>10}" for title in COLUMNS.values()))
    for name in only:
        for size in sizes:
            bare_us = bare[str(size)]["submit_us"]
            parts = measured(cluster, CASES[name], size, rounds, enough_s)
            if len(parts) > 1:
                parts["in all"] = total(list(parts.values()))
            for part, values in parts.items():
                line = f"{name}: {part}" if part else name
                figures.setdefault(line, {})[str(size)] = figure(values, size, bare_us)
                print(row(line, size, figures[line][str(size)]), flush=True)
            if sum(values["seconds"] for values in parts.values()) > enough_s:
                break
    ray.shutdown()
    return figures, bare


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    summed = {key: sum(part[key] for part in parts) for key in parts[0]}
    return {**summed, "skew_s": max(part["skew_s"] for part in parts)}


def summary(figures: Figures, sizes: Iterable[int]) -> str:
    """µs per rank by number of ranks, and how much they and the driver's own of them grow."""
    head = [*(f"{size:,}" for size in sizes), f"{LARGE:,}/{SMALL}", "own"]
    lines = [f"{'µs per rank':42}" + "".join(f"{title:>9}" for title in head)]
    for line, by_size in figures.items():
        cells = [f"{by_size[str(s)]['us']:,.0f}" if str(s) in by_size else "-" for s in sizes]
        cells += [growth(by_size, key) for key in ("us", "own_us")]
        lines.append(f"{line:42}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def growth(by_size: dict[str, dict[str, float]], key: str) -> str:
    if not {str(SMALL), str(LARGE)} <= by_size.keys():
        return "-"
    return f"{by_size[str(LARGE)][key] / by_size[str(SMALL)][key]:.2f}"


def draw(figures: Figures, bare: dict[str, dict[str, float]], path: Path) -> None:
    """µs per rank over ranks, both logarithmic: what is linear is flat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(1, len(PANELS), figsize=(15, 6), sharey=True)
    for axes, (title, starts) in zip(panels, PANELS.items(), strict=True):
        for line, by_size in figures.items():
            if line.startswith(starts) and not line.endswith(DETAILS):
                values = [found["us"] for found in by_size.values()]
                axes.plot(list(map(int, by_size)), values, marker="o", ms=3, label=line)
        submit = [found["submit_us"] for found in bare.values()]
        axes.plot(list(map(int, bare)), submit, "k--", lw=1, label="bare Ray: to submit a task")
        axes.set(title=title, xscale="log", yscale="log", xlabel="ranks")
        axes.set_ylim(bottom=1)
        axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("µs per rank (flat: linear in ranks)")
    chart.tight_layout()
    chart.savefig(path, dpi=110)


def page(report: dict[str, Any], text: str) -> str:
    """A page with these figures in place of those between its marks."""
    for name, made in {"figures": _by_line, "processes": _by_calls}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if name in report and start in text:
            before, _, after = text.partition(start)
            text = f"{before}{start}\n{made(report)}\n\n{end}{after.partition(end)[2]}"
    return text


def _by_line(report: dict[str, Any]) -> str:
    small, large, most = (str(size) for size in (SMALL, LARGE, max(SIZES)))
    grows, bare = f"{LARGE:,} / {SMALL}", report["bare"]
    heads = [f"own, {int(size):,} ranks" for size in (small, large, most)]
    rows = [
        ["µs per rank", *heads, grows, f"in all, {LARGE:,} ranks", grows, "in Ray", "tasks",
         "bare Ray", f"skew of {SKEW}, ms"]
    ]  # fmt: skip
    for line, by_size in report["figures"].items():
        if line.endswith(DETAILS):
            continue

        def cell(size: str, key: str, digits: int = 0, of: Any = by_size) -> str:
            return f"{of[size][key]:,.{digits}f}" if size in of else "-"

        skew = by_size.get(str(SKEW), {}).get("skew_ms")
        submitted = bare[str(SKEW)]["submit_us"] * SKEW / 1e3 if skew else 0.0
        rows.append(
            [
                line,
                *(cell(size, "own_us") for size in (small, large, most)),
                growth(by_size, "own_us"),
                cell(large, "us"),
                growth(by_size, "us"),
                cell(large, "doors_us"),
                cell(large, "tasks", 1),
                cell(large, "bare_us"),
                f"{skew:,.0f} + {submitted:,.0f}" if skew else "-",
            ]
        )
    return _markdown(rows)


def _by_calls(report: dict[str, Any]) -> str:
    calls = report["processes"]
    sizes = list(next(iter(calls.values())))
    few, many = sizes[0], sizes[-1]
    heads = [f"{who}, {size} ranks" for who in ("here", "bare actors") for size in (few, many)]
    rows = [["µs per rank", *heads, f"here, {many} / {few}", f"bare, {many} / {few}"]]
    for line, by_size in calls.items():
        ends = [[by_size[size][key] for size in (few, many)] for key in ("us", "bare_us")]
        ratios = [f"{large / small:.2f}" for small, large in ends]
        rows.append([line, *(f"{us:,.0f}" for pair in ends for us in pair), *ratios])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


class Plain:
    """A bare actor that does as `Member`."""

    imported = (torch.Tensor, DataProto)

    def take(self) -> None: ...

    def update(self, columns: dict[str, Any]) -> dict[str, Any]:
        return columns

    def make(self, rows: int) -> dict[str, Any]:
        return {key: column.numpy() for key, column in batch(rows).batch.items()}

    def use(self, columns: dict[str, Any]) -> int:
        return len(columns["ids"])


def with_processes(sizes: Iterable[int], rounds: int) -> Figures:
    """The same calls on real ranks and on bare actors."""
    figures: Figures = {}
    print(f"{'µs per rank':42}{'ranks':>6}{'here':>10}{'bare Ray':>10}")
    for size in sizes:
        ray.init(
            address="local",
            num_cpus=size,  # logical; Ray starts as many processes
            num_gpus=0,
            include_dashboard=False,
            logging_level="ERROR",
            object_store_memory=1 << 30,
        )
        for line, found in _on_processes(size, rounds).items():
            figures.setdefault(line, {})[str(size)] = found
            cells = "".join(f"{found[key]:>10,.0f}" for key in ("us", "bare_us"))
            print(f"{line:42}{size:>6}{cells}", flush=True)
        ray.shutdown()
    return figures


def _on_processes(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Groups and bare actors take turns, call by call."""
    data, half = batch(ROWS * size), size // 2
    columns = [{k: v.numpy() for k, v in part.batch.items()} for part in data.chunk(size)]
    spec = RayClassWithInitArgs(ray.remote(Member))
    actor: Any = ray.remote(num_cpus=0)(Plain)
    actors = [actor.remote() for _ in range(size)]
    ray.get([one.take.remote() for one in actors])
    found: dict[str, dict[str, float]] = {}

    def note(line: str, here: Callable[[], object], bare: Callable[[], object]) -> None:
        here(), bare()
        times = [(timed(here), timed(bare)) for _ in range(rounds)]
        medians = [statistics.median(each) / size * 1e6 for each in zip(*times, strict=True)]
        found[line] = dict(zip(("us", "bare_us"), medians, strict=True))

    def bare_update() -> object:
        parts = zip(actors, columns, strict=True)
        return ray.get([one.update.remote(part) for one, part in parts])

    def bare_chain() -> object:
        made = [one.make.remote(2 * ROWS) for one in actors[:half]]
        pairs = zip(actors[half:], made, strict=True)
        return ray.get([reader.use.remote(ref) for reader, ref in pairs])

    with RayResourcePool([size], use_gpu=False) as pool, RayWorkerGroup(pool, spec) as group:
        note("no-op", group.take, lambda: ray.get([one.take.remote() for one in actors]))
        note("6 columns", lambda: group.update(data), bare_update)
    with (
        RayResourcePool([half], use_gpu=False) as pool,
        RayResourcePool([half], use_gpu=False) as another,
        RayWorkerGroup(pool, spec) as group,
        RayWorkerGroup(another, spec) as readers,
    ):
        chain = lambda: readers.use(group.make(Broadcast(2 * ROWS)))  # noqa: E731
        note("chain of two halves", chain, bare_chain)
    for one in actors:
        ray.kill(one)
    return found


def by_ranks(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--only", nargs="*", help="names of lines, or how they begin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--enough", type=float, default=20.0, help="seconds of a line and size")
    parser.add_argument("--processes", type=int, nargs="+", help="real ranks, so many, instead")
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of others")
    parser.add_argument("--chart", type=Path, help="draw them here, as PNG")
    parser.add_argument("--page", type=Path, help="put them into the tables of this page")
    options = parser.parse_args()
    only = [n for n in CASES if not options.only or n.startswith(tuple(options.only))]
    if not only:
        parser.error(f"no lines begin with {options.only}; there are {list(CASES)}")

    report: dict[str, Any] = {}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    report["machine"] = {"cpus": os.cpu_count(), "platform": platform.platform()}
    report["versions"] = {name: sys.modules[name].__version__ for name in ("ray", "torch")}
    if options.processes:
        report["processes"] = with_processes(options.processes, options.rounds)
    else:
        figures, bare = with_stand_ins(options.ranks, only, options.rounds, options.enough)
        report["bare"] = by_ranks(report.get("bare", {}) | bare)
        known: Figures = report.setdefault("figures", {})
        for line, by_size in figures.items():
            known[line] = by_ranks(known.get(line, {}) | by_size)
        print(summary(figures, options.ranks))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.chart:
        draw(report["figures"], report["bare"], options.chart)
    if options.page:
        options.page.write_text(page(report, options.page.read_text()))


if __name__ == "__main__":
    main()
