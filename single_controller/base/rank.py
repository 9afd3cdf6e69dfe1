"""What happens on a rank whatever process it is in: roles are built, outputs checked, errors shown.

Where ranks are and how calls reach them is left to the backends.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from single_controller.base.residency import Turns
from single_controller.base.roles import FusedWorker, RoleSpec
from single_controller.base.worker import Worker, WorkerContext, building
from single_controller.errors import RegistrationError

__all__ = [
    "NO_BATCH",
    "build_roles",
    "checked_output",
    "coroutine_stacks",
    "exit_code",
    "has_async_method",
    "own_frames",
    "own_traceback",
    "restore_hooks",
]


NO_BATCH = (
    "{role}.{method} returned no batch, and its mode joins the ranks' outputs to one: return a "
    "DataProto or TensorDict"
)


def has_async_method(roles: Mapping[str, RoleSpec]) -> bool:
    """Whether any role has an `async def` method."""
    return any(
        inspect.iscoroutinefunction(getattr(role.cls, name, None))
        for role in roles.values()
        for name in dir(role.cls)
    )


def build_roles(
    context: WorkerContext,
    roles: Mapping[str, RoleSpec],
    turns: Turns,
    failure: Callable[[str, BaseException], BaseException],
) -> Iterator[tuple[str, Worker]]:
    """Construct a rank's workers in their order, each known to the others once it is there.

    Those that take turns are off the device then.

    Raises:
        What `failure(role, error)` makes of what a constructor raised.
    """
    for role, spec in roles.items():
        try:
            with building(context):
                worker = spec.cls(*spec.args, **spec.kwargs)
            if worker.takes_turns and has_async_method(roles):
                raise RegistrationError(
                    f"role {role!r} takes turns on the device, which needs calls that run one "
                    "after another; a role of this process has an async def method"
                )
            turns.add(role, worker)
        except (Exception, SystemExit) as error:
            raise failure(role, error) from None
        if not isinstance(worker, FusedWorker):
            context.peers[role] = worker
        yield role, worker


def restore_hooks(workers: Mapping[str, Worker]) -> list[tuple[str, Callable[[], Any]]]:
    """The optional `restore()` of the workers that have one, by role, for those that take over."""
    found = {role: getattr(worker, "restore", None) for role, worker in workers.items()}
    return [(role, hook) for role, hook in found.items() if callable(hook)]


def checked_output(output: Any) -> Any:
    """What a method returned. Raises TypeError where it is no value that could be sent."""
    if inspect.iscoroutine(output):
        output.close()
        raise TypeError(
            "the method returned a coroutine: it is async under a decorator that hides it; let the "
            "decorator's own function be `async def`"
        )
    if inspect.isgenerator(output) or inspect.isasyncgen(output):
        raise TypeError("the method returned a generator, which cannot be sent; return a list")
    return output


def exit_code(request: SystemExit) -> int:
    """What a process ends with that does as it is asked."""
    code = request.code
    return code % 256 if isinstance(code, int) else int(code is not None)


def own_traceback(error: BaseException, hidden: Sequence[str]) -> str:
    """The traceback with its causes, without the frames of files in the `hidden` folders."""
    shown: traceback.TracebackException | None
    shown = whole = traceback.TracebackException.from_exception(error)
    ours = (os.path.dirname(__file__), *hidden)
    while shown is not None:
        own = [frame for frame in shown.stack if not frame.filename.startswith(ours)]
        shown.stack = traceback.StackSummary.from_list(own or shown.stack)
        shown = shown.__cause__ or shown.__context__
    return "".join(["On the worker: ", *whole.format()])


def own_frames(frames: Iterable[FrameType], hidden: Sequence[str]) -> list[str]:
    """A line for each frame that is not of files in the `hidden` folders."""
    return [
        f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}'
        for frame in frames
        if not frame.f_code.co_filename.startswith((os.path.dirname(__file__), *hidden))
    ]


def coroutine_stacks(coroutines: Iterable[Any], hidden: Sequence[str]) -> str:
    """What each coroutine awaits, the innermost frame first, without frames of `hidden` folders."""
    shown = []
    for coroutine in coroutines:
        lines = own_frames(reversed(list(_awaited(coroutine))), hidden)
        shown.append("\n".join(lines) or "  waits for its arguments")
    return "\n  -- another coroutine --\n".join(shown)


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is None:
            return
        yield frame
        coroutine = getattr(coroutine, "cr_await", None)
