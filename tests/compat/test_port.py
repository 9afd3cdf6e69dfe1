"""The rewriting of imports: what is mapped, what is kept, what is listed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from single_controller.__main__ import main
from single_controller.cli.port import ported
from single_controller.verl import MODULES

ROOT = Path(__file__).parents[2]
BEFORE = r"""
from verl import DataProto as D  # rows
from verl import protocol as p
import os, verl.protocol as q, sys  # three
from verl.protocol import *
from  verl.single_controller.base   import Worker
from verl.single_controller import ray
from verl.utils import tensordict_utils as tu
from verl.utils.ray_utils import parallel_put
from verl.single_controller.ray.base import (
    RayWorkerGroup,  # groups

    RayResourcePool as Pool,
)
from verl.protocol import \
    DataProto, \
    collate_fn
from verl.utils import (
    device,  # kind
    tensordict_utils,
)  # end
from verl.single_controller.base.worker_group import ResourcePool, WorkerGroup
from .verl import x
from verlib import y
def f():
	from verl.utils import device, tensordict_utils
	return device, "about verl.protocol."  # or verl.utils.device
if x: from verl.utils import device, tensordict_utils as tu
tu.get, p.DataProto, q.DataProto
import_module("verl.single_controller.ray.base")
patch('verl.protocol.DataProto.concat')
_target_ = r'verl.DataProto'
"""
AFTER = r"""
from protocol import DataProto as D  # rows
import protocol as p
import os, protocol as q, sys  # three
from protocol import *
from  single_controller.base   import Worker
from single_controller import ray
from protocol import tensordict_utils as tu
from single_controller.ray import parallel_put
from single_controller.ray.base import (
    RayWorkerGroup,  # groups

    RayResourcePool as Pool,
)
from protocol import \
    DataProto, \
    collate_fn
from protocol import tensordict_utils
from single_controller import device  # end
from single_controller.base import ResourcePool
from single_controller.base.worker_group import WorkerGroup
from .verl import x
from verlib import y
def f():
	from protocol import tensordict_utils
	from single_controller import device
	return device, "about protocol."  # or single_controller.device
if x: from protocol import tensordict_utils as tu; from single_controller import device
tu.get, p.DataProto, q.DataProto
import_module("single_controller.ray.base")
patch('protocol.DataProto.concat')
_target_ = r'protocol.DataProto'
"""
DOTTED = """
import verl.protocol
import verl.single_controller.ray.base
def f(é: verl.DataProto, g='ü' * len(verl.protocol.DataProto())): pass
verl.single_controller.ray.base.RayWorkerGroup
def f(é: "dict['ü', verl.DataProto]", o: Optional['verl.DataProto']) -> 'verl.DataProto | None':
    return cast('verl.DataProto', o)
print(f"{verl.DataProto()} and {1}")
"""
REWRITTEN = [
    (BEFORE, AFTER),
    (DOTTED, DOTTED.replace("verl.DataProto", "protocol.DataProto").replace("verl.", "")),
    ("from verl import DataProto\r\nx = 1\r\n", "from protocol import DataProto\r\nx = 1\r\n"),
]
LISTED = [  # with the lines that have what could not be mapped
    ("import verl.utils.fsdp_utils as fsdp\nfsdp.load()", None, [1]),
    ("import verl\nx = verl.DataProto", "import verl\nx = protocol.DataProto", [1]),
    ("logging.getLogger('verl.trainer')\nx: 'list[verl.trainer.PPO]'", None, [1, 2]),
    (
        "from verl.protocol import *\nfrom verl.trainer import *",
        "from protocol import *\nfrom verl.trainer import *",
        [2],
    ),
    (
        "from verl.protocol import DataProto, _deep_equal",
        "from protocol import DataProto\nfrom verl.protocol import _deep_equal",
        [1],
    ),
]


@pytest.mark.parametrize(("old", "new", "lines"), [*((a, b, []) for a, b in REWRITTEN), *LISTED])
def test_imports_and_dotted_uses_are_rewritten_or_listed_and_the_rest_of_the_text_stays(
    old: str, new: str | None, lines: list[int]
) -> None:
    found = ported(old)
    assert found.text == (old if new is None else new)
    assert [line for line, _ in found.problems] == lines
    ast.parse(found.text)
    assert ported(found.text).text == found.text


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_the_names_it_maps_are_those_that_the_module_has(old: str, new: str) -> None:
    names = [name for name in importlib.import_module(new).__all__ if not name.startswith("_")]
    found = ported(f"from {old} import {', '.join(names)}")
    assert found == (f"from {new} import {', '.join(names)}", [])


def test_the_diff_goes_to_stdout_the_findings_to_stderr_and_the_file_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os\nfrom verl import DataProto\nfrom verl.trainer import ppo")
    assert main(["port", str(program)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[2:] == [
        "@@ -1,3 +1,3 @@",
        " import os",
        "-from verl import DataProto",
        "+from protocol import DataProto",
        " from verl.trainer import ppo",
    ]
    assert err == f"{program}:3: not mapped: verl.trainer.ppo, left as it was\n"
    assert "verl import DataProto" in program.read_text()


def test_write_changes_files_and_names_those_that_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, broken = tmp_path / "program.py", tmp_path / "broken.py"
    program.write_bytes("from verl import DataProto\r\n'é'\r\n".encode())
    broken.write_text("def (")
    files = [tmp_path / "none.py", broken, program]
    assert main(["port", *map(str, files), "--write"]) == 1
    assert program.read_bytes() == "from protocol import DataProto\r\n'é'\r\n".encode()
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{tmp_path / 'none.py'}: " in err
    assert f"{broken}: invalid syntax" in err
    assert len(err.splitlines()) == 2


def test_it_is_a_program_that_starts_without_ray_and_torch(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from verl.protocol import DataProto\n")
    command = [sys.executable, "-X", "importtime", "-m", "single_controller", "port", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "+from protocol import DataProto" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "single_controller" in imported
    assert not {"ray", "torch"} & imported
