"""Any order of calls over roles and groups ends, with the rows that a list would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import DataProtoFuture
from protocol.checks import balanced_sizes
from single_controller import Broadcast, Handle
from single_controller.ray import Colocated, RayWorkerGroup
from tests.data_plane.stage import batch, xs

PLACES = ["one", "two", "three"]
steps = st.one_of(
    st.tuples(
        st.sampled_from(["step", "double", "thin", "total", "alone", "box", "merge", "shift"]),
        st.sampled_from(PLACES),
        st.integers(0, 9),
    ),
    st.tuples(
        st.sampled_from(["select", "halves", "slice", "union", "drop", "get", "open"]),
        st.none(),
        st.integers(0, 9),
    ),
)


def expected(method: str, rows: list[float], ranks: int) -> list[float]:
    """What a method makes of rows that are spread over so many ranks."""
    if method == "step":
        return [2 * x + 1 for x in rows]
    if method == "double":
        return [x for x in rows for _ in range(2)]
    first, second, *_ = balanced_sizes(len(rows), ranks)
    return rows[: first + max(second - 1, 0)] + rows[first + second :]


def parts(rows: list[float], ranks: int) -> list[list[float]]:
    left = iter(rows)
    return [[next(left) for _ in range(size)] for size in balanced_sizes(len(rows), ranks)]


def opened(handle: Handle[Any]) -> list[float]:
    return torch.as_tensor(handle.get(timeout=60)["x"]).tolist()  # type: ignore[no-any-return]


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=st.lists(steps, min_size=3, max_size=14), rows=st.integers(1, 7))
@pytest.mark.parametrize("kind", ["roles", "async_roles"])
def test_any_call_graph_ends_with_the_rows_of_a_list(
    request: pytest.FixtureRequest,
    three: RayWorkerGroup,
    kind: str,
    program: list[tuple[str, Any, int]],
    rows: int,
) -> None:
    hosts: Colocated = request.getfixturevalue(kind)
    groups: dict[str, RayWorkerGroup] = {"one": hosts.one, "two": hosts.two, "three": three}
    start = [float(x) for x in range(rows)]
    futures: list[tuple[DataProtoFuture, list[float]]] = [
        (hosts.one.step(batch(rows)), expected("step", start, 2))
    ]
    alone = []  # calls of the last rank only, which its peers do not wait for
    boxes: list[tuple[list[Handle[Any]], list[list[float]]]] = [  # handles, and their values
        (hosts.one.box(batch(rows)), parts(start, 2))
    ]
    for action, place, pick in program:
        future, have = futures[pick % len(futures)]
        if action == "total":
            assert sum(groups[place].total(future)) == sum(have)
        elif action == "alone":
            only = groups[place].total.options(ranks=[groups[place].world_size - 1])
            alone.append((only.submit(future), sum(have)))
        elif action == "box":
            boxes.append((groups[place].box(future), parts(have, groups[place].world_size)))
        elif action == "merge":
            whole = [x for part in boxes[pick % len(boxes)][1] for x in part]
            if len(whole) <= 60:
                found = groups[place].merge([*boxes[pick % len(boxes)][0]])
                boxes.append((found, [whole] * groups[place].world_size))
        elif action == "shift":
            handles, inside = boxes[pick % len(boxes)]
            by = sum(map(sum, inside[1:]))
            if by < 50:  # floats stay exact
                shifted = groups[place].shift(future, Broadcast(handles[1:]))
                futures.append((shifted, [x + by for x in have]))
        elif action == "open":
            handles, inside = boxes[pick % len(boxes)]
            assert opened(handles[pick % len(handles)]) == inside[pick % len(handles)]
        elif place is not None:
            if action == "double" and len(have) > 60:
                continue
            size = groups[place].world_size
            futures.append((getattr(groups[place], action)(future), expected(action, have, size)))
        elif action == "select":
            futures.append((future.select(["x"]), have))
        elif action == "halves" and len(have) % 2 == 0:
            futures.append(
                (
                    DataProtoFuture.concat(future.chunk(2)[::-1]),
                    have[len(have) // 2 :] + have[: len(have) // 2],
                )
            )
        elif action == "slice":
            futures.append((future.slice(len(have) // 3, len(have)), have[len(have) // 3 :]))
        elif action == "union":
            futures.append((future.union(future.select(["x"])), have))
        elif action == "drop" and len(futures) > 1 and len(boxes) > 1:
            del futures[pick % len(futures)], boxes[pick % len(boxes)]
        elif action == "get":
            assert xs(future.get(timeout=60)) == have
    for call, total in alone:
        assert call.result(timeout=60) == [total]
    for handles, inside in boxes:
        assert [opened(handle) for handle in handles] == inside
    for future, have in futures:
        assert len(future) == len(have)
        assert xs(future.get(timeout=60)) == have
