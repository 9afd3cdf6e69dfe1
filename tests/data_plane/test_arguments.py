"""What arguments and results weigh on the wire, and who owns what arrives."""

from __future__ import annotations

import gc
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tensordict import TensorDict

from protocol import DataProto
from protocol.tensordict_utils import get_tensordict
from single_controller import SendError, SharedMemoryWriteError
from single_controller.ray import Colocated, RayWorkerGroup, pin
from tests.data_plane.stage import batch, xs
from tests.waiting import eventually

MB = 1 << 20


def big() -> DataProto:
    return DataProto.from_dict({"x": torch.ones(6, MB // 4)})  # 6 MB


def sent(group: RayWorkerGroup, call: Any) -> float:
    """MB that left the driver for a call."""
    before = sum(row.bytes_out for row in group.stats())
    call()
    return (sum(row.bytes_out for row in group.stats()) - before) / MB


def stored() -> int:
    """Bytes in the object store, as the cluster learns a moment later."""
    store = "object_store_memory"
    return int(ray.cluster_resources()[store] - ray.available_resources().get(store, 0))


def test_a_tensor_that_several_arguments_have_leaves_once(three: RayWorkerGroup) -> None:
    data = big()
    assert 6 <= sent(three, lambda: three.total(data)) < 6.1
    assert 6 <= sent(three, lambda: three.total(data, data)) < 6.1
    assert 6 <= sent(three, lambda: three.total(data, data.select(["x"]))) < 6.1
    assert 6 <= sent(three, lambda: three.give([data, data.batch["x"]])) < 6.1
    assert three.total(data, data) == [MB] * 3


class _PicklesItself:
    def __init__(self, data: DataProto, protocol: int) -> None:
        self.data, self.protocol = data, protocol

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (pickle.dumps(self.data, self.protocol),)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_batch_that_an_argument_pickles_by_itself_leaves_with_its_own_rows_only(
    three: RayWorkerGroup, protocol: int
) -> None:
    data = big()
    value = [data, _PicklesItself(data[1:2], protocol), data]
    assert 7 <= sent(three, lambda: three.give(value)) < 7.1
    for _, own, whole in three.give(value):
        assert data[1:2].diff(own) == data.diff(whole) == []


@pytest.mark.parametrize("big", [torch.zeros(MB // 2), np.zeros(MB // 2, "f4")], ids=["t", "a"])
def test_what_all_rows_share_leaves_once_for_all_ranks(three: RayWorkerGroup, big: Any) -> None:
    data = DataProto.from_dict({"x": torch.ones(6)}, meta_info={"a": [1], "big": big, "z": "text"})
    expected = [(["a", "big", "z"], rank, True) for rank in range(3)]
    assert three.shared(data) == expected
    assert 2 <= sent(three, lambda: three.shared(data)) < 2.1
    assert 2 <= sent(three, lambda: three.shared(data, data, data[[5, 4, 3, 2, 1, 0]])) < 2.1
    assert three.shared(data, data, data[[5, 4, 3, 2, 1, 0]]) == expected
    td = get_tensordict({"x": torch.ones(6)}, {"big": big, "z": "text"})
    assert 2 <= sent(three, lambda: three.shared(td)) < 2.1
    assert three.shared(td) == [(["big", "z"], rank, True) for rank in range(3)]
    assert [*data.meta_info] == ["a", "big", "z"]
    assert data.meta_info["big"] is big
    assert float(big[0]) == 0


def test_what_takes_few_bytes_as_a_pickle_goes_with_each_call(three: RayWorkerGroup) -> None:
    many = [None] * 5_000  # 10 kB, though it is long
    assert three.explain("give", many).arguments[0].bytes < 16_000
    assert three.give(many) == [many] * 3


def test_a_host_with_a_loop_fetches_large_arguments_in_the_turn_of_their_call(
    async_roles: Colocated,
) -> None:
    for group in async_roles.one, async_roles.two:
        assert 6 <= sent(group, lambda group=group: group.total(big())) < 6.1
    assert async_roles.one.total(big(), batch(6)) == [3 * MB // 4 + 3, 3 * MB // 4 + 12]
    assert async_roles.one.step(big()).get().batch["x"][0, 0] == 3
    meta = {"big": np.zeros(MB // 4, "f4")}
    with_meta = DataProto.from_dict({"x": torch.ones(6)}, meta_info=meta)
    assert async_roles.one.shared(with_meta) == [(["big"], rank, True) for rank in range(2)]
    array = np.ones(200_000)
    assert [float(got.sum()) for got in async_roles.two.give(array)] == [200_000.0] * 2


def test_nothing_is_published_for_a_call_that_cannot_be_sent(
    roles: Colocated, three: RayWorkerGroup
) -> None:
    made = roles.one.double(batch(6))
    before = roles.one.stats()["double"].bytes_between
    unsendable = DataProto.from_dict({"x": torch.ones(6)}, meta_info={"lock": threading.Lock()})
    with pytest.raises(SendError, match=r"argument 1.*lock"):
        three.total(made, unsendable)
    assert made.rows() == 12
    assert roles.one.results_kept() == [1, 1]
    assert roles.one.stats()["double"].bytes_between == before


def test_a_pinned_batch_leaves_never_again(roles: Colocated, three: RayWorkerGroup) -> None:
    data = big()
    pinned = pin(data)
    data.batch["x"].zero_()
    assert sent(three, lambda: three.total(pinned)) == 0
    assert sent(roles.two, lambda: roles.two.total(pinned, pinned)) == 0
    assert len(pinned) == 6
    assert sum(three.total(pinned.select("x"))) == 6 * MB / 4
    assert xs(roles.one.step(pin(batch(3))).get()) == [1, 3, 5]
    whole = pinned.get()
    whole.batch["x"] += 1
    assert sum(three.total(pinned)) == 6 * MB / 4


def test_a_pinned_batch_is_gone_with_the_last_that_holds_it(three: RayWorkerGroup) -> None:
    gc.collect()
    before = stored()
    pinned = pin(DataProto.from_dict({"x": torch.ones(6, 4 * MB)}))  # 96 MB
    part = pinned.select("x")
    assert three.total(part) == [8 * MB] * 3
    del pinned
    gc.collect()
    assert eventually(lambda: stored() > before + 60 * MB)
    assert three.total(part) == [8 * MB] * 3
    del part
    gc.collect()
    assert eventually(lambda: stored() < before + 30 * MB)


def test_what_comes_back_is_private_and_writable(three: RayWorkerGroup) -> None:
    value = {"t": torch.ones(2000), "a": np.ones(2000), "td": TensorDict({"x": torch.ones(2)}, [2])}
    outputs = three.give(value)
    outputs[0]["t"] += 1
    outputs[0]["a"] += 1
    outputs[0]["td"]["x"] += 1
    assert outputs[1]["t"].sum() == outputs[1]["a"].sum() == 2000
    assert outputs[1]["td"]["x"].sum() == 2
    alone = three.step.options(ranks=[0]).submit(batch(4)).result()
    alone.batch["x"] += 1
    alone.non_tensor_batch["s"][0] += 1
    whole = three.step.submit(batch(4)).result()
    whole.batch["x"] += 1
    whole.non_tensor_batch["s"][0] += 1
    gc.collect()
    assert xs(whole) == xs(alone) == [2, 4, 6, 8]


def test_stats_say_what_calls_cost(three: RayWorkerGroup) -> None:
    before = three.stats()["total"]
    three.total(big())
    row = three.stats()["total"]
    assert row.calls == before.calls + 1
    assert row.bytes_out - before.bytes_out > 6 * MB
    assert row.wait_s > before.wait_s
    assert row.dispatch_s > before.dispatch_s
    assert row.bytes_in == 0
    assert str(three.stats()).startswith("method")
    assert three.stats()["never"].calls == 0


def test_a_method_that_breaks_its_word_to_read_only_is_found_out(three: RayWorkerGroup) -> None:
    assert len(three.borrowed_addresses(big())) == 3
    with pytest.raises(SharedMemoryWriteError, match=r"reads_only=True.*argument 0, which"):
        three.spoil_borrowed(big())
    with pytest.raises(ValueError, match="read-only"):
        three.write_array({"a": np.ones(2000)})
