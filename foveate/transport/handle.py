"""The one thing that the vision encoder and the engine share: a handle to a picture's embeddings."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class EmbeddingHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Names rows of embeddings that a vision encoder has finished writing, without holding them.

    Attributes:
        arena: which arena holds the rows.
        offset: where they start, in the arena's own unit.
        generation: the block's count of uses when it was published; a reader finding another one is late.
        num_tokens: rows, ``query_num`` for each slice, the source picture first, then its slices row by row.
        hidden_size: columns, the language model's hidden size.
        dtype: the element type's torch name, such as ``float32``.
        digest: SHA-256 of what was encoded (32 bytes): mode, size, pixels, slicing, encoder, dtype.
        lease: names the lease that keeps the rows in place until it is released.
    """

    arena: str
    offset: int
    generation: int
    num_tokens: int
    hidden_size: int
    dtype: str
    digest: bytes
    lease: int


class EmbeddingSource(Protocol):
    """Where an engine reads embeddings from: one arena, whatever it is made of."""

    def read(self, handle: EmbeddingHandle) -> Any:
        """Return the rows as a tensor ``[num_tokens, hidden_size]``.

        Raises:
            Unavailable: the lease has ended, so the rows may be gone.
        """
        ...

    def release(self, handle: EmbeddingHandle) -> None:
        """End the handle's lease. Releasing twice does nothing."""
        ...
