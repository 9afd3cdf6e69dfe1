"""Values of any kind that stay with their workers: handles, and what arrives for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from protocol import DataProto
from protocol import tensordict_utils as tu
from single_controller import (
    Broadcast,
    DispatchError,
    Handle,
    PerRank,
    WorkerError,
)
from tests.conformance.probe import batch, values


@dataclass
class State:
    """What a trainer might hand over."""

    step: int
    model: Any


class Pair(NamedTuple):
    one: Any
    other: Any


def shown(value: Any) -> Any:
    """The same of comparable parts, so that nothing but memory may differ."""
    if isinstance(value, torch.Tensor):
        kind = type(value), value.dtype, value.requires_grad, value.grad_fn
        return *kind, value.shape, value.tolist()
    if isinstance(value, np.ndarray):
        return value.dtype, value.flags.writeable, value.tolist()
    if isinstance(value, DataProto):
        return shown([dict(value.batch), value.non_tensor_batch, value.meta_info])
    if isinstance(value, TensorDict):
        return value.batch_size, shown({k: tu.get(value, k) for k in sorted(value.keys())})
    if isinstance(value, torch.nn.Module):
        return type(value), shown(dict(value.named_parameters())), value.training
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [shown(item) for item in value]
    return (type(value), shown(vars(value))) if isinstance(value, State) else value


def things() -> dict[str, Any]:
    dense, layer = torch.arange(12.0).reshape(3, 4), torch.nn.Linear(3, 2)
    return {
        "nothing": None,
        "small": {"a": [1, "x", (2.5, None)]},
        "large": ["x" * 200_000, b"y" * 200_000],
        "dict": {"w": dense, "steps": 3, "half": dense.bfloat16()},
        "dataclass": State(1, {"layers": [dense, (dense + 1,)]}),
        "named": Pair(dense, {"n": np.arange(3)}),
        "strided": [dense.t(), dense[:, 1], torch.ones(1).expand(3), dense[::2]],
        "empty": [torch.empty(0, 3), torch.empty(2, 0), torch.tensor(2.0), np.empty(0)],
        "grad": [torch.ones(2, requires_grad=True), torch.nn.Parameter(dense.clone())],
        "frozen": torch.nn.Parameter(torch.arange(3), requires_grad=False),
        "module": layer,
        "state": dict(layer.state_dict()),
        "arrays": {
            "n": np.arange(4),
            "s": np.array(["a", {}], dtype=object),
            "f": np.ones((2, 3)).T,
        },
        "batches": [batch(3), TensorDict({"x": dense, "s": NonTensorData("t")}, [3])],
        "no rows": tu.get_tensordict({}, {"metrics": {"loss": 1.0}}),
    }


def test_any_value_stays_and_arrives_as_it_was(group: Any, wider: Any) -> None:
    for name, value in things().items():
        handle = group.give(value)[1]
        assert isinstance(handle, Handle)
        expected = shown(value)
        assert shown(handle.get()) == expected, name
        found = [*wider.echo(handle, y=[handle]), *group.echo(handle, y=[handle])]
        for _, alone, inside in found:
            assert (shown(alone), shown(inside)) == (expected, (list, [expected])), name


def test_what_is_one_object_arrives_as_one_and_a_reader_may_write_into_its_own(group: Any) -> None:
    tied = torch.nn.Parameter(torch.zeros(2, 2))
    handle = group.give(State(0, {"in": tied, "out": tied, "row": tied[0].detach()}))[0]
    for made in (handle.get(), group.echo(handle)[0][1]):
        assert made.model["in"] is made.model["out"]
        made.model["in"].data += 1
    assert handle.get().model["in"].sum() == 0
    handle = group.give({"a": np.zeros(2), "t": torch.zeros(2), "batch": batch(2)})[0]
    assert [*group.write(handle), *group.write(handle)] == [2.0] * 4
    assert group.look(handle) == [(False, 0.0)] * 2


def test_a_handle_arrives_as_its_value_wherever_it_stands(group: Any) -> None:
    one, other = group.one_to_all("v")
    first, second = (0, "v", None), (1, "v", None)
    assert group.echo(one, y=other) == [(0, first, second), (1, first, second)]
    assert group.echo(PerRank([one, other]), one) == [(0, first, first), (1, second, first)]
    assert group.echo(Broadcast(other), [one, one]) == [
        (rank, second, [first, first]) for rank in range(2)
    ]
    nested = {"a": (other, [{"b": one}]), "c": [], "d": 3}
    as_value = {"a": (second, [{"b": first}]), "c": [], "d": 3}
    assert group.echo(nested, y=PerRank([nested, 1])) == [(0, as_value, as_value), (1, as_value, 1)]
    assert nested["a"][0] is other
    held = State(1, {"w": one, "rows": group.add_rank_later(batch(2))})
    for _, found, _ in group.echo(held):
        assert (found.model["w"], values(found.model["rows"])) == (first, [0, 2])
    assert group.one_to_all([one])[1].get() == (1, [first], None)
    assert group.echo.submit(one).result() == [(0, first, None), (1, first, None)]
    assert group.echo.options(ranks=[1])(other) == [(1, second, None)]


def test_every_mode_takes_handles_and_one_that_splits_rows_says_how(group: Any, wider: Any) -> None:
    one, other = made = group.one_to_all(5)
    first, second = (0, 5, None), (1, 5, None)
    assert group.scatter(made) == group.each(made) == [(0, first, None), (1, second, None)]
    assert group.scatter(Broadcast(made)) == [(rank, [first, second], None) for rank in range(2)]
    assert group.scatter(one) == [(0, first, None), (1, first, None)]
    assert wider.each([one, other, other, one])[2] == (2, second, None)
    assert group.lead(made) == group.lead_too(made) == (0, [first, second], None)
    for mode in (group.add_rank, group.meshed, group.metric, group.uneven_rows):
        with pytest.raises(DispatchError, match=r"data must be|argument 0 must be.*Broadcast\(x\)"):
            mode(one)
    whole = group.give(batch(2))[1]
    assert values(group.second(batch(4), Broadcast(whole))) == [0, 1, 0, 1]
    assert values(group.meshed(PerRank([whole, whole]))) == [0, 1, 1, 2]
    picked = group.custom(one.get()[1])
    assert isinstance(picked, Handle)
    assert picked.get() == (1, 6, None)


def test_a_method_that_takes_handles_gets_them_and_one_that_awaits_runs_on(
    group: Any, roles: dict[str, Any]
) -> None:
    small, large = group.give(1)[1], group.give({"w": torch.ones(2)})[1]
    for handle in (small, large):
        assert shown(group.fetch(handle)[0][1:]) == shown((True, handle.get()))
        assert shown(roles["critic"].awaited(handle)) == (list, [shown(handle.get())] * 2)
    grown = roles["critic"].grow(roles["critic"].grow(large)[1])
    assert [one.get()["w"].tolist() for one in grown] == [[4, 4], [5, 5]]
    assert [x["w"].tolist() for _, x, _ in group.echo(PerRank(grown))] == [[4, 4], [5, 5]]


def test_a_handle_can_be_awaited_and_asked(group: Any) -> None:
    async def both(handles: list[Any]) -> list[Any]:
        return await asyncio.gather(*handles)

    assert asyncio.run(both(group.give("x"))) == ["x", "x"]
    (handle,) = group.give.options(ranks=[1], timeout_s=60)(Pair(torch.ones(2), [torch.ones(1)]))
    (found,) = asyncio.run(both([handle]))
    assert found.one.tolist() == [1, 1]
    assert handle.done()
    assert repr(handle) == "<handle of Probe.give, rank 1>"


def test_what_went_wrong_on_one_rank_is_told_to_who_asks_any(
    group: Any, wider: Any, in_turn: dict[str, Any]
) -> None:
    fragile = in_turn["Fragile"]

    def reads(handle: Any) -> list[Any]:
        async def wait() -> Any:
            return await handle

        later = group.give([handle])[0]  # which nobody has asked for yet
        calls = (partial(one, handle) for one in (wider.echo, group.echo, group.fetch))
        unawaited = group.fetch.submit(handle).result
        return [handle.get, later.get, unawaited, lambda: asyncio.run(wait()), *calls]

    for what, kind in (("raise", KeyError), ("lock", TypeError), ("generator", TypeError)):
        for read in reads(fragile.act_later(what)[0]):
            with pytest.raises(kind) as caught:
                read()
            assert isinstance(caught.value, WorkerError)
            assert (caught.value.method, caught.value.rank) == ("act_later", 1)
    with pytest.raises(WorkerError, match="returned a generator"):
        fragile.act("generator")
