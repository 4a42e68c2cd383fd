"""What a vision service's replies mean to the API process."""

from __future__ import annotations

import grpc.aio

from foveate.transport.handle import EmbeddingHandle, Embeddings, InlineEmbeddings
from foveate.vision import vision_pb2 as pb


def embeddings_in(reply: pb.EncodeReply) -> Embeddings:
    """Take the handle, or the rows, out of a reply without an error."""
    if reply.HasField("inline"):
        rows = reply.inline
        return InlineEmbeddings(
            rows=rows.rows, num_tokens=rows.num_tokens, hidden_size=rows.hidden_size,
            dtype=rows.dtype, digest=rows.digest,
        )  # fmt: skip
    handle = reply.handle
    return EmbeddingHandle(
        arena=handle.arena, offset=handle.offset, generation=handle.generation, num_tokens=handle.num_tokens,
        hidden_size=handle.hidden_size, dtype=handle.dtype, digest=handle.digest, lease=handle.lease,
    )  # fmt: skip


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Say in a line why a call failed."""
    return f"{error.code().name.lower().replace('_', ' ')}: {error.details()}"
