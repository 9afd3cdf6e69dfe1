"""How the meta_info of several batches becomes one; how columns do is left to `columns`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from protocol.checks import short
from protocol.columns import equal
from protocol.errors import BatchTypeError, ConflictError
from protocol.summary import eq_note

__all__ = ["METRICS", "PADDING", "merge", "union"]

METRICS = "metrics"
"""The one key whose values may differ between shards: they are collected into lists."""

PADDING = "_verl_auto_padding"
"""The key that says a batch may be padded to a number of rows that divides."""


def merge(metas: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> dict[str, Any]:
    """The meta_info of concatenated shards, in a new dict.

    Under "metrics", each shard may hold a dict, a list of dicts or None; they become one dict of
    lists, in shard order. Every other key must have equal values in all shards that have it.

        merge([{"step": 1, "metrics": {"loss": 2.0}}, {"step": 1, "metrics": {"loss": 4.0}}])
        # {"step": 1, "metrics": {"loss": [2.0, 4.0]}}

    Args:
        names: what an error calls the shards; "shard 0", "shard 1", ... by default.

    Raises:
        ConflictError: two shards have different values under one key.
        BatchTypeError: metrics of another kind.
    """
    names = names or [f"shard {i}" for i in range(len(metas))]
    merged: dict[str, Any] = {}
    metrics: dict[str, list[Any]] = {}
    for shard, meta in enumerate(metas):
        for key, value in meta.items():
            if key == METRICS:
                for record in _records(value, names[shard]):
                    for name, metric in record.items():
                        metrics.setdefault(name, []).append(metric)
                if value is not None:
                    merged[METRICS] = metrics
            elif key not in merged:
                merged[key] = value
            elif not equal(merged[key], value):
                raise ConflictError(
                    f"Conflicting values for meta_info key '{key}': "
                    f"{short(merged[key])} in {_holders(metas, names, key, merged[key])}; "
                    f"{short(value)} in {_holders(metas, names, key, value)}"
                    f"{eq_note(value)}. Make them equal, or "
                    f"report values that differ under '{METRICS}', which becomes a dict of lists"
                )
    return merged


def union(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both, in a new dict.

    Raises:
        ConflictError: both have a key, with different values.
    """
    for key in a.keys() & b.keys():
        if not equal(a[key], b[key]):
            raise ConflictError(
                f"meta_info key '{key}' in the two batches are not the same object: "
                f"{short(a[key])} and {short(b[key])}{eq_note(a[key])}; pop or rename one of them"
            )
    return {**a, **b}


def _records(value: object, name: str) -> list[Mapping[str, Any]]:
    records: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for record in records:
        if not isinstance(record, Mapping):
            raise BatchTypeError(
                f"meta_info '{METRICS}' must be a dict, a list of dicts or None; "
                f"{name} has {short(value)}"
            )
    return records


def _holders(
    metas: Sequence[Mapping[str, Any]], names: Sequence[str], key: str, value: object
) -> str:
    """The names of the shards that hold this value."""
    return ", ".join(
        name
        for name, meta in zip(names, metas, strict=True)
        if key in meta and equal(meta[key], value)
    )
