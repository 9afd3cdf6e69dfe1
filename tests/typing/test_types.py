"""What type checkers tell users of workers and groups: the snippets' types, and their errors alone.

Lines of a snippet that end in `# E` must be refused by both checkers, all others by none. What the
pages show passes in an environment that the package was installed into as README says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.test_snippets import snippets as pages

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
    line = [sys.executable, "-m", *command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 1, done.stderr + done.stdout
    return done.stdout


PYRIGHT = "-p", "tests/typing/pyrightconfig.json", "--pythonpath", sys.executable


@pytest.mark.slow
@pytest.mark.parametrize(
    "checker",
    [("mypy", "--config-file", "tests/typing/mypy.ini", str(SNIPPETS)), ("basedpyright", *PYRIGHT)],
    ids=["mypy", "pyright"],
)
def test_a_checker_refuses_what_is_marked_and_nothing_else(checker: tuple[str, ...]) -> None:
    shown = run(*checker)
    found = {":".join(at) for at in re.findall(r"(\w+\.py):(\d+)(?::\d+ -|:) error", shown)}
    assert (found - marked(), marked() - found) == (set(), set()), shown


BUILD = "import sys; from setuptools.build_meta import build_editable as b; print(b(sys.argv[1]))"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The python of an environment with this package, as `pip install -e` leaves it."""
    wheel = subprocess.check_output([sys.executable, "-c", BUILD, tmp_path], cwd=ROOT, text=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    zipfile.ZipFile(tmp_path / wheel.splitlines()[-1]).extractall(packages)
    (packages / "rest.pth").write_text(sysconfig.get_paths()["purelib"])  # torch, ray, …
    return tmp_path / "env/bin/python"


@pytest.mark.slow
def test_what_the_pages_show_passes_mypy_after_an_editable_install(
    installed: Path, tmp_path: Path
) -> None:
    programs = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        code = [block.code for block in pages.blocks(page.read_text(encoding="utf-8"))]
        alone = page.stem in ("README", "from_verl")  # each block is a program
        for i, program in enumerate(code if alone else ["\n".join(code)]):
            if "from protocol" in program or "from single_controller" in program:
                programs.append(tmp_path / f"{page.stem.lower()}_{i}.py")
                programs[-1].write_text(program, encoding="utf-8")
    assert len(programs) >= 5
    command = [sys.executable, "-m", "mypy", "--python-executable", installed]
    done = subprocess.run(
        [*command, "--cache-dir", ROOT / ".mypy_cache" / "pages", *programs],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
