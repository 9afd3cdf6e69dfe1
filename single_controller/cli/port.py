"""`port FILE... [--write]`: a program's imports from veRL become ours.

It edits the text of imports, of dotted uses, in quoted annotations too, and of strings that are
such a name, nothing else, and lists by line what it could not map. Which names exist here it reads
from the sources of this library, and imports none of them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from single_controller.verl import HOMES, MODULES

__all__ = ["Ported", "port", "ported"]

_DIFFER = {
    "spawn_fused": "absent: spawn and fuse take the roles of fused workers too",
    "DataProtoFuture": "the constructor takes other arguments; groups make futures",
    "save_to_disk": "another file format; objects that are not JSON need allow_pickle=True",
    "union": "returns a new batch and changes neither",
    "load_from_disk": "reads what save_to_disk wrote here, not veRL's files",
}


class Ported(NamedTuple):
    """A program with its new imports, what could not be mapped and which calls differ, by line."""

    text: str
    problems: list[tuple[int, str]]
    notes: list[tuple[int, str]]


def ported(source: str) -> Ported:
    """Rewrite a program's imports; raises SyntaxError if it is no Python."""
    return _Program(source).ported()


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


class _Program:
    """One program on its way; `edits` are by the part of its text that they replace."""

    def __init__(self, source: str) -> None:
        self.text, self.nodes = source, list(ast.walk(ast.parse(source)))
        self.starts = [0, *(match.end() for match in re.finditer("\n", source))]
        self.edits: dict[tuple[int, int], str] = {}
        self.problems: set[tuple[int, str]] = set()
        self.roots: dict[str, str] = {}  # a name in the program → the veRL module it stands for
        self.needed: set[str] = set()  # modules that dotted uses begin with, as they are now

    def ported(self) -> Ported:
        imports = [node for node in self.nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        plain: list[ast.alias] = []
        for node in imports:
            if isinstance(node, ast.Import):
                plain += [a for a in node.names if a.name.split(".")[0] == "verl"]
            elif not node.level and node.module and node.module.split(".")[0] == "verl":
                self._from_import(node, node.module)
        for alias in plain:
            if alias.name in MODULES or not alias.asname:
                self.roots[alias.asname or "verl"] = alias.name if alias.asname else "verl"
        self._uses([self._span(node) for node in imports])
        self._imports(plain)
        text = self.text
        for (start, end), new in sorted(self.edits.items(), reverse=True):
            text = text[:start] + new + text[end:]
        problems = [(line, f"{old}, left as it was") for line, old in sorted(self.problems)]
        return Ported(text, problems, sorted(set(_differing(self.nodes))))

    def _span(self, node: ast.stmt | ast.alias) -> tuple[int, int]:
        def at(line: int, column: int) -> int:  # ast counts the bytes of UTF-8
            start = self.starts[line - 1]
            return start + len(self.text[start : start + column].encode()[:column].decode())

        end = at(node.end_lineno or 0, node.end_col_offset or 0)
        return at(node.lineno, node.col_offset), end

    def _from_import(self, node: ast.ImportFrom, old: str) -> None:
        groups: dict[str, list[str]] = {}  # by module, the names it has; "" for modules themselves
        for alias in node.names:
            full = f"{old}.{alias.name}"
            home = MODULES.get(old)
            if alias.name != "*":
                found = _here(full)
                home = found and found[1].rpartition(".")[0]
            if home is None:
                self.problems.add((alias.lineno, full))
            elif full in MODULES:
                self.roots[alias.asname or alias.name] = full
            groups.setdefault(old if home is None else home, []).append(ast.unparse(alias))
        start, end = self._span(node)
        module = re.match(r"from\s+(.*?)\s+import\b", self.text[start:end], re.DOTALL)
        if len(groups) == 1 and "" not in groups and module:
            self.edits[start + module.start(1), start + module.end(1)] = min(groups)
            return
        before = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        shared = before.strip() or re.match(r"\s*;", self.text[end:])
        made = [
            f"from {home} import {', '.join(names)}" if home else f"import {', '.join(names)}"
            for home, names in sorted(groups.items())
        ]
        remarks = "".join(f"  {text}" for text in re.findall("#.*", self.text[start:end]))
        self.edits[start, end] = ("; " if shared else "\n" + before).join(made) + remarks

    def _uses(self, hidden: list[tuple[int, int]]) -> None:
        """Rewrite dotted names of veRL, in code and in strings that could be code."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if not tokenize.tok_name[token.type].endswith(("COMMENT", "STRING", "_MIDDLE")):
                continue
            start, end = (self.starts[row - 1] + column for row, column in (token.start, token.end))
            match = re.fullmatch(r"(\w*)('{3}|\"{3}|'|\")(.*)\2", token.string, re.DOTALL)
            if match and "f" in match[1].lower():
                continue  # Python before 3.12 does not tell what is code in it
            hidden.append((start, end))
            if match and "verl." in match[3] and _is_expression(match[3]):
                self._rewrite(start + match.start(3), match[3], {"verl": "verl"})
        code = list(self.text)
        for start, end in hidden:
            code[start:end] = "\0" * (end - start)
        if self.roots:
            self._rewrite(0, "".join(code), self.roots)

    def _rewrite(self, at: int, text: str, roots: Mapping[str, str]) -> None:
        names = "|".join(map(re.escape, roots))
        for match in re.finditer(rf"(?<![\w.])(?:{names})(?:\s*\.\s*[^\W\d]\w*)+", text):
            root, *rest = re.sub(r"\s", "", match[0]).split(".")
            old, start = ".".join([roots[root], *rest]), at + match.start()
            found = _here(old)
            if found is None:
                self.problems.add((self.text.count("\n", 0, start) + 1, old))
            if root == "verl" and (found or not at):  # a string alone needs no import of veRL
                known, new = found or ("verl", "verl")
                self.needed.add(MODULES.get(known) or new.rpartition(".")[0] or new)
                parts = list(re.finditer(r"\w+", match[0]))
                self.edits[start, start + parts[known.count(".")].end()] = new

    def _imports(self, aliases: Sequence[ast.alias]) -> None:
        have = [MODULES.get(alias.name, "") for alias in aliases if not alias.asname]
        missing = {n for n in self.needed if not any(f"{m}.".startswith(f"{n}.") for m in have)}
        for alias in aliases:
            also = set() if alias.asname else missing
            new = MODULES.get(alias.name)
            if new is None and not (alias.name == "verl" and also):
                new = alias.name
                self.problems.add((alias.lineno, f"import {alias.name}"))
            made = [ast.unparse(ast.alias(new, alias.asname))] if new else []
            self.edits[self._span(alias)] = ", ".join([*made, *sorted(also)])


def _differing(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Calls that certainly differ, by line."""
    for node in nodes:
        call = node.value if isinstance(node, ast.Expr) else node
        if not isinstance(call, ast.Call):
            continue
        called = str(getattr(call.func, "attr", getattr(call.func, "id", "")))
        if called in _DIFFER and (called != "union" or isinstance(node, ast.Expr)):
            yield call.lineno, f"{called}: {_DIFFER[called]}"
        if called.startswith("execute_all") and any(ast.unparse(a)[0] == "[" for a in call.args):
            yield call.lineno, f"{called}: lists go whole to all; PerRank scatters"


def _is_expression(text: str) -> bool:
    try:
        return bool(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError):
        return False


def port(files: Sequence[str], write: bool) -> int:
    """Port the files; 1 if something in them could not be mapped."""
    return max([_port_file(Path(file), write) for file in files])


def _port_file(path: Path, write: bool) -> int:
    try:
        with tokenize.open(path) as file:
            encoding = file.encoding
        source = path.read_bytes().decode(encoding)
        text, problems, notes = ported(source)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 1
    if write:
        path.write_bytes(text.encode(encoding))
    else:
        both = source.splitlines(), text.splitlines()
        diff = difflib.unified_diff(*both, str(path), f"{path} (ported)", lineterm="")
        sys.stdout.writelines(f"{line}\n" for line in diff)
    for kind, found in (("not mapped", problems), ("differs", notes)):
        sys.stderr.writelines(f"{path}:{line}: {kind}: {what}\n" for line, what in found)
    return 1 if problems else 0
