"""What `make docs` finds wrong with a page's programs, and what docs/internals.md has to list."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "run_snippets.py"
SPEC = importlib.util.spec_from_file_location("run_snippets", PATH)
assert SPEC is not None
assert SPEC.loader is not None
snippets = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(snippets)

FIRST = "```python\nx = 20\nprint(x)\n```\n\n```text\n20\n```\n\n"


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        (FIRST + "```python\nprint(x + 1)\n```\n\n```text\n21\n```\n", ""),
        (FIRST + "```python\nprint(x + 1)\n```\n\n```text\n22\n```\n", "prints\n21\n"),
        (FIRST + "```python\nprint(y)\n```\n", "name 'y' is not defined"),
        (FIRST + "<!-- not run: it needs y -->\n```python\nprint(y)\n```\n", ""),
        ("no Python\n", ""),
        ("```python\nprint('(raylet) it died')\nprint(1)\n```\n\n```text\n1\n```\n", ""),
    ],
    ids=["right", "wrong output", "raises", "not meant to run", "none", "Ray's own lines"],
)
def test_a_page_is_one_program_and_prints_what_it_says(
    page: str, wrong: str, tmp_path: Path
) -> None:
    (tmp_path / "page.md").write_text(page)
    found = snippets.check_python(tmp_path / "page.md", tmp_path)
    assert len(found) == bool(wrong)
    assert wrong in "".join(found)


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\npython -m single_controller ps\npython -m single_controller zap\n```\n"
        "`python -m single_controller.zap FILE` or `python -m examples.port --help`\n"
    )
    assert snippets.check_commands(page) == [
        f"{page}: there is no command python -m examples.port",
        f"{page}: there is no command python -m single_controller zap",
        f"{page}: there is no command python -m single_controller.zap",
    ]


INTERNALS = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
DOCUMENTED = {"_asdict", "_exit", "_make", "_replace"}  # named tuples', and how to end a process


def private_names() -> tuple[set[str], set[str]]:
    """Private attributes and modules that the code asks others for, and those it defines itself."""
    asked, own = set(), set()
    for package in ("protocol", "single_controller"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                    (own if mine else asked).add(node.attr)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported = {*node.module.split("."), *(alias.name for alias in node.names)}
                    asked |= imported - {"__future__"}
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    own.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    own.add(node.id)
    return {name for name in asked if re.match("_(?!_)", name)}, own


def test_every_private_name_of_others_is_on_the_page_that_lists_them() -> None:
    asked, own = private_names()
    named = set(re.findall(r"\w+", INTERNALS))
    assert sorted(asked - own - DOCUMENTED - named) == []


def test_the_tests_on_that_page_are_there() -> None:
    named = re.findall(r"`(\w[\w/]*\.py)::(\w+)`", INTERNALS)
    assert len(named) > 20
    gone = [
        f"{file}::{test}"
        for file, test in named
        if f"def {test}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert gone == []
