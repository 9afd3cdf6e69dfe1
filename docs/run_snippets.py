"""Run the Python of the pages, each page as one program, and compare what they say it prints.

A block that is not meant to run has `<!-- not run: why -->` above it. A `text` block right after a
Python block is that block's output; addresses, process ids and times may differ.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\n)?```python\n(?P<code>.*?)```"
    r"(?:\n\n```text\n(?P<output>.*?)```)?",
    re.DOTALL,
)
_COMMAND = re.compile(
    r"(?:^|`)python\s-m\s((?:single_controller|examples)(?:\.[a-z_]+)+|single_controller)"
    r"(?![.\w])(?:\s([a-z]+)\b)?",
    re.MULTILINE,
)
_CUT = "-- the next block --"


class Block(NamedTuple):
    """A block of Python and what its page says that it prints, if it says so."""

    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page that run."""
    found = _BLOCK.finditer(page)
    return [Block(block["code"], block["output"]) for block in found if not block["skip"]]


def _run(arguments: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=limit_s, check=False
    )


def check_python(path: Path, folder: Path) -> list[str]:
    """Run a page's blocks as one program; what is wrong."""
    found = blocks(path.read_text(encoding="utf-8"))
    if not found:
        return []
    program = folder / f"{path.stem}.py"
    ends = f"\nprint({_CUT!r}, flush=True)\n"
    program.write_text(ends.join(block.code for block in found) + ends, encoding="utf-8")
    done = _run([str(program)], 120)
    if done.returncode != 0:
        return [f"{path}: its Python ends with {done.returncode}:\n{done.stderr[-3_000:]}"]
    printed = done.stdout.split(f"{_CUT}\n")
    return [
        f"{path}: this block\n{block.code}\nprints\n{output}\nand the page says\n{block.output}"
        for block, output in zip(found, printed, strict=False)
        if block.output is not None and _words(block.output) != _words(output)
    ]


def _words(text: str) -> list[str]:
    """The words of a text, without what differs from run to run, and without Ray's own lines."""
    text = re.sub(r"^\S*\(raylet\).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b\d+\.\d+\.\d+\.\d+\b(:\d+)?", "ADDRESS", text)
    text = re.sub(r"\bpid \d+", "pid PID", text)
    text = re.sub(r"(: DataProto +\d+ +\w+ +)\d+", r"\1BYTES", text)
    text = re.sub(r"(ADDRESS +\w+ +)\d+", r"\1PID", text)
    return re.sub(r"\b\d+\.\d+ (ms|s)\b", r"TIME \1", text).split()


def check_commands(path: Path) -> list[str]:
    """Ask each of this project's commands that a page names for its help."""
    found = set(_COMMAND.findall(path.read_text(encoding="utf-8")))
    shown = {f"{m} {c}".strip() if m == "single_controller" else m for m, c in found}
    return [
        f"{path}: there is no command python -m {command}"
        for command in sorted(shown)
        if not _is_command(command)
    ]


@functools.cache
def _is_command(command: str) -> bool:
    return _run(["-m", *command.split(), "--help"], 60).returncode == 0


def main(pages: Sequence[str]) -> int:
    """Check the pages on one cluster; 1 if something in them is wrong."""
    import tempfile

    import ray

    context = ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR")  # type: ignore[arg-type]
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]  # type: ignore[attr-defined]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for page in map(Path, pages):
            found = check_python(page, Path(folder)) + check_commands(page)
            print(f"{page}: {'wrong' if found else 'runs'}", flush=True)
            wrong += found
    ray.shutdown()
    print("\n\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
