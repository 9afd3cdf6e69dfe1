"""`port FILE... [--write]`: a program's imports from veRL become ours.

It edits the text of `from` imports and of dotted names, wherever they stand, and lists by line what
it could not map. Which names exist here it reads from the sources of this library, and imports
neither Ray nor torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from single_controller.verl import HOMES, MODULES

__all__ = ["Ported", "port", "ported"]


class Ported(NamedTuple):
    """A program with its new imports, and what could not be mapped, by line."""

    text: str
    problems: list[tuple[int, str]]


def ported(source: str) -> Ported:
    """Rewrite a program's imports; raises SyntaxError if it is no Python."""
    text = source.encode()  # of which ast counts the bytes
    starts = [0, *(match.end() for match in re.finditer(b"\n", text))]
    edits: dict[tuple[int, int], str] = {}
    problems: list[tuple[int, str]] = []
    rest = bytearray(text)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and "verl" in [alias.name for alias in node.names]:
            problems.append((node.lineno, "import verl"))
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if f"{node.module}.".startswith("verl."):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            before = text[starts[node.lineno - 1] : start].decode()
            edits[start, end] = _statement(node, text[start:end].decode(), before, problems)
            rest[start:end] = b" " * (end - start)
    for match in re.finditer(rb"(?<![\w.])verl(?:\.\w+)+", rest):
        old, start = match[0].decode(), match.start()
        if found := _here(old):
            edits[start, start + len(found[0])] = found[1]
        else:
            problems.append((text.count(b"\n", 0, start) + 1, old))
    for (start, end), new in sorted(edits.items(), reverse=True):
        text = text[:start] + new.encode() + text[end:]
    listed = [(line, f"{old}, left as it was") for line, old in sorted(problems)]
    return Ported(text.decode(), listed)


def _statement(
    node: ast.ImportFrom, text: str, before: str, problems: list[tuple[int, str]]
) -> str:
    """What a `from` import becomes: one with the names of each module that is here, and what is
    left of it. `before` is what stands before it on its line.
    """
    old = str(node.module)
    groups: dict[str, list[str]] = {}
    for alias in node.names:
        home = MODULES.get(old)
        if alias.name != "*":
            found = _here(f"{old}.{alias.name}")
            home = found[1].rpartition(".")[0] if found else None
        if home is None:
            problems.append((alias.lineno, f"{old}.{alias.name}"))
        groups.setdefault(old if home is None else home, []).append(ast.unparse(alias))
    if len(groups) == 1 and "" not in groups:
        return text.replace(old, min(groups), 1)  # its own lines and comments stay
    made = [
        f"from {home} import {', '.join(names)}" if home else f"import {', '.join(names)}"
        for home, names in sorted(groups.items())
    ]
    return ("; " if before.strip() else f"\n{before}").join(made)


def _here(old: str) -> tuple[str, str] | None:
    """The part of a dotted name of veRL that has a name here, less attributes of it; and that."""
    parts = old.split(".")
    for i in range(2, len(parts) + 1):
        module, name = ".".join(parts[: i - 1]), parts[i - 1]
        if module in MODULES and name in _names_in(MODULES[module]):
            return f"{module}.{name}", f"{MODULES[module]}.{name}"
        if new := HOMES.get(f"{module}.{name}"):
            return f"{module}.{name}", new
    return (old, MODULES[old]) if old in MODULES else None


@functools.cache
def _names_in(module: str) -> frozenset[str]:
    """A module's `__all__`, with that of the modules it imports whole."""
    path = Path(__file__).parents[2].joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.names[0].name == "*":
            names |= _names_in(node.module)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= {str(n.value) for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
    return frozenset(names)


def port(files: Sequence[str], write: bool) -> int:
    """Port the files; 1 if something in them could not be mapped."""
    return max([_port_file(Path(file), write) for file in files])


def _port_file(path: Path, write: bool) -> int:
    try:
        source = path.read_bytes().decode()
        text, problems = ported(source)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 1
    if write:
        path.write_bytes(text.encode())
    else:
        both = source.splitlines(), text.splitlines()
        diff = difflib.unified_diff(*both, str(path), f"{path} (ported)", lineterm="")
        sys.stdout.writelines(f"{line}\n" for line in diff)
    sys.stderr.writelines(f"{path}:{line}: not mapped: {what}\n" for line, what in problems)
    return 1 if problems else 0
