"""Batches of every kind, as hypothesis strategies, and a way to see that nothing changed them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from protocol import columns
from protocol.data_proto import DataProto

settings.register_profile(
    "protocol",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("protocol")

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]
LAYOUTS = ["plain", "strided", "expanded", "grad", "conj", "jagged", "jagged2", "holes", "wide"]


def make_column(rows: int, layout: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A column of `rows` rows in one of LAYOUTS; a layout that the dtype lacks becomes "plain"."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 5, shape, generator=generator).to(dtype)

    lengths = torch.randint(0, 4, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    if layout == "strided":
        return numbers(2 * rows, 3)[::2]
    if layout == "expanded":
        return numbers(rows, 1, 2).expand(rows, 4, 2)
    if layout == "grad" and dtype.is_floating_point and dtype.itemsize > 1:
        return numbers(rows, 2).requires_grad_()
    if layout == "conj" and dtype.is_complex:
        return numbers(rows, 2).conj()
    if layout == "jagged":
        return torch.nested.nested_tensor_from_jagged(numbers(total, 2), offsets)
    if layout == "jagged2":
        return torch.nested.nested_tensor_from_jagged(numbers(3, total), offsets, jagged_dim=2)
    if layout == "holes" and rows:
        return torch.nested.nested_tensor_from_jagged(
            numbers(4 * rows), torch.arange(rows + 1) * 4, lengths=lengths
        )
    return numbers(rows, 0) if layout == "wide" else numbers(rows)


def make_array(rows: int, kind: str) -> np.ndarray[Any, Any]:
    """An array of `rows` rows: numbers, strings, or objects of many types."""
    if kind == "numbers":
        return np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    if kind == "strings":
        return np.array([f"s{i}" * i for i in range(rows)], dtype="U")
    values = [None, float("nan"), {"a": [1, float("nan")]}, np.arange(2), np.arange(2), "text", [1]]
    return columns.as_object_array([values[i % len(values)] for i in range(rows)])


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 0, max_rows: int = 7) -> DataProto:
    """Any batch, of zero rows, zero columns or only objects too."""
    rows = draw(st.integers(min_rows, max_rows))
    kinds = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(DTYPES), st.integers(0, 3))
    tensors = {
        f"t{i}": make_column(rows, *kind)
        for i, kind in enumerate(draw(st.lists(kinds, max_size=3)))
    }
    names = draw(st.lists(st.sampled_from(["numbers", "strings", "objects"]), max_size=2))
    arrays = {f"a{i}": make_array(rows, name) for i, name in enumerate(names)}
    meta = draw(st.sampled_from([{}, {"step": 3, "nested": {"x": [1, float("nan")]}}]))
    return DataProto.from_dict(tensors, arrays, meta)


@pytest.fixture
def unchanged() -> Callable[[DataProto, Callable[[DataProto], Any]], Any]:
    """Calls a function with a batch and checks that the batch is what it was before."""

    def check(data: DataProto, function: Callable[[DataProto], Any]) -> Any:
        before, ids = copy.deepcopy(data), [id(t) for t in data._tensors().values()]
        result = function(data)
        assert data.diff(before) == []
        assert [id(t) for t in data._tensors().values()] == ids
        return result

    return check


@pytest.fixture
def sample() -> DataProto:
    """Six rows: `a` int64 (6,), `b` float32 (6, 2), strings `s`, meta_info {"m": 1}."""
    return DataProto.from_dict(
        {"a": torch.arange(6), "b": torch.arange(12.0).reshape(6, 2)},
        {"s": [f"s{i}" for i in range(6)]},
        {"m": 1},
    )
