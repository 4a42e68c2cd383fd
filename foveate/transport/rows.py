"""Rows of embeddings as bytes and back: exact bits, whatever the element type."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import EngineError
from foveate.transport.handle import Embeddings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(rows: Tensor) -> str:
    """Name the element type of rows [num_tokens, hidden_size], as handles do.

    Raises:
        EngineError: they have another number of dimensions, or an element type that is never published.
    """
    if rows.dim() != 2 or rows.dtype not in _NAMES:
        raise EngineError(
            f"embeddings are [num_tokens, hidden_size] of {', '.join(_DTYPES)}, not {list(rows.shape)} of {rows.dtype}"
        )
    return _NAMES[rows.dtype]


def as_bytes(rows: Tensor) -> Tensor:
    """See rows as uint8 [num_bytes] on their device; copies only rows that do not lie in one piece."""
    return rows.detach().contiguous().view(-1).view(torch.uint8)


def num_bytes(embeddings: Embeddings) -> int:
    """Bytes that a handle, or inline rows, speak of.

    Raises:
        EngineError: the sizes are negative, or the element type is unknown.
    """
    dtype = _DTYPES.get(embeddings.dtype)
    if dtype is None:
        raise EngineError(f"a picture's embeddings have the unknown element type {embeddings.dtype!r}")
    if embeddings.num_tokens < 0 or embeddings.hidden_size < 0:
        raise EngineError(f"a picture's embeddings have sizes {[embeddings.num_tokens, embeddings.hidden_size]}")
    return embeddings.num_tokens * embeddings.hidden_size * dtype.itemsize


def from_bytes(data: Tensor, embeddings: Embeddings) -> Tensor:
    """See uint8 [num_bytes] as the rows [num_tokens, hidden_size] that the handle speaks of."""
    return data.view(_DTYPES[embeddings.dtype]).view(embeddings.num_tokens, embeddings.hidden_size)
