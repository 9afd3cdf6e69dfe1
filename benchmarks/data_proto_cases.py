"""What `data_proto.py` measures: one batch, and each operation twice, as a method of a DataProto
class and as the plain torch and numpy calls that it stands for.

Run as a program, with the name of a library, it measures: it reads a contestant, the name of a case
and a number of calls per line, and answers with the seconds of each call. With "verl" it imports
nothing of ours, so that veRL's environment can run it.
"""

from __future__ import annotations

import gc
import json
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

ROWS, WIDTH, COLUMNS, SHARDS = 1000, 4096, 6, 8

Run = Callable[[], object]
Prepare = Callable[[], Run]  # what is not measured, and then the call that is

Plain = dict[str, Any]  # a batch without any class: tensors and arrays by name


def tensors() -> dict[str, torch.Tensor]:
    """The columns c0 ... c5, the same in every process."""
    random = torch.Generator().manual_seed(0)
    shape = (ROWS, WIDTH)
    return {f"c{i}": torch.randint(0, 1 << 40, shape, generator=random) for i in range(COLUMNS)}


def strings() -> np.ndarray[Any, Any]:
    """One string per row."""
    return np.array([f"answer number {row}" for row in range(ROWS)], dtype=object)


def picked() -> torch.Tensor:
    """Half of the rows, in random order."""
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[: ROWS // 2]


def in_band(value: object) -> object:
    """Through one byte string and back."""
    return pickle.loads(pickle.dumps(value, protocol=5))


def out_of_band(value: object) -> object:
    """The same with the buffers left outside the byte string, as Ray does."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[buffer.raw().toreadonly() for buffer in buffers])


def cases_of(data_proto: Any) -> dict[str, Prepare]:
    """The operations as methods of a DataProto class, ours or veRL's."""
    columns, text, index = tensors(), strings(), picked()
    data = data_proto.from_dict(columns, {"text": text})
    shards = data.chunk(SHARDS)

    def batch(first: int, last: int, copy: bool = False) -> Any:
        part = {f"c{i}": columns[f"c{i}"] for i in range(first, last)}
        if copy:
            part = {key: tensor.clone() for key, tensor in part.items()}
        return data_proto.from_dict(part, {"text": strings()} if copy else {})

    common = batch(2, 6, copy=True)

    def union(first: int, other: Any) -> Run:  # veRL's changes its first batch, hence a new one
        left = data_proto.from_dict(
            {f"c{i}": columns[f"c{i}"] for i in range(first)}, {"text": text}
        )
        return lambda: left.union(other)

    options = {"shuffle": True}
    size = ROWS // SHARDS
    return {
        "chunk": lambda: lambda: data.chunk(SHARDS),
        "chunk, then .batch": lambda: lambda: [shard.batch for shard in data.chunk(SHARDS)],
        "concat": lambda: lambda: data_proto.concat(shards),
        "union, keys in common": lambda: union(4, common),
        "union, none in common": lambda: union(3, batch(3, 6)),
        "select_idxs": lambda: lambda: data.select_idxs(index),
        "repeat": lambda: lambda: data.repeat(2, interleave=True),
        "make_iterator": lambda: (
            lambda: list(data.make_iterator(size, 1, seed=0, dataloader_kwargs=dict(options)))
        ),
        "pickle in band": lambda: lambda: in_band(data),
        "pickle out of band": lambda: lambda: out_of_band(data),
        "slice": lambda: lambda: data[100:200],
        "one row": lambda: lambda: data[100],
    }


def plain_cases() -> dict[str, Prepare]:
    """The same operations on a dict of tensors and arrays; results are as private as ours."""
    columns, text, index = tensors(), strings(), picked()
    size = ROWS // SHARDS
    common = {**{f"c{i}": columns[f"c{i}"].clone() for i in range(2, 6)}, "text": strings()}

    def chunk() -> list[Plain]:
        parts = {key: torch.split(tensor, size) for key, tensor in columns.items()}
        texts = [text[i : i + size] for i in range(0, ROWS, size)]
        return [
            {**{key: parts[key][i] for key in parts}, "text": texts[i]} for i in range(len(texts))
        ]

    def concat(shards: list[Plain]) -> Plain:
        joined: Plain = {key: torch.cat([shard[key] for shard in shards]) for key in columns}
        return {**joined, "text": np.concatenate([shard["text"] for shard in shards])}

    def union(left: Plain, right: Plain) -> Plain:
        for key in left.keys() & right.keys():
            same = np.array_equal if key == "text" else torch.equal
            assert same(left[key], right[key])
        return {**left, **right}

    def take(index: torch.Tensor) -> Plain:
        rows: Plain = {key: tensor.index_select(0, index) for key, tensor in columns.items()}
        return {**rows, "text": text[index.numpy()]}

    def repeat() -> Plain:
        rows: Plain = {key: tensor.repeat_interleave(2, dim=0) for key, tensor in columns.items()}
        return {**rows, "text": np.repeat(text, 2)}

    def shuffled() -> list[Plain]:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
        return [take(part) for part in order.split(size)]

    def arrays() -> Plain:
        return {**{key: tensor.numpy() for key, tensor in columns.items()}, "text": text}

    def torches(received: Any, copy: bool) -> Plain:
        texts = received.pop("text")
        owned = {key: np.array(array) if copy else array for key, array in received.items()}
        return {**{key: torch.from_numpy(array) for key, array in owned.items()}, "text": texts}

    def cut(rows: Any) -> Plain:
        return {**{key: tensor[rows] for key, tensor in columns.items()}, "text": text[rows]}

    shards = chunk()
    some = {key: columns[key] for key in ("c3", "c4", "c5")}
    return {
        "chunk": lambda: chunk,
        "chunk, then .batch": lambda: chunk,
        "concat": lambda: lambda: concat(shards),
        "union, keys in common": lambda: (
            lambda: union({**{f"c{i}": columns[f"c{i}"] for i in range(4)}, "text": text}, common)
        ),
        "union, none in common": lambda: (
            lambda: union({**{f"c{i}": columns[f"c{i}"] for i in range(3)}, "text": text}, some)
        ),
        "select_idxs": lambda: lambda: take(index),
        "repeat": lambda: repeat,
        "make_iterator": lambda: shuffled,
        "pickle in band": lambda: lambda: torches(in_band(arrays()), copy=False),
        "pickle out of band": lambda: lambda: torches(out_of_band(arrays()), copy=True),
        "slice": lambda: lambda: cut(slice(100, 200)),
        "one row": lambda: lambda: cut(100),
    }


def measure(prepare: Prepare, calls: int) -> list[float]:
    """Seconds of each call. What a call returns is freed outside of the measurement."""
    seconds = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(calls):
            run = prepare()
            start = time.perf_counter()
            result = run()
            seconds.append(time.perf_counter() - start)
            del result, run
    finally:
        gc.enable()
    return seconds


def contestants(library: str) -> tuple[dict[str, dict[str, Prepare]], str]:
    """The cases by contestant, and the version of the library."""
    if library == "verl":
        import verl

        return {"verl": cases_of(verl.DataProto)}, verl.__version__
    import protocol

    return {"ours": cases_of(protocol.DataProto), "plain": plain_cases()}, "this checkout"


def serve(library: str) -> None:
    """Measure at the other end of a pipe."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    sides, version = contestants(library)
    names = ("torch", "tensordict", "numpy")
    versions = {library: version, **{name: sys.modules[name].__version__ for name in names}}
    cases = {side: list(cases) for side, cases in sides.items()}
    print(json.dumps([versions, cases]), file=answers, flush=True)
    for line in sys.stdin:
        side, case, calls = json.loads(line)
        print(json.dumps(measure(sides[side][case], calls)), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
