"""`import single_controller.as_verl`, before all else: a program for veRL runs on this core.

From then on veRL's names for its core (`verl.protocol`, `verl.single_controller` and all below it,
`verl.utils.tensordict_utils`) lead to the modules here, in this process and in the workers of the
Ray that it starts; whatever else the installed veRL has stays veRL's. Where veRL is not installed,
the names that are left of it are `verl.DataProto`, `verl.utils.device` and
`verl.utils.ray_utils.parallel_put`.
"""

from __future__ import annotations

import dis
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

from single_controller.base.dispatch import ByRows
from single_controller.base.plan import Plan
from single_controller.verl import BEFORE, HOMES, MODULES, WORKERS, named

__all__ = ["QueueRows", "in_worker", "install"]

_PAGE = "docs/from_verl.md says what to use instead"
_STAND_INS = ("verl", "verl.utils", "verl.utils.ray_utils")  # packages that are veRL's where it is
_QUEUE = "verl.utils.transferqueue_utils"
_HOOK = "RAY_RUNTIME_ENV_HOOK"


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
    """Put the modules here in the place of veRL's; importing this module does so.

    Raises:
        ImportError: veRL's own are in use already.
        RuntimeError: Ray is, so that its workers would have veRL's.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if late := sorted(name for name in MODULES if name in sys.modules):
        raise ImportError(f"import single_controller.as_verl before veRL: {late[0]} is loaded")
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and WORKERS not in os.environ:
        raise RuntimeError(
            "import single_controller.as_verl before ray.init(), which tells the workers"
        )
    sys.meta_path.insert(0, _Finder(PathFinder.find_spec("verl") is not None))
    ours = "single_controller.verl.runtime_env"
    if (before := os.environ.get(_HOOK, ours)) != ours:
        os.environ[BEFORE] = before
    os.environ[_HOOK] = ours


def in_worker() -> None:
    """What a worker of Ray runs first: the program's own hook, once veRL's names lead here."""
    if os.environ[WORKERS]:
        named(os.environ[WORKERS])()


install()
