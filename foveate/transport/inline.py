"""Embeddings as bytes in the reply, for an engine that shares no memory with the encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.errors import EngineError
from foveate.transport.handle import InlineEmbeddings
from foveate.transport.rows import as_bytes, dtype_name, from_bytes, num_bytes


def to_inline(rows: Tensor, digest: bytes) -> InlineEmbeddings:
    """Copy rows [num_tokens, hidden_size], a tensor on any device, into bytes.

    Raises:
        EngineError: the tensor is not rows of embeddings.
    """
    return InlineEmbeddings(
        rows=as_bytes(rows).cpu().numpy().tobytes(),
        num_tokens=rows.shape[0],
        hidden_size=rows.shape[-1],
        dtype=dtype_name(rows),
        digest=digest,
    )


def from_inline(embeddings: InlineEmbeddings) -> Tensor:
    """Copy bytes back into rows [num_tokens, hidden_size] on the CPU.

    Raises:
        EngineError: the number of bytes is not what the sizes say, or the element type is unknown.
    """
    wanted = num_bytes(embeddings)
    if len(embeddings.rows) != wanted:
        sizes = f"{embeddings.num_tokens} x {embeddings.hidden_size} {embeddings.dtype}"
        raise EngineError(f"a picture came with {len(embeddings.rows)} bytes of embeddings, and {sizes} are {wanted}")
    data = torch.empty(wanted, dtype=torch.uint8)
    np.copyto(data.numpy(), np.frombuffer(embeddings.rows, np.uint8))
    return from_bytes(data, embeddings)
