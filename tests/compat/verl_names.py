"""What veRL's own package takes from its core, read from its sources, and what each of it is here.

Run with the python of .venv-verl and PYTHONPATH=., this file writes it into docs/from_verl.md; with
`--check` it says whether the page has it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from single_controller.verl import HOMES, MODULES, named

PAGE = Path(__file__).parents[2] / "docs/from_verl.md"
BEGIN, END = "<!-- generated: tests/compat/verl_names.py -->\n", "<!-- end -->\n"
CLASSES = {  # here, by where veRL has them
    "protocol.DataProto": "protocol",
    "protocol.DataProtoFuture": "protocol",
    "single_controller.base.worker.Worker": "single_controller.base.worker",
    "single_controller.base.worker_group.ResourcePool": "single_controller.base",
    "single_controller.base.worker_group.ClassWithInitArgs": "single_controller.base",
    "single_controller.base.worker_group.WorkerGroup": "single_controller.base",
    "single_controller.ray.base.RayResourcePool": "single_controller.ray",
    "single_controller.ray.base.SubRayResourcePool": "single_controller.ray",
    "single_controller.ray.base.ResourcePoolManager": "single_controller.ray",
    "single_controller.ray.base.RayClassWithInitArgs": "single_controller.ray",
    "single_controller.ray.base.RayWorkerGroup": "single_controller.ray",
}
_TAKEN_FROM = (*MODULES, "verl.utils.ray_utils")


def root() -> Path:
    """The folder of the installed veRL."""
    found = importlib.util.find_spec("verl")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def sources() -> Iterator[ast.Module]:
    """The files that are not the core itself."""
    core = {"protocol.py", "utils/tensordict_utils.py", "utils/device.py", "utils/ray_utils.py"}
    for path in sorted(root().rglob("*.py")):
        name = path.relative_to(root()).as_posix()
        if name not in core and not name.startswith("single_controller/"):
            yield ast.parse(path.read_text(encoding="utf-8"))


def used() -> tuple[set[str], set[str]]:
    """Dotted names that are imported from the core, and all names of attributes; private ones only
    of other objects than `self`.
    """
    names, attributes = set(), set()
    for tree in sources():
        known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if full in _TAKEN_FROM:
                        known[alias.asname or alias.name] = full
                    elif node.module in _TAKEN_FROM or full == "verl.DataProto":
                        names.add(full)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in _TAKEN_FROM and alias.asname:
                        known[alias.asname] = alias.name
            elif isinstance(node, ast.Attribute) and (
                node.attr[0] != "_" or getattr(node.value, "id", "") != "self"
            ):
                attributes.add(node.attr)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = known.get(node.value.id)
                if module:
                    names.add(f"{module}.{node.attr}")
    return names, attributes


def members(tree: ast.AST, class_name: str) -> set[str]:
    """Methods and attributes of a class, as its source has them."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(part.name)
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    if getattr(part.value, "id", "") == "self":
                        found.add(part.attr)
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    found.add(part.target.id)
    return {name for name in found if not name.startswith("__")}


def class_members(attributes: Iterable[str]) -> Iterator[str]:
    """Of the core's classes, the members whose names veRL uses anywhere outside the core."""
    wanted = set(attributes)
    for full in CLASSES:
        module, _, name = full.rpartition(".")
        path = root().joinpath(*module.split("."))
        source = path.with_suffix(".py").read_text(encoding="utf-8")
        for member in sorted(members(ast.parse(source), name) & wanted):
            yield f"{full}.{member}"


def here(name: str) -> str | None:
    """What a name of veRL's core does here, in a sentence; None if it is not here."""
    owner, _, member = name.rpartition(".")
    if owner in CLASSES:
        found: Any = getattr(importlib.import_module(CLASSES[owner]), owner.rpartition(".")[2])
        value = inspect.getattr_static(found, member, None)
        if value is None:
            kept = {m for base in found.__mro__ for m in _members_of(base)}
            return "attribute" if member in kept else None
    else:
        home = MODULES.get(owner)
        value = getattr(importlib.import_module(home), member, None) if home else None
        value = named(HOMES[name]) if name in HOMES else value
    if value is None:
        return None
    value = getattr(value, "__func__", value)
    text = inspect.getdoc(value) if callable(value) or hasattr(value, "fget") else None
    sentence = (text or "attribute").split("\n\n")[0].replace("\n", " ")
    return sentence.replace("|", "\\|")


def _members_of(cls: type) -> set[str]:
    try:
        return members(ast.parse(inspect.getsource(cls)), cls.__name__)
    except (OSError, TypeError, SyntaxError):
        return set()


def table() -> str:
    """All names, each with what it is here, as a table in Markdown."""
    names, attributes = used()
    absent = PAGE.read_text(encoding="utf-8").partition("## Absent")[2]
    lines = ["| veRL uses | here |\n", "|---|---|\n"]
    for name in [*sorted(names), *class_members(attributes)]:
        shown = name.removeprefix("verl.")
        text = here(name)
        if text is None:
            own = f"verl.{shown}" in absent or f"`{shown.rpartition('.')[2]}`" in absent
            text = "see [Absent](#absent)" if own else "MISSING"
        lines.append(f"| `{shown}` | {text} |\n")
    return "".join(lines)


def main() -> int:
    """Write the table into the page, or compare; 1 if it differs or a name is missing."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    new = before + BEGIN + table() + END + rest.partition(END)[2]
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    missing = [line for line in new.splitlines() if line.endswith("| MISSING |")]
    sys.stdout.write("\n".join([*missing, "" if new == text else "the page is not up to date\n"]))
    return int(bool(missing) or new != text)


if __name__ == "__main__":
    sys.exit(main())
