"""What a batch is: names only, each from the module that owns it. Nothing here imports ray."""

from protocol.batches import (
    BatchData,
    all_gather_data_proto,
    collate_fn,
    fold_batch_dim,
    pad_dataproto_to_divisor,
    unfold_batch_dim,
    unpad_dataproto,
)
from protocol.combine import union_numpy_dict
from protocol.data_proto import DataProto, DataProtoConfig, DataProtoItem
from protocol.errors import (
    BatchError,
    BatchTypeError,
    ChunkError,
    ConflictError,
    MissingKeyError,
    RowCountError,
    RowIndexError,
    StorageError,
)
from protocol.future import DataProtoFuture
from protocol.storage import (
    deserialize_single_tensor,
    deserialize_tensordict,
    serialize_single_tensor,
    serialize_tensordict,
)
from protocol.tensordict_utils import union_tensor_dict

__all__ = [
    "BatchData",
    "BatchError",
    "BatchTypeError",
    "ChunkError",
    "ConflictError",
    "DataProto",
    "DataProtoConfig",
    "DataProtoFuture",
    "DataProtoItem",
    "MissingKeyError",
    "RowCountError",
    "RowIndexError",
    "StorageError",
    "all_gather_data_proto",
    "collate_fn",
    "deserialize_single_tensor",
    "deserialize_tensordict",
    "fold_batch_dim",
    "pad_dataproto_to_divisor",
    "serialize_single_tensor",
    "serialize_tensordict",
    "unfold_batch_dim",
    "union_numpy_dict",
    "union_tensor_dict",
    "unpad_dataproto",
]
