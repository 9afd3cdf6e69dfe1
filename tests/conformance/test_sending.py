"""Arguments that cannot be pickled: the error says which part of which one, and nothing is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from protocol import DataProto
from single_controller import Broadcast, SendError
from single_controller.base import PerRank
from tests.conformance.probe import batch

LOCK = threading.Lock()
WHY = r"cannot pickle '_thread\.lock' object"


class Holder:
    def __init__(self, part: Any) -> None:
        self.part = part


def with_lock(row: int) -> DataProto:
    data = batch(4)
    data.non_tensor_batch["o"] = np.array([None] * 4, dtype=object)
    data.non_tensor_batch["o"][row] = {"lock": LOCK}
    return data


ROW = r"non_tensor_batch\['o'\], row {}\['lock'\]"


def with_shared_lock() -> DataProto:
    return DataProto.from_dict({"a": torch.zeros(4)}, meta_info={"l": LOCK})


def tensordict_with_lock() -> TensorDict:
    return TensorDict({"a": torch.zeros(4), "o": NonTensorData(LOCK)}, [4])


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "argument": (lambda g: g.lead(LOCK), "argument 0"),
    "by name": (lambda g: g.echo(1, y=LOCK), "argument 'y'"),
    "in containers": (lambda g: g.echo({"a": [1, (LOCK,)]}), r"argument 0: \['a'\]\[1\]\[0\]"),
    "in an object": (lambda g: g.echo(Holder([LOCK])), r"argument 0: part\[0\]"),
    "for all": (lambda g: g.scatter(Broadcast([LOCK])), r"argument 0: \[0\]"),
    "for one rank": (lambda g: g.scatter(PerRank([1, LOCK])), "argument 0: rank 1"),
    "in a row": (lambda g: g.add_rank(with_lock(3)), f"argument 0: {ROW.format(3)}"),
    "later": (lambda g: g.add_rank_later(with_lock(2)), f"argument 0: {ROW.format(2)}"),
    "submitted": (lambda g: g.add_rank.submit(data=with_lock(0)), f"'data': {ROW.format(0)}"),
    "in meta_info": (lambda g: g.add_rank(with_shared_lock()), r"argument 0: meta_info\['l'\]"),
    "in a TensorDict": (lambda g: g.echo(tensordict_with_lock()), r"argument 0: \['o'\]"),
    "on all": (lambda g: g.execute_all("echo", LOCK), "argument 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_pickled_is_named_and_no_rank_is_called(group: Any, case: str) -> None:
    call, where = CASES[case]
    before = group.count()
    error = rf"^Probe\.\w+.*: (argument )?{where} cannot be sent: {WHY}$"
    with pytest.raises(SendError, match=error):
        call(group)
    assert group.count() == before


def test_no_rank_is_called_where_the_call_of_another_cannot_be_sent(group: Any) -> None:
    before = group.count()
    with pytest.raises(TypeError, match="argument 0: rank 1 cannot be sent"):
        group.echo(PerRank([1, LOCK]))
    assert group.count() == before
    assert group.echo(1) == [(0, 1, None), (1, 1, None)]


def test_a_value_that_holds_itself_is_not_searched_for_ever(group: Any) -> None:
    circle: list[Any] = [LOCK]
    circle.insert(0, circle)
    with pytest.raises(SendError, match=rf"argument 0 cannot be sent: {WHY}"):
        group.echo(circle)
