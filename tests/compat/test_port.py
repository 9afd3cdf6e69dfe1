"""The rewriting of imports: what is mapped, what is kept, what is listed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from single_controller.port import main, port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from verl import DataProto", "from protocol import DataProto"),
        ("from verl import DataProto as D  # rows", "from protocol import DataProto as D  # rows"),
        ("import verl.protocol as p\np.DataProto", "import protocol as p\np.DataProto"),
        (
            "import os, verl.protocol as p, sys  # three",
            "import os, protocol as p, sys  # three",
        ),
        ("from verl.protocol import *", "from protocol import *"),
        ("from verl import protocol", "import protocol"),
        ("from verl import protocol as p", "import protocol as p"),
        ("from verl.single_controller import ray", "from single_controller import ray"),
        (
            "from verl.utils import tensordict_utils as tu\ntu.get",
            "from protocol import tensordict_utils as tu\ntu.get",
        ),
        (
            "from verl.utils.ray_utils import parallel_put",
            "from single_controller.ray import parallel_put",
        ),
        (
            "from verl.single_controller.ray.base import (\n    RayWorkerGroup,  # groups\n\n"
            "    RayResourcePool as Pool,\n)",
            "from single_controller.ray.base import (\n    RayWorkerGroup,  # groups\n\n"
            "    RayResourcePool as Pool,\n)",
        ),
        (
            "from  verl . single_controller.base   import Worker",
            "from  single_controller.base   import Worker",
        ),
        (
            "from verl.protocol import \\\n    DataProto, \\\n    collate_fn",
            "from protocol import \\\n    DataProto, \\\n    collate_fn",
        ),
        (
            "def f():\n\tfrom verl.utils import device, tensordict_utils\n\treturn device",
            "def f():\n\tfrom protocol import tensordict_utils\n"
            "\tfrom single_controller import device\n\treturn device",
        ),
        (
            "if x: from verl.utils import device, tensordict_utils as tu",
            "if x: from protocol import tensordict_utils as tu; "
            "from single_controller import device",
        ),
        (
            "from verl.utils import (\n    device,  # kind\n    tensordict_utils,\n)  # end",
            "from protocol import tensordict_utils\nfrom single_controller import (\n"
            "    device,  # kind\n)  # end",
        ),
        (
            "from verl.single_controller.base.worker_group import ResourcePool, WorkerGroup",
            "from single_controller.base import ResourcePool\n"
            "from single_controller.base.worker_group import WorkerGroup",
        ),
        (
            "import verl\nx = verl.DataProto.concat([verl.protocol.DataProto()])",
            "import protocol\nx = protocol.DataProto.concat([protocol.DataProto()])",
        ),
        (
            "import verl.protocol\nimport verl.single_controller.ray.base\n"
            "def f(é: verl.DataProto, g='ü' * len(verl.protocol.DataProto())): pass\n"
            "verl.single_controller.ray.base.RayWorkerGroup",
            "import protocol\nimport single_controller.ray.base\n"
            "def f(é: protocol.DataProto, g='ü' * len(protocol.DataProto())): pass\n"
            "single_controller.ray.base.RayWorkerGroup",
        ),
        (
            "import verl.protocol\nverl.single_controller.base.Worker",
            "import protocol, single_controller.base\nsingle_controller.base.Worker",
        ),
        (
            "import verl\nx = (verl\n     .protocol\n     .DataProto\n     .from_dict)",
            "import protocol\nx = (protocol.DataProto\n     .from_dict)",
        ),
        (
            "from verl.single_controller.base import Worker\r\nx = 1\r\n",
            "from single_controller.base import Worker\r\nx = 1\r\n",
        ),
        (
            'import_module("verl.single_controller.ray.base")\n'
            "patch('verl.protocol.DataProto.concat')\n_target_ = 'verl.DataProto'",
            'import_module("single_controller.ray.base")\n'
            "patch('protocol.DataProto.concat')\n_target_ = 'protocol.DataProto'",
        ),
        (
            "import verl.protocol\nx: 'list[verl.protocol.DataProto]'",
            "import protocol\nx: 'list[protocol.DataProto]'",
        ),
        ("import verl\nx: 'verl.DataProto'", "import protocol\nx: 'protocol.DataProto'"),
        (
            "import verl\ndef f(é: \"dict['ü', verl.DataProto]\", k: Literal['verl.DataProto'],\n"
            "      o: Optional['verl.DataProto']) -> 'verl.DataProto | None':\n"
            "    return cast('verl.DataProto', o)",
            "import protocol\ndef f(é: \"dict['ü', protocol.DataProto]\", "
            "k: Literal['protocol.DataProto'],\n"
            "      o: Optional['protocol.DataProto']) -> 'protocol.DataProto | None':\n"
            "    return cast('protocol.DataProto', o)",
        ),
        ("from .verl import x\nfrom verlib import y\nverl.z\n",) * 2,
    ],
)
def test_imports_and_dotted_uses_are_rewritten_and_the_rest_of_the_text_stays(
    old: str, new: str
) -> None:
    ported = port(old)
    assert ported.text == new
    assert ported.problems == []
    ast.parse(ported.text)
    assert port(new).text == new


@pytest.mark.parametrize(
    ("program", "lines", "text"),
    [
        ("from verl.trainer import main_ppo", [1], None),
        (
            "from verl.protocol import *\nfrom verl.trainer import *",
            [2],
            "from protocol import *\nfrom verl.trainer import *",
        ),
        ("import verl.utils.fsdp_utils as fsdp\nfsdp.load()", [1], None),
        ("import verl", [1], None),
        (
            "from verl.protocol import (\n    DataProto,  # rows\n    _deep_equal,  # private\n)",
            [3],
            "from protocol import (\n    DataProto,  # rows\n)\n"
            "from verl.protocol import (\n    _deep_equal,  # private\n)",
        ),
        (
            "import verl\nverl.DataProto()\nverl.trainer.main_ppo.run()",
            [1, 3],
            "import verl, protocol\nprotocol.DataProto()\nverl.trainer.main_ppo.run()",
        ),
        (
            "import verl.utils.device as d\nd.get_device_name()\nd.auto_set_device(1)",
            [3],
            "import single_controller.device as d\nd.get_device_name()\nd.auto_set_device(1)",
        ),
        ("logging.getLogger('verl.trainer')\n'about verl.protocol.'", [1], None),
        ("x = f'verl.protocol'\ny = 'verl.' 'protocol'\nz = r'verl.protocol'", [1, 2, 3], None),
        (
            "import verl\nx: 'list[verl.trainer.PPO]'\ny: 'list[' 'verl.DataProto]'\n"
            "def f(z: 'verl.DataProto') -> r'set[verl.DataProto]': pass",
            [1, 2, 3, 4],
            "import verl, protocol\nx: 'list[verl.trainer.PPO]'\ny: 'list[' 'verl.DataProto]'\n"
            "def f(z: 'protocol.DataProto') -> r'set[verl.DataProto]': pass",
        ),
        (
            "import verl\nx = verl.DataProto\ndef f(protocol):\n    protocol = 1",
            [3, 4],
            "import protocol\nx = protocol.DataProto\ndef f(protocol):\n    protocol = 1",
        ),
    ],
)
def test_what_cannot_be_mapped_is_left_and_listed_by_line(
    program: str, lines: list[int], text: str | None
) -> None:
    ported = port(program)
    assert [line for line, _ in ported.problems] == lines
    assert ported.text == (program if text is None else text)


def test_a_dotted_use_in_an_f_string_is_rewritten_or_listed() -> None:
    program = 'import verl\nprint(f"{verl.DataProto()} and {1}")\n'
    ported = port(program)
    if sys.version_info >= (3, 12):  # since then ast knows where the parts of f-strings are
        assert ported.text == program.replace("verl", "protocol", 1).replace("verl.", "protocol.")
        assert ported.problems == []
    else:
        assert 2 in [line for line, _ in ported.problems] or "{protocol.DataProto()}" in ported.text
    ast.parse(ported.text)


def test_calls_that_certainly_differ_are_listed_and_mapped_all_the_same() -> None:
    ported = port(
        "from verl import DataProto\n"
        "batch.union(other)\n"
        "batch = batch.union(other)\n"
        "batch.save_to_disk(path)\n"
        "DataProto.load_from_disk(path)\n"
        "group.execute_all_sync('m', [1, 2])\n"
        "group.execute_all_sync('m', x)\n"
        "group.spawn_fused(roles)\n"
    )
    assert [line for line, _ in ported.notes] == [2, 4, 5, 6, 8]
    assert ported.problems == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("verl.protocol", "protocol"),
        ("verl.utils.tensordict_utils", "protocol.tensordict_utils"),
        ("verl.utils.device", "single_controller.device"),
        ("verl.single_controller", "single_controller"),
        ("verl.single_controller.base", "single_controller.base"),
        ("verl.single_controller.base.decorator", "single_controller.base.decorator"),
        ("verl.single_controller.base.worker", "single_controller.base.worker"),
        ("verl.single_controller.base.worker_group", "single_controller.base.worker_group"),
        ("verl.single_controller.ray", "single_controller.ray"),
        ("verl.single_controller.ray.base", "single_controller.ray.base"),
    ],
)
def test_the_names_it_maps_are_those_that_the_module_has(old: str, new: str) -> None:
    names = [name for name in importlib.import_module(new).__all__ if not name.startswith("_")]
    ported = port(f"from {old} import {', '.join(names)}")
    assert ported == (f"from {new} import {', '.join(names)}", [], [])


def test_the_diff_goes_to_stdout_the_findings_to_stderr_and_the_file_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os\nfrom verl import DataProto\nfrom verl.trainer import ppo")
    assert main([str(program)]) == 1
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


def test_write_changes_the_files_in_their_encoding_and_shows_no_diff(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin, marked = tmp_path / "latin.py", tmp_path / "marked.py"
    text = "# coding: latin-1\nimport verl\n'é', verl.DataProto\n"
    latin.write_bytes(text.encode("latin-1"))
    marked.write_bytes(b"\xef\xbb\xbffrom verl import DataProto\r\n")
    assert main([str(latin), str(marked), "--write"]) == 0
    assert latin.read_bytes().decode("latin-1") == text.replace("verl", "protocol")
    assert marked.read_bytes() == b"\xef\xbb\xbffrom protocol import DataProto\r\n"
    assert capsys.readouterr() == ("", "")


def test_a_file_that_is_missing_or_no_python_is_named_and_the_others_are_ported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, good = tmp_path / "broken.py", tmp_path / "good.py"
    broken.write_text("def (")
    good.write_text("from verl import DataProto\n")
    assert main([str(tmp_path / "none.py"), str(broken), str(good), "--write"]) == 1
    assert good.read_text() == "from protocol import DataProto\n"
    err = capsys.readouterr().err
    assert f"{tmp_path / 'none.py'}: " in err
    assert f"{broken}: invalid syntax" in err


def test_it_is_a_program_that_starts_without_ray_and_torch(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from verl.protocol import DataProto\n")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "single_controller.port", str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "+from protocol import DataProto" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"ray", "torch"} & imported
