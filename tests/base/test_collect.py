"""What is copied of the outputs between their arrival and the caller."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protocol import DataProto
from single_controller.base.decorator import Dispatch, register, registered_methods
from single_controller.base.method import BoundMethod, MethodBinding, Pending
from single_controller.base.plan import Layout
from single_controller.base.recorder import Recorder
from single_controller.base.worker import Worker


class Actor(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def step(self, data: DataProto) -> DataProto:
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def each(self, data: DataProto) -> DataProto:
        return data


class Arriving(Pending):
    """Batches whose tensors are in memory that others may read too."""

    def __init__(self, batches: list[DataProto]) -> None:
        self.buffers: list[np.ndarray[Any, Any]] = []
        self.outputs: list[DataProto] = []
        self._sent = [self._send(batch) for batch in batches]

    def _send(self, batch: DataProto) -> tuple[bytes, list[Any]]:
        views: list[pickle.PickleBuffer] = []
        data = pickle.dumps(batch, protocol=5, buffer_callback=views.append)
        copies = [np.frombuffer(view, np.uint8).copy() for view in views]
        for copy in copies:
            copy.flags.writeable = False
        self.buffers += copies
        return data, copies

    def wait(self, timeout_s: float | None) -> list[Any]:
        self.outputs = [pickle.loads(data, buffers=buffers) for data, buffers in self._sent]
        return self.outputs

    def holds(self, batch: DataProto) -> bool:
        return any(np.shares_memory(batch.batch["x"].numpy(), b) for b in self.buffers)

    async def arrive(self) -> bool:
        return True

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return False

    def handles(self, batched: bool) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("name", "ranks", "as_views"),
    [("step", 2, True), ("step", 1, False), ("each", 2, False)],
)
def test_outputs_that_are_joined_are_copied_once_and_others_are_private(
    name: str, ranks: int, as_views: bool
) -> None:
    binding = MethodBinding(name, *registered_methods(Actor)[name])
    group: Any = SimpleNamespace(role="actor", world_size=ranks)
    method = BoundMethod(group, binding)
    pending = Arriving([DataProto.from_dict({"x": torch.full((3,), r)}) for r in range(ranks)])
    plan = method.mode.plan(Layout.flat(ranks))
    result = method.result(plan, pending, None, Recorder().call("actor", name))
    assert [pending.holds(output) for output in pending.outputs] == [as_views] * ranks
    whole = result if isinstance(result, DataProto) else DataProto.concat(result)
    assert whole.batch["x"].tolist() == [r for r in range(ranks) for _ in range(3)]
    assert not any(map(pending.holds, result if isinstance(result, list) else [result]))
