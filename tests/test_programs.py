"""The programs that start a Ray of their own: README's, that of a page, `make demo`, and the
benchmarks that tell what grows with the number of ranks and how weights travel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHOWN = {
    page: re.findall(
        r"```python\n(.*?)```\n\n```text\n(.*?)```",
        (ROOT / page).read_text(encoding="utf-8"),
        re.DOTALL,
    )
    for page in ("README.md", "docs/beside_ray.md")
}


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def without_the_machine(text: str) -> list[str]:
    """The words of a text, with addresses, process ids and sizes of pickles made equal."""
    text = re.sub(r"(: DataProto +\d+ +\w+ +)\d+", r"\1BYTES", text)
    text = re.sub(r"\b\d+\.\d+\.\d+\.\d+\b(:\d+)?", "ADDRESS", text)
    return re.sub(r"(ADDRESS +cpu +)\d+", r"\1PID", text).split()


@pytest.mark.parametrize("page", SHOWN)
def test_the_program_of_a_page_prints_what_the_page_says(page: str, tmp_path: Path) -> None:
    [(program, output)] = SHOWN[page]
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    hidden = {} if "num_gpus" in program else {"CUDA_VISIBLE_DEVICES": ""}
    done = run(str(tmp_path / "program.py"), RAY_ADDRESS="local", **hidden)
    assert without_the_machine(done.stdout) == without_the_machine(output), done.stderr


def demo(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run("examples/colocated_actor_critic.py", *options, **env)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of their own: nothing that other tests did to theirs can keep them waiting."""
    alone = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0})
    yield str(alone.address)
    alone.shutdown()


def test_the_demo_prints_the_table_and_the_seeds_numbers() -> None:
    done = demo(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    table = re.findall(
        r"^(\d) +(actor|critic) +[\d.]+ +cpu +(\d+) +alive$", done.stdout, re.MULTILINE
    )
    assert [(rank, role) for rank, role, _ in table] == [
        (r, s) for r in "01" for s in ("actor", "critic")
    ]
    assert len({pid for _, _, pid in table}) == 2
    assert "running on cpu" in done.stdout
    assert "actor.add:  [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]" in done.stdout
    assert f"critic.sub: {[-10] * 10}" in done.stdout


def test_the_demo_ends_in_the_clear_error_where_rows_do_not_divide(address: str) -> None:
    done = demo("--ranks", "4", RAY_ADDRESS=address)
    assert done.returncode == 1
    assert "DispatchError: actor.add" in done.stderr
    assert "only support equal chunk" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_takes_uneven_rows_when_told(address: str) -> None:
    done = demo("--ranks", "4", "--uneven", "--device", "cpu", RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert "actor.add:  [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]" in done.stdout


def test_the_demo_says_what_is_missing_where_a_device_is_asked_for(address: str) -> None:
    done = demo("--device", "cuda", RAY_ADDRESS=address)
    assert done.returncode == 1
    assert "asks for 2 × {CPU: 1, GPU: 1}" in done.stderr
    assert "0 of 0 GPU free" in done.stderr


def scale(*options: str) -> None:
    done = run("benchmarks/scale.py", "--rounds", "1", *options)
    assert done.returncode == 0, done.stderr


def test_no_call_sends_a_rank_more_and_none_asks_ray_more_often_where_there_are_more_ranks(
    tmp_path: Path,
) -> None:
    found, chart, page = (tmp_path / name for name in ("found.json", "found.png", "page.md"))
    page.write_text("<!-- figures -->\n<!-- end of figures -->", encoding="utf-8")
    scale("--ranks", "8", "64", "--json", f"{found}", "--chart", f"{chart}", "--page", f"{page}")
    figures = json.loads(found.read_text())["figures"]
    sent = {line: [by_size[size] for size in ("8", "64")] for line, by_size in figures.items()}
    assert sent["chain, rows known: in all"][1]["tasks"] == 4  # make, publish, use, release
    assert [
        (line, what, few[what], many[what])
        for line, (few, many) in sent.items()
        for what in ("kb", "references", "tasks", "waits")
        if many[what] > 1.35 * few[what] + 0.5  # 63 ranks beside 42, where 8 have 6 beside 4
    ] == []
    assert [line for line, (_, many) in sent.items() if many["lookups"] > 2] == []
    assert "| close |" in page.read_text(encoding="utf-8")
    assert chart.stat().st_size


def test_ranks_with_processes_are_measured_beside_bare_actors(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    scale("--processes", "2", "--json", f"{found}")
    calls = json.loads(found.read_text())["processes"]
    assert calls.keys() == {"no-op", "6 columns", "chain of two halves"}
    assert all(by_size["2"].keys() == {"us", "bare_us"} for by_size in calls.values())


def test_weights_arrive_on_every_way_and_none_by_way_of_the_driver(tmp_path: Path) -> None:
    found, page = tmp_path / "found.json", tmp_path / "page.md"
    page.write_text("<!-- figures --><!-- end of figures -->", encoding="utf-8")
    timed = ("--bytes", "2000000", "--rounds", "1", "--only", "cpus")
    done = run("benchmarks/weights.py", *timed, "--json", f"{found}", "--page", f"{page}")
    assert done.returncode == 0, done.stderr  # else something has not arrived
    figures = json.loads(found.read_text())["figures"]
    moved = {
        name.removeprefix("CPUs, "): case for name, case in figures.items() if "driver" in case
    }
    whole = moved["2 → 2 ranks, each to its own"]["between"] / 2
    assert 2_000_000 < whole < 3_000_000
    times = {
        "same process, already made": 0,
        "same process, made and read": 0,
        "2 → 2 ranks, each to its own": 2,
        "2 → 2 ranks, each to its own, in buckets": 2,
        "2 → 2 ranks, rank 0 to both": 1,
        "2 → 2 ranks, shards to the whole on both": 1,
    }
    assert {name: case["between"] / whole for name, case in moved.items()} == pytest.approx(
        times, rel=0.05
    )
    assert all(case["ms"] > 0 for case in figures.values())
    shards = moved.pop("2 → 2 ranks, shards to the whole on both")
    assert shards["driver"] < 500  # a list, and the names of its handles
    assert {case["driver"] for case in moved.values()} == {0}
    for name in figures:
        assert f"\n| {name} | " in page.read_text(encoding="utf-8")
