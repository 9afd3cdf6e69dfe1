"""What type checkers tell users of workers and groups: the snippets' types, and their errors alone.

Lines of a snippet that end in `# E` must be refused by both checkers, all others by none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNIPPETS = Path(__file__).parent / "snippets"


def marked() -> set[str]:
    return {
        f"{path.name}:{number}"
        for path in SNIPPETS.glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# E")
    }


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1, done.stderr + done.stdout
    return done.stdout


def test_mypy_refuses_what_is_marked_and_nothing_else() -> None:
    shown = run("mypy", "--config-file", "tests/typing/mypy.ini", str(SNIPPETS))
    found = set(re.findall(r"(\w+\.py:\d+): error", shown))
    assert (found - marked(), marked() - found) == (set(), set()), shown


def test_pyright_refuses_what_is_marked_and_nothing_else() -> None:
    project = ("-p", "tests/typing/pyrightconfig.json", "--pythonpath", sys.executable)
    shown = run("basedpyright", "--outputjson", *project)
    found = {
        f"{Path(problem['file']).name}:{problem['range']['start']['line'] + 1}"
        for problem in json.loads(shown)["generalDiagnostics"]
    }
    assert (found - marked(), marked() - found) == (set(), set()), shown
