"""A process that lends tensors of its device, and what is in them."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch

from protocol.wire import Reading, read_as
from single_controller.base.message import Message
from single_controller.ray.message import Packer

COUNT = 300
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
_VIEWS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x,
    lambda x: x.T,
    lambda x: x[::2, 1:],
    lambda x: x[:1].expand(4, -1),
    lambda x: x.reshape(-1)[5:50],
    lambda x: x[3, 3],
    lambda x: x[:0],
    lambda x: x[2:],
)

_here: dict[str, Any] = {}  # what the lender has


class Lender:
    """Calls functions in a process of its own, whose current device is a given one."""

    def __init__(self, card: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, card), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self._pipe.send((function, args))
        done, value = self._pipe.recv()
        assert done, value
        return value

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Any, card: int) -> None:
    torch.cuda.set_device(card)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _numbers(step: int, device: str) -> list[torch.Tensor]:
    """Other ones at every step, in tensors of 1 to 128 KB and one of 64 MB."""
    made = []
    for i in range(COUNT):
        size = 1 << 20 if i == 0 else 16 * (1 + i % 64)
        ramp = torch.arange(size * 16, device=device).reshape(size, 16)
        made.append(((ramp + i + step) % 3).to(DTYPES[i % len(DTYPES)]))
    return made


def _views(numbers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    kinds, several = len(DTYPES), len(_VIEWS)
    found = {str(i): _VIEWS[i // kinds % several](x) for i, x in enumerate(numbers)}
    return found | {"the same": numbers[1], "part of it": numbers[1][4:8]}


def expected(step: int) -> dict[str, torch.Tensor]:
    return _views(_numbers(step, "cpu"))


def fill(step: int) -> None:
    """Write other numbers into the same memory."""
    made = _numbers(step, "cuda")
    for old, new in zip(_here.setdefault("numbers", made), made, strict=True):
        old.copy_(new)


def make(step: int) -> None:
    """Have them in other memory, after the driver got back what there was."""
    drop()
    torch.cuda.empty_cache()
    _here["numbers"] = _numbers(step, "cuda")


def resize(step: int) -> None:
    """Have them in the same storages with other memory, as FSDP's gathered parameters are."""
    numbers = _here["numbers"]
    sizes = [x.untyped_storage().nbytes() for x in numbers]
    for x in numbers:
        x.untyped_storage().resize_(0)
    torch.cuda.empty_cache()
    for x, size in zip(numbers, sizes, strict=True):
        x.untyped_storage().resize_(size)
    fill(step)


def lend() -> bytes:
    """All of them."""
    return lend_value(_views(_here["numbers"]))


def lend_value(value: Any) -> bytes:
    message = Message.of(value, Packer, lends=True)
    assert not message.buffers, "some bytes go by the host"
    _here["lent"] = value, message.lent
    return pickle.dumps(message, 5)


def lend_big(mib: int) -> bytes:
    _here.setdefault("big", torch.ones(mib << 20, dtype=torch.uint8, device="cuda"))
    return lend_value({"big": _here["big"]})


def lend_part_of_ragged() -> bytes:
    """Some of each row, which are put one after another to be sent; then memory is written over."""
    rows = torch.stack([torch.arange(4.0) + 10 * i for i in range(1000)]).cuda()
    starts, lengths = torch.ones(1000, dtype=torch.int64), torch.full((1000,), 2)
    part = torch.nested.narrow(rows, 1, starts.cuda(), lengths.cuda(), layout=torch.jagged)
    sent = lend_value({"part": part})
    _here["over"] = [torch.full((2000,), -1.0, device="cuda") for _ in range(100)]
    torch.cuda.synchronize()
    return sent


def drop() -> None:
    _here.clear()


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def read(sent: bytes, how: Reading) -> Any:
    """What was lent, in the reader's process."""
    with read_as(how):
        return pickle.loads(sent).read()


def differing(found: dict[str, torch.Tensor], step: int) -> list[str]:
    """The names of tensors that are not as `expected`."""
    wanted = expected(step)
    assert found.keys() == wanted.keys()
    return [
        name
        for name, x in found.items()
        if (x.dtype, x.shape) != (wanted[name].dtype, wanted[name].shape)
        or x.device != torch.device("cuda", torch.cuda.current_device())
        or not torch.equal(x.cpu(), wanted[name])
    ]
