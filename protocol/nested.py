"""veRL's functions for building and joining jagged tensors; row operations are in `columns`."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from protocol import checks
from protocol.columns import (
    cat,
    differing_dim,
    from_rows,
    is_nested,
    is_strided,
    jagged,
    jagged_parts,
)
from protocol.errors import BatchError, BatchTypeError

__all__ = [
    "concat_nested_tensors",
    "maybe_fix_3d_position_ids",
    "nested_tensor_from_tensor_list",
]


def nested_tensor_from_tensor_list(
    tensors: list[torch.Tensor], ragged_idx: int | None = None
) -> torch.Tensor:
    """A jagged tensor whose row i is `tensors[i]`, also when all rows have one shape.

    The ragged dim is `ragged_idx`, counted with the batch dim: 1 for rows of shape (length, ...),
    2 for (k, length, ...). Left out, it is the dim in which the rows differ, or the last one if
    they do not.

    >>> nested_tensor_from_tensor_list([torch.zeros(3, 2), torch.zeros(3, 5)], ragged_idx=2).dim()
    3

    Raises:
        BatchError: no tensor, 0-dim tensors, `ragged_idx` is not one of their dims, or they
            differ in dtype or in another dim.
    """
    if not checks.list_of(torch.Tensor, "tensors", tensors):
        raise BatchError("Must provide at least one tensor")
    dims = {tensor.dim() for tensor in tensors}
    if len(dims) > 1 or 0 in dims:
        raise BatchError(
            "the rows of a jagged tensor must have the same number of dims, and at least one; "
            f"got {sorted(dims)}"
        )
    dim = dims.pop()
    if ragged_idx is None:
        ragged_idx = differing_dim(tensors) or dim
    ragged_idx = checks.count("ragged_idx", ragged_idx, least=None)
    if not 1 <= ragged_idx <= dim:
        raise BatchError(
            f"ragged_idx must be in [1, {dim}] for rows of {dim} dims. Got ragged_idx={ragged_idx}"
        )
    return from_rows(tensors, ragged_idx)


def concat_nested_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All rows of all jagged tensors, as one jagged tensor.

    Raises:
        BatchError: no tensor, or their rows do not fit into one jagged tensor.
        BatchTypeError: a tensor that is not jagged.
    """
    for i, tensor in enumerate(checks.list_of(torch.Tensor, "tensors", tensors)):
        if not is_nested(tensor):
            raise BatchTypeError(
                f"tensor {i} must be jagged; got a dense {tensor.dtype} {tuple(tensor.shape)}"
            )
    if tensors and all(map(is_strided, tensors)):
        return cat(tensors)  # type: ignore[return-value]
    if len({jagged_parts(tensor)[2] for tensor in tensors if tensor.size(0)}) > 1:
        # Rows of one shape say nothing of the dim that was meant to be ragged: look at all.
        return nested_tensor_from_tensor_list(
            [row for tensor in tensors for row in tensor.unbind()]
        )
    joined = cat([tensor for tensor in tensors if tensor.size(0)] or tensors[:1])
    assert isinstance(joined, torch.Tensor)
    return joined


def maybe_fix_3d_position_ids(data: TensorDict) -> None:
    """Restore, in place, the ragged dim of `data["position_ids"]` with rows (axes, length).

    Some versions of torch and tensordict lose it on the way through pickle or `consolidate`, and
    take dim 1 for the ragged one. Anything else is left as it is.
    """
    ids: Any = checks.tensordict("data", data).get("position_ids", None)
    nested: bool = is_nested(ids)
    if not nested or ids.layout is not torch.jagged or ids._ragged_idx != 1:  # pyright: ignore[reportAttributeAccessIssue]
        return
    values, offsets = ids.values(), ids.offsets()  # pyright: ignore[reportAttributeAccessIssue]
    if values.dim() == 2 and values.shape[1] == int(offsets[-1]):
        data.set("position_ids", jagged(values, offsets, 2))
