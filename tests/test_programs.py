"""The programs that start a Ray of their own: README's, that of a page, and `make demo`."""

from __future__ import annotations

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
    text = re.sub(r"\d+( +by value)", r"BYTES\1", text)
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
    assert re.search(r"GPU +2 +0 +0", done.stderr), done.stderr
