"""`python -m single_controller.verl PROGRAM ARGUMENTS…`: a program for veRL runs on this core.

PROGRAM is a file, or a module behind `-m`, as for python itself. How veRL's names come to lead here
is in `as_verl`; what they are here stands below.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["BEFORE", "HOMES", "MODULES", "WORKERS", "main", "named", "runtime_env"]

_SAME = ("", ".base", ".base.decorator", ".base.worker", ".base.worker_group", ".ray", ".ray.base")
MODULES = {
    "verl.protocol": "protocol",
    "verl.utils.tensordict_utils": "protocol.tensordict_utils",
    "verl.utils.device": "single_controller.device",
    **{f"verl.single_controller{name}": f"single_controller{name}" for name in _SAME},
}
HOMES = {  # those that are not in the module of the same name
    "verl.DataProto": "protocol.DataProto",
    "verl.utils.ray_utils.parallel_put": "single_controller.ray.parallel_put",
    "verl.single_controller.base.worker_group.ResourcePool": "single_controller.base.ResourcePool",
}
WORKERS = "SINGLE_CONTROLLER_AS_VERL"  # set in workers: the hook that the program has for them
BEFORE = "SINGLE_CONTROLLER_RUNTIME_ENV_HOOK"  # the RAY_RUNTIME_ENV_HOOK that was there before
_IN_WORKERS = "single_controller.as_verl.in_worker"
_USAGE = "usage: python -m single_controller.verl (FILE | -m MODULE) [ARGUMENTS…]"


def named(name: str) -> Any:
    """What `module.name` is."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def runtime_env(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `ray.init` asks, by RAY_RUNTIME_ENV_HOOK: a job's runtime environment, with this core
    under veRL's names in its workers if that is so in this process.

    Raises:
        ValueError: the program has a function as `worker_process_setup_hook`.
    """
    if BEFORE in os.environ:
        given = named(os.environ[BEFORE])(given)
    if "single_controller.as_verl" not in sys.modules:
        return given
    env = dict(given or {})
    own = env.get("worker_process_setup_hook")
    if callable(own):
        raise ValueError(
            "worker_process_setup_hook must be named, as 'package.module.function', for "
            f"single_controller.as_verl to run it after its own; got {own!r}"
        )
    if own != _IN_WORKERS:
        env["worker_process_setup_hook"] = _IN_WORKERS
        env["env_vars"] = {**(env.get("env_vars") or {}), WORKERS: own or ""}
    return env


def main(arguments: Sequence[str]) -> None:
    """Run the program as `__main__`, with the rest of the arguments for itself."""
    module = arguments[:1] == ["-m"]
    program, *rest = arguments[1:] if module else arguments or [""]
    if program in ("-h", "--help"):
        sys.stdout.write(f"{_USAGE}\n")
        return
    if not program or program.startswith("-"):
        raise SystemExit(_USAGE)
    importlib.import_module("single_controller.as_verl")
    sys.argv = [program, *rest]
    sys.path.insert(0, str(Path.cwd() if module else Path(program).resolve().parent))
    if module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
