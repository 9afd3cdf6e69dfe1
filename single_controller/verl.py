"""`python -m single_controller.verl PROGRAM ARGUMENTS…`: a program for veRL runs on this core.

PROGRAM is a file, or a module behind `-m`, as for python itself. `as_verl` is for programs that
say so in their first line.
"""

from __future__ import annotations

import dis
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from single_controller.base.dispatch import ByRows
from single_controller.base.plan import Plan

__all__ = ["HOMES", "MODULES", "QueueRows", "in_worker", "install", "main", "named", "runtime_env"]

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
_STAND_INS = ("verl", "verl.utils", "verl.utils.ray_utils")  # packages that are veRL's where it is
_PAGE = "docs/from_verl.md says what to use instead"
_QUEUE = "verl.utils.transferqueue_utils"
_HOOK = "RAY_RUNTIME_ENV_HOOK"
_BEFORE = "SINGLE_CONTROLLER_RUNTIME_ENV_HOOK"  # the RAY_RUNTIME_ENV_HOOK that was there before
_WORKERS = "SINGLE_CONTROLLER_AS_VERL"  # set in workers: the hook that the program has for them
_IN_WORKERS = "single_controller.as_verl.in_worker"
_USAGE = "usage: python -m single_controller.verl (FILE | -m MODULE) [ARGUMENTS…]"


def named(name: str) -> Any:
    """What `module.name` is."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


class _Finder(MetaPathFinder, Loader):
    def __init__(self, installed: bool) -> None:
        own = ("verl.utils.device",) if installed else ()  # veRL's own platforms decide there
        self._homes = {name: home for name, home in MODULES.items() if name not in own}
        self._stand_ins = () if installed else _STAND_INS

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self._homes or fullname in self._stand_ins:
            return spec_from_loader(fullname, self, is_package=fullname in self._stand_ins)
        below = fullname.startswith("verl.single_controller.")
        if below or (self._stand_ins and fullname.startswith("verl.")):
            missing = "is not in this core" if below else "needs veRL, which is not installed"
            raise ModuleNotFoundError(f"{fullname} {missing}: {_PAGE}", name=fullname)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name in self._homes:
            module = sys.modules[name] = importlib.import_module(self._homes[name])
            queue = not self._stand_ins and find_spec("transfer_queue")
            if queue and name == "verl.single_controller.base.decorator":
                module.register = _bridged(module)  # type: ignore[attr-defined]
        if "__getattr__" not in vars(module):
            module.__getattr__ = _absent(name)  # type: ignore[method-assign]


def _absent(module: str) -> Callable[[str], Any]:
    """What a module of this core says of a name that veRL's has and it has not."""

    def found(name: str) -> Any:
        full = f"{module}.{name}"
        if full in HOMES:
            return named(HOMES[full])
        if full in MODULES or full in _STAND_INS:  # veRL's packages import what is below them
            return importlib.import_module(full)
        message = f"{full} is not in this core: {_PAGE}"
        caller = sys._getframe(1)
        # `from … import name` has a message of its own for an AttributeError
        if caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
            raise ImportError(message, name=name)
        raise AttributeError(message, name=name)

    return found


@dataclass(frozen=True)
class QueueRows(ByRows):
    """Rows that may be in veRL's TransferQueue, where calls send and return records of them. What
    ranks say beside the rows comes back as lists, of one value per rank.
    """

    def _shards(self, name: str, batch: Any, parts: int, pads: bool) -> Sequence[Any]:
        queue = importlib.import_module(_QUEUE)
        if isinstance(batch, queue.KVBatchMeta):  # its keys are looked up once, not by each rank
            batch = queue.kv_batch_meta2batch_meta(batch)
        return super()._shards(name, batch, parts, pads)

    def collect(self, plan: Plan, outputs: Sequence[Any]) -> Any:
        queue = importlib.import_module(_QUEUE)
        if self.merge == "list" or not all(isinstance(o, queue.BatchMeta) for o in outputs):
            return super().collect(plan, outputs)
        said: dict[str, list[Any]] = {}
        for output in outputs:
            for key, value in output.extra_info.items():
                said.setdefault(key, []).append(value)
            output.extra_info = {}
        whole = super().collect(plan, outputs)
        whole.extra_info = said
        return queue.batch_meta2kv_batch_meta(whole)


def _bridged(decorator: Any) -> Callable[..., Any]:
    """`register` whose methods read from TransferQueue the rows of which they get a record, and put
    there what they return: veRL's own function does both.
    """
    register, every = decorator.register, decorator.Dispatch.ALL_TO_ALL

    def bridged(dispatch_mode: Any = every, *more: Any, **options: Any) -> Any:
        mode = decorator._check_dispatch_mode(dispatch_mode)
        ours = QueueRows(**vars(mode)) if type(mode) is ByRows else dispatch_mode
        mark = register(ours, *more, **options)
        bridge = importlib.import_module(_QUEUE).tqbridge(dispatch_mode)
        return lambda method: mark(bridge(method))

    return bridged


def install() -> None:
    """Put the modules here in the place of veRL's; importing `as_verl` does so.

    Raises:
        ImportError: veRL's own are in use already.
        RuntimeError: Ray is, so that its workers would have veRL's.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if late := sorted(name for name in MODULES if name in sys.modules):
        raise ImportError(f"import single_controller.as_verl before veRL: {late[0]} is loaded")
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and _WORKERS not in os.environ:
        raise RuntimeError(
            "import single_controller.as_verl before ray.init(), which tells the workers"
        )
    sys.meta_path.insert(0, _Finder(PathFinder.find_spec("verl") is not None))
    ours = "single_controller.verl.runtime_env"
    if (before := os.environ.get(_HOOK, ours)) != ours:
        os.environ[_BEFORE] = before
    os.environ[_HOOK] = ours


def runtime_env(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `ray.init` asks, by RAY_RUNTIME_ENV_HOOK: a job's runtime environment, with this core
    under veRL's names in its workers if that is so in this process.

    Raises:
        ValueError: the program has a function as `worker_process_setup_hook`.
    """
    if _BEFORE in os.environ:
        given = named(os.environ[_BEFORE])(given)
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
        env["env_vars"] = {**(env.get("env_vars") or {}), _WORKERS: own or ""}
    return env


def in_worker() -> None:
    """What a worker of Ray runs first: the program's own hook, once veRL's names lead here."""
    if os.environ[_WORKERS]:
        named(os.environ[_WORKERS])()


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
