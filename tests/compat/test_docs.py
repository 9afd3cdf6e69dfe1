"""What docs/from_verl.md says: its two programs, its names, and its rows not tested elsewhere.
And that docs/options.md has every option with its default.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from protocol import DataProto
from single_controller.base.decorator import register
from single_controller.base.method import BoundMethod
from single_controller.cli.port import ported
from single_controller.ray import (
    RayResourcePool,
    RayWorkerGroup,
)
from tests.compat.verl_names import BEGIN, here

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_verl.md").read_text(encoding="utf-8")
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)[0]
SAME, ABSENT = (
    PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0] for title in ("The same", "Absent")
)


def test_the_program_after_is_what_port_makes_of_the_program_before() -> None:
    assert ported(BEFORE) == (AFTER, [])


@pytest.mark.slow
def test_the_ported_trainer_prints_what_verl_prints(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(AFTER, encoding="utf-8")
    address = str(ray.get_runtime_context().gcs_address)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "trainer.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == PRINTED, done.stderr


def test_the_table_of_imports_is_what_port_does() -> None:
    table = PAGE.partition("## Changing the imports")[2].partition("## A small trainer")[0]
    rows = re.findall(r"^\| `(verl[.\w]+)`.* \| `([.\w]+)` \|$", table, re.MULTILINE)
    assert len(rows) == 5
    for old, new in rows:
        start = "from {} import {}".format(*old.rsplit(".", 1))
        found = ported(start)
        name = new.rpartition(".")
        expected = f"from {name[0]} import {name[2]}" if name[0] else f"import {new}"
        assert found == (expected, [])


@pytest.mark.parametrize("name", re.findall(r"^\| `(verl\.[\w.]+)`", ABSENT, re.MULTILINE))
def test_a_name_listed_as_absent_is_one_that_port_cannot_map(name: str) -> None:
    program = "from {} import {}".format(*name.rsplit(".", 1))
    assert ported(program) == (program, [(1, f"{name}, left as it was")])


def test_every_name_listed_as_the_same_is_a_public_one() -> None:
    import protocol
    import single_controller.base
    import single_controller.base.decorator
    import single_controller.ray

    owners = [
        protocol,
        single_controller.base,
        single_controller.base.decorator,
        single_controller.ray,
        DataProto,
        protocol.DataProtoConfig,
        single_controller.base.Worker,
        RayWorkerGroup,
    ]
    quoted = re.findall(r"`([\w.]+)`", SAME)
    names = [name.rpartition(".")[2] for name in quoted if not name.startswith("verl")]
    known = {"VERL_AUTO_PADDING", "tensordict_utils", "_sync", "_async"}
    missing = [n for n in names if not any(hasattr(owner, n) for owner in owners)]
    assert sorted(set(missing) - known) == []


def options(title: str) -> list[dict[str, str]]:
    """The tables below a heading of docs/options.md: options and their defaults."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    part = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    tables = part.split("| option |")[1:]
    return [dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", t, re.MULTILINE)) for t in tables]


def taken(function: object) -> dict[str, str]:
    """A signature's parameters, defaults as one would write them."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    shown = {p.name: re.sub(r"'", '"', repr(p.default)) for p in parameters if p.name != "self"}
    return {name: re.sub(r"<(\w+\.\w+): .*>", r"\1", default) for name, default in shown.items()}


def test_every_option_is_documented_with_its_default() -> None:
    [pool], [both, group], [method], [call] = map(
        options, ("Pools", "Groups", "Methods", "One call")
    )
    assert pool == taken(RayResourcePool)
    assert {**both, **group} == taken(RayWorkerGroup)
    assert method == taken(register)
    assert call == taken(BoundMethod.options)


def test_every_name_that_verl_uses_is_here_as_the_page_says() -> None:
    page = (ROOT / "docs" / "from_verl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", page.partition(BEGIN)[2], re.MULTILINE)
    assert len(rows) > 100
    there = {name for name, said in rows if said != "see [Absent](#absent)"}
    assert [name for name in there if not (here(f"verl.{name}") or here(name))] == []
