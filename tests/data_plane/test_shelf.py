"""What stays in a process is not changed unseen, and who waits there holds nobody up."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from protocol import DataProto
from single_controller.ray.shelf import Kept, in_thread
from tests.data_plane.stage import xs


def kept(data: DataProto) -> Kept:
    place = Kept()
    place.keep(data, "actor.make")
    return place


def test_what_was_not_made_is_published_as_nothing_and_no_error_that_nobody_reads() -> None:
    failed = Kept()
    failed.fail()
    assert failed.published(None, lends=False) == (None, 0)
    assert Kept().keep("no batch", "actor.make") is None
    with pytest.raises(RuntimeError, match="failed or was dropped"):
        failed.rows(0, 1, None)


def test_a_maker_may_write_on_in_the_arrays_that_it_returned() -> None:
    base = np.arange(4)
    names = np.array(["a", "b"], dtype=object)
    place = kept(DataProto.from_dict(None, {"n": base[:2], "s": names}))
    base += 10
    names[0] = "z"
    arrays = place.rows(0, 2, None).non_tensor_batch
    assert [arrays["n"].tolist(), arrays["s"].tolist()] == [[0, 1], ["a", "b"]]


def test_it_holds_neither_the_graph_nor_the_containers_of_its_maker() -> None:
    weight = torch.ones(2, requires_grad=True)
    data = DataProto.from_dict({"x": weight * 2}, meta_info={"steps": [1]})
    place = kept(data)
    data.meta_info["steps"].append(2)
    data.pop(["x"])
    assert place.rows(0, 2, None).batch["x"].grad_fn is None
    assert place.rows(0, 2, None).batch["x"].requires_grad
    assert place.rows(0, 2, None).meta_info == {"steps": [1]}


def test_tensors_of_inference_mode_can_stay_too() -> None:
    with torch.inference_mode():
        data = DataProto.from_dict({"x": torch.ones(2)})
    assert xs(kept(data).rows(0, 2, None)) == [1, 1]


def test_waiting_in_threads_knows_no_limit() -> None:
    everyone = threading.Barrier(50)

    async def main() -> list[int]:
        return await asyncio.gather(*(in_thread(everyone.wait) for _ in range(50)))

    assert sorted(asyncio.run(asyncio.wait_for(main(), 60))) == list(range(50))


def test_what_is_raised_in_a_thread_is_raised_by_its_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: 1 // 0))
