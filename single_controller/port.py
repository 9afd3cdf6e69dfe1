"""`python -m single_controller.port FILE... [--write]`: a program's imports from veRL become ours.

It edits the text of imports, of dotted uses, in quoted annotations too, and of strings that are
such a name, nothing else, and lists by line what it could not map. Which names exist here it reads
from the sources of this library, and imports none of them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import io
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["HOMES", "MODULES", "Ported", "main", "port"]

_IS_VERL = re.compile(r"verl\b").match
_SAME = ("", ".base", ".base.decorator", ".base.worker", ".base.worker_group", ".ray", ".ray.base")
MODULES = {
    "verl.protocol": "protocol",
    "verl.utils.tensordict_utils": "protocol.tensordict_utils",
    "verl.utils.device": "single_controller.device",
    **{f"verl.single_controller{name}": f"single_controller{name}" for name in _SAME},
}
HOMES = {  # those that are not in the module of the same name
    "verl.DataProto": "protocol",
    "verl.utils.ray_utils.parallel_put": "single_controller.ray",
    "verl.single_controller.base.worker_group.ResourcePool": "single_controller.base",
}
_CALLS = {
    "spawn_fused": "absent: spawn and fuse take the roles of fused workers too",
    "DataProtoFuture": "the constructor takes other arguments; groups make futures",
    "save_to_disk": "another file format; objects that are not JSON need allow_pickle=True",
    "load_from_disk": "reads what save_to_disk wrote here, not veRL's files",
}


class Ported(NamedTuple):
    """A program with its new imports, what could not be mapped and which calls differ, by line."""

    text: str
    problems: list[tuple[int, str]]
    notes: list[tuple[int, str]]


def port(source: str) -> Ported:
    """Rewrite a program's imports; raises SyntaxError if it is no Python."""
    return _Port(source).run()


@functools.cache
def _names_in(module: str) -> frozenset[str]:
    """A module's `__all__`, with that of the modules it imports whole."""
    path = Path(__file__).parents[1].joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.names[0].name == "*":
            names |= _names_in(node.module)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= {str(n.value) for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
    return frozenset(names)


def _home(old: str) -> str | None:
    """The module that has here what veRL calls `old`; "" if that is a top-level module itself."""
    if old in MODULES:
        return MODULES[old].rpartition(".")[0]
    module, _, name = old.rpartition(".")
    if module in MODULES and name in _names_in(MODULES[module]):
        return MODULES[module]
    return HOMES.get(old)


def _first_found(old: str) -> str | None:
    """The shortest beginning of a dotted name of veRL that has a home here, or all of a module."""
    parts = old.split(".")
    begins = [".".join(parts[: i + 1]) for i in range(len(parts))]
    found = next((o for o in begins if o not in MODULES and _home(o) is not None), old)
    return None if _home(found) is None else found


def _new_name(found: str) -> str:
    """What the module, or name in a module, that veRL calls `found` is called here."""
    return MODULES.get(found) or f"{_home(found)}.{found.rpartition('.')[2]}"


class _Port:
    """One program on its way. Positions are in UTF-8 bytes, as ast counts them."""

    def __init__(self, source: str) -> None:
        self.tree, self.text = ast.parse(source), source.encode()
        self.starts = [0, *(m.end() for m in re.finditer(rb"\n", self.text))]
        self.edits: list[tuple[int, int, str]] = []
        self.problems: list[tuple[int, str]] = []
        self.notes: list[tuple[int, str]] = []
        self.roots: dict[str, str] = {}  # a name in the program → the veRL module it stands for
        self.needed: set[str] = set()  # modules here that rewritten dotted uses begin with
        self.kept = False  # whether some `verl.…` stays in the program

    def run(self) -> Ported:
        nodes = list(ast.walk(self.tree))
        every = [alias for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        plain = [alias for alias in every if _IS_VERL(alias.name)]
        roots = {a.asname or "verl": a.name if a.asname else "verl" for a in plain}
        self.roots = {name: old for name, old in roots.items() if old in {"verl", *MODULES}}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and _IS_VERL(node.module or "") and not node.level:
                self._from_import(node, node.module or "")
        self._unquote(nodes)
        nodes = list(ast.walk(self.tree))
        inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                self._use(node, ast.unparse(node).split("."))
        self._imports(plain)
        for node in nodes:
            self._look_at(node)
        text = self.text
        for start, end, new in sorted(self.edits, reverse=True):
            text = text[:start] + new.encode() + text[end:]
        return Ported(text.decode(), sorted(set(self.problems)), sorted(set(self.notes)))

    def _span(self, node: ast.expr | ast.stmt | ast.alias) -> tuple[int, int]:
        end = self.starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return self.starts[node.lineno - 1] + node.col_offset, end

    def _unquote(self, nodes: Sequence[ast.AST]) -> None:
        """Put what annotations quote into the tree, as if it were written without quotes."""
        inside = _Unquoted(self._unquoted)
        for node in nodes:
            for name in ("annotation", "returns"):
                if isinstance(annotation := getattr(node, name, None), ast.expr):
                    setattr(node, name, inside.visit(annotation))
            if isinstance(node, ast.Call) and node.args and _called(node) == "cast":
                node.args[0] = inside.visit(node.args[0])

    def _unquoted(self, node: ast.Constant, text: str) -> ast.expr:
        """The expression that a string is, if it names something of veRL's."""
        try:
            inner = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError):
            return node
        names = {n.id for n in ast.walk(inner) if isinstance(n, ast.Name)} & self.roots.keys()
        if not names or not self._is_plain(node, text):
            if "verl" in names:
                self._unknown(node.lineno, repr(text))
                self.kept = True
            return node
        for part in ast.walk(inner):
            if isinstance(part, ast.expr):
                part.lineno = part.end_lineno = node.lineno
                part.col_offset += node.col_offset + 1
                part.end_col_offset = (part.end_col_offset or 0) + node.col_offset + 1
        return inner

    def _is_plain(self, node: ast.Constant, text: str) -> bool:
        """Whether a string is one literal without prefix and escapes."""
        start, end = self._span(node)
        return self.text[start + 1 : end - 1] == text.encode()

    def _unknown(self, line: int, old: str) -> None:
        self.problems.append((line, f"{old}, left as it was"))

    def _imports(self, aliases: Sequence[ast.alias]) -> None:
        have = [MODULES.get(alias.name, "") for alias in aliases if not alias.asname]
        missing = {n for n in self.needed if not any(f"{m}.".startswith(f"{n}.") for m in have)}
        for alias in aliases:
            also = set() if alias.asname else missing
            new = MODULES.get(alias.name)
            if new is None and (alias.name != "verl" or self.kept or not also):
                new = alias.name
                self._unknown(alias.lineno, f"import {alias.name}")
            made = [ast.unparse(ast.alias(new, alias.asname))] if new else []
            self.edits.append((*self._span(alias), ", ".join([*made, *sorted(also)])))

    def _use(self, node: ast.Attribute, names: list[str]) -> None:
        """Rewrite `verl.protocol.DataProto.concat` up to the class; check that it is here."""
        if names[0] not in self.roots or not all(map(str.isidentifier, names)):
            return
        old = ".".join([self.roots[names[0]], *names[1:]])
        found = _first_found(old)
        value: ast.expr = node
        for _ in range(old.count(".") - (found or old).count(".")):
            value = value.value if isinstance(value, ast.Attribute) else value
        start, end = self._span(value)
        dotted = names[0] == "verl"
        moved = re.sub(rb"\s", b"", self.text[start:end]).decode() != found  # an old f-string
        if found is None or (dotted and moved):
            self._unknown(node.lineno, found or old)
            self.kept = self.kept or dotted
        elif dotted:
            self.needed.add(MODULES.get(found) or str(_home(found)))
            self.edits.append((start, end, _new_name(found)))

    def _from_import(self, statement: ast.ImportFrom, old: str) -> None:
        groups: dict[str, list[ast.alias]] = {}
        for alias in statement.names:
            full = f"{old}.{alias.name}"
            home = MODULES.get(old) if alias.name == "*" else _home(full)
            if home is None:
                self._unknown(alias.lineno, full)
            elif full in MODULES:
                self.roots[alias.asname or alias.name] = full
            groups.setdefault(old if home is None else home, []).append(alias)
        start, end = self._span(statement)
        module = re.match(rb"from\s+(.*?)\s+import\b", self.text[start:end], re.DOTALL)
        if len(groups) == 1 and "" not in groups and module:
            self.edits.append((start + module.start(1), start + module.end(1), min(groups)))
            return
        indent = self.text[self.starts[statement.lineno - 1] : start].decode()
        shared = indent.strip() or re.match(rb"\s*;", self.text[end:])
        comments = {} if shared else self._comments(statement)
        made = [_statement(m, names, comments, indent) for m, names in sorted(groups.items())]
        self.edits.append((start, end, ("; " if shared else "\n" + indent).join(made)))

    def _comments(self, statement: ast.ImportFrom) -> dict[str, str]:
        """Comments inside a statement, by the name that each comes after (or the first)."""
        found: dict[str, str] = {}
        lines = self.text[slice(*self._span(statement))].decode().split("\n")
        for number, line in enumerate(lines, statement.lineno):
            if "#" in line:
                above = [alias.name for alias in statement.names if alias.lineno <= number]
                name = above[-1] if above else statement.names[0].name
                found[name] = found.get(name, "") + "  " + line[line.index("#") :]
        return found

    def _string(self, node: ast.Constant, old: str) -> None:
        """Rewrite what `import_module`, `patch` and their like are given."""
        found, start = _first_found(old), self._span(node)[0]
        if found is None or not self._is_plain(node, old):
            self._unknown(node.lineno, repr(old))
        else:
            self.edits.append((start + 1, start + 1 + len(found), _new_name(found)))

    def _look_at(self, node: ast.AST) -> None:
        """List what else names veRL, and the calls that certainly differ."""
        line: int = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and re.fullmatch(r"verl(\.\w+)+", str(node.value)):
            self._string(node, str(node.value))
        name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", "")
        stored = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
        if stored and name in {module.split(".")[0] for module in self.needed}:
            self.problems.append((line, f"{name} is a module now: rename the variable"))
        call = node.value if isinstance(node, ast.Expr) else node
        if not isinstance(call, ast.Call):
            return
        called = _called(call)
        if called in _CALLS:
            self.notes.append((line, f"{called}: {_CALLS[called]}"))
        if called == "union" and isinstance(node, ast.Expr):
            self.notes.append((line, "union: returns a new batch and changes neither"))
        if called.startswith("execute_all") and any(ast.unparse(a)[0] == "[" for a in call.args):
            self.notes.append((line, f"{called}: lists go whole to all; PerRank scatters"))


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


class _Unquoted(ast.NodeTransformer):
    """Replaces the strings in an annotation, other than those of a `Literal`."""

    def __init__(self, replace: Callable[[ast.Constant, str], ast.expr]) -> None:
        self._replace = replace

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        literal = ast.unparse(node.value).rpartition(".")[2] == "Literal"
        return node if literal else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return self._replace(node, node.value) if isinstance(node.value, str) else node


def _statement(module: str, names: list[ast.alias], comments: dict[str, str], indent: str) -> str:
    remarks = [comments.get(alias.name, "") for alias in names]
    line = ", ".join(map(ast.unparse, names))
    if not module:
        return f"import {line}{''.join(remarks)}"
    if len(f"{indent}from {module} import {line}") <= 100 and not any(remarks):
        return f"from {module} import {line}"
    inside = [f"{indent}    {ast.unparse(n)},{c}\n" for n, c in zip(names, remarks, strict=True)]
    return f"from {module} import (\n{''.join(inside)}{indent})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Port the files; 1 if something in them could not be mapped."""
    parser = argparse.ArgumentParser(prog="python -m single_controller.port", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="change the files; show no diff")
    options = parser.parse_args(arguments)
    return max([_port_file(path, options.write) for path in options.files])


def _port_file(path: Path, write: bool) -> int:
    try:
        raw = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        source = raw.decode(encoding)
        ported = port(source)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 1
    if write:
        path.write_bytes(ported.text.encode(encoding))
    else:
        both = source.splitlines(), ported.text.splitlines()
        diff = difflib.unified_diff(*both, str(path), f"{path} (ported)", lineterm="")
        sys.stdout.writelines(f"{line}\n" for line in diff)
    for kind, found in (("not mapped", ported.problems), ("differs", ported.notes)):
        sys.stderr.writelines(f"{path}:{line}: {kind}: {what}\n" for line, what in found)
    return 1 if ported.problems else 0


if __name__ == "__main__":
    sys.exit(main())
