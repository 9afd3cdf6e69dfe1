"""What `make docs` finds wrong with a page's programs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "run_snippets.py"
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
    page.write_text("```sh\npython -m single_controller ps\npython -m single_controller zap\n```\n")
    assert snippets.check_commands(page) == [
        f"{page}: there is no command python -m single_controller zap"
    ]
