"""What veRL's BatchData says of batches, futures and lists of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from protocol import BatchData, DataProto
from protocol.errors import BatchTypeError, ChunkError
from tests.protocol.test_future import future, produce


def test_batches_and_futures_can_be_chunked_and_lists_of_them_concatenated() -> None:
    proto = DataProto.from_dict({"ids": torch.arange(4)})
    for data in (proto, TensorDict({"ids": torch.arange(4)}, [4]), future(4)):
        assert BatchData(data).is_chunkable()
        assert not BatchData(data).is_concatable()
        parts = BatchData(data).chunk(2)
        assert isinstance(parts, list)
        assert [len(part) for part in parts] == [2, 2]
        assert not BatchData(parts).is_chunkable()
        assert BatchData(parts).is_concatable()
        joined = BatchData(tuple(parts)).concat()
        assert type(joined) is type(data)
        assert len(joined) == 4


@pytest.mark.parametrize("data", [3, None, [], [3], [DataProto(), 3], [DataProto(), future(1)]])
def test_anything_else_is_refused(data: object) -> None:
    assert not BatchData(data).is_chunkable()
    assert not BatchData(data).is_concatable()
    with pytest.raises(BatchTypeError, match="can be chunked; got"):
        BatchData(data).chunk(2)
    with pytest.raises(BatchTypeError, match="can be concatenated; got"):
        BatchData(data).concat()


@pytest.mark.parametrize("kind", [DataProto, TensorDict])
def test_rows_that_do_not_divide_are_refused(kind: type[Any]) -> None:
    with pytest.raises(ChunkError, match="only support equal chunk"):
        BatchData(produce(5, kind=kind)[0].batch).chunk(2)
