"""A program for veRL on this core without an edit: its names, its workers, what is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import ray
import verl.single_controller.ray.base as long
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils
from verl.utils.device import get_device_name
from verl.utils.ray_utils import parallel_put

class Asking(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def core(self):
        import os, verl.protocol
        return verl.protocol.__name__, os.environ.get("FROM_THE_HOOK")

if __name__ == "__main__":
    own = {"worker_process_setup_hook": "hook.run"} if "hooked" in sys.argv else {}
    ray.init("local", num_cpus=1, include_dashboard=False, runtime_env=own)
    pool = RayResourcePool([1], use_gpu=False)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Asking)))
    print(group.core(), sys.argv[1:], DataProto.__module__, long.RayWorkerGroup is RayWorkerGroup)
"""


def run(folder: Path, *arguments: str, program: str = PROGRAM) -> tuple[str, str]:
    (folder / "program.py").write_text(program)
    (folder / "hook.py").write_text("import os\ndef run(): os.environ['FROM_THE_HOOK'] = 'yes'\n")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "hooked"), [(["program.py"], "None"), (["-m", "program", "hooked"], "'yes'")]
)
def test_a_program_runs_with_this_core_in_driver_and_workers(
    tmp_path: Path, how: list[str], hooked: str
) -> None:
    output, errors = run(tmp_path, "-m", "single_controller.verl", *how)
    rest = [word for word in how if word == "hooked"]
    assert output.endswith(f"[('protocol', {hooked})] {rest} protocol.data_proto True\n"), errors


@pytest.mark.slow
def test_an_import_in_the_first_line_does_the_same_and_modules_are_attributes(
    tmp_path: Path,
) -> None:
    program = """
import single_controller.as_verl
import verl, protocol
print(verl.protocol is protocol, hasattr(verl.protocol, "nothing"))
print(verl.protocol.DataProto is verl.DataProto, verl.utils.device.get_device_name())
print(verl.single_controller.ray.base.RayWorkerGroup.__name__)
"""
    said = run(tmp_path, "program.py", program=program)
    assert said == ("True False\nTrue cpu\nRayWorkerGroup\n", "")


LATE = "import single_controller.as_verl before"

MISSING = {
    "from verl.protocol import nothing": "ImportError: verl.protocol.nothing is not in",
    "import verl.protocol; verl.protocol.x": "AttributeError: verl.protocol.x is not in",
    "import verl.single_controller.x": "verl.single_controller.x is not in this core",
    "import verl.trainer": "verl.trainer needs veRL, which is not installed",
    "from verl.utils.ray_utils import auto_await": "auto_await is not in this core",
}


def test_what_is_not_here_is_named_with_the_page_that_says_what_is(tmp_path: Path) -> None:
    program = f"""
import single_controller.as_verl
for statement in {[*MISSING]}:
    try:
        exec(statement)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""
    output, errors = run(tmp_path, "program.py", program=program)
    lines = output.splitlines()
    assert len(lines) == len(MISSING), errors
    for line, said in zip(lines, MISSING.values(), strict=True):
        assert said in line
        assert line.endswith("docs/from_verl.md says what to use instead")


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import sys; sys.modules['verl.protocol'] = sys", f"{LATE} veRL: verl.protocol is loaded"),
        ("import ray; ray.is_initialized = lambda: True", f"{LATE} ray.init(), which tells"),
        (
            "from single_controller import as_verl, verl\n"
            "verl.runtime_env({'worker_process_setup_hook': print})",
            "worker_process_setup_hook must be named",
        ),
    ],
)
def test_an_import_that_comes_too_late_and_a_hook_that_is_a_function_are_refused(
    tmp_path: Path, before: str, said: str
) -> None:
    assert said in run(tmp_path, "-c", f"{before}\nimport single_controller.as_verl")[1]


def test_the_launcher_says_how_it_is_used(tmp_path: Path) -> None:
    used = "usage: python -m single_controller.verl (FILE | -m MODULE) [ARGUMENTS…]\n"
    assert run(tmp_path, "-m", "single_controller.verl", "--help") == (used, "")
    assert run(tmp_path, "-m", "single_controller.verl") == ("", used)
