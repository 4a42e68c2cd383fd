"""The one thing that vision encoders and engines share: handles to pictures' embeddings, and how they are reached."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

Transport = Literal["local", "arena", "cuda-ipc", "inline"]
"""How rows get from an encoder to an engine: within a process, through shared memory, within a GPU, or as bytes."""


class EmbeddingHandle(msgspec.Struct, frozen=True, kw_only=True, tag="handle"):
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


class InlineEmbeddings(msgspec.Struct, frozen=True, kw_only=True, tag="inline"):
    """The rows themselves, for an engine that shares no memory with the encoder.

    Attributes:
        rows: num_tokens * hidden_size elements of ``dtype``, row by row, little-endian.
        num_tokens: as in :class:`EmbeddingHandle`, like the others.
        hidden_size: columns.
        dtype: the element type's torch name.
        digest: SHA-256 of what was encoded.
    """

    rows: bytes
    num_tokens: int
    hidden_size: int
    dtype: str
    digest: bytes


Embeddings = EmbeddingHandle | InlineEmbeddings


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder has to share with engines that can reach it.

    Attributes:
        arena: the name of this run of the encoder; its handles' ``arena`` begins with it.
        address: path of the unix socket where its memory is handed out; empty if it shares none.
        host: names the running kernel (its boot id): only on the same one can the socket be reached.
        device: ``cpu``, or ``cuda`` and the GPU's UUID (``cuda:GPU-1b2c...``).
    """

    arena: str
    address: str
    host: str
    device: str


class EmbeddingSource(Protocol):
    """Where an engine reads embeddings from, whatever they lie in."""

    def read(self, embeddings: Embeddings) -> Any:
        """Return the rows as a tensor ``[num_tokens, hidden_size]``, which is the caller's own or never written again.

        Raises:
            Unavailable: the lease has ended, so the rows may be gone, or the arena is not attached.
        """
        ...

    def release(self, embeddings: Embeddings) -> None:
        """End the handle's lease. Releasing twice does nothing, nor does releasing inline rows."""
        ...


class Publisher(Protocol):
    """Where an encoder leaves finished rows for engines. Safe to use from several threads."""

    @property
    def offer(self) -> Offer:
        """How engines get at it."""
        ...

    @property
    def largest(self) -> int:
        """Bytes of the largest picture that can be published at all."""
        ...

    def publish(self, rows: Any, digest: bytes, reader: str) -> EmbeddingHandle:
        """Write rows [num_tokens, hidden_size] and lease them to a reader; waits a while for room.

        Args:
            rows: a tensor on any device.
            digest: SHA-256 of what was encoded.
            reader: the name that the engine gave when it attached.

        Raises:
            Overloaded: there is no room, and none came in time.
            Unavailable: the reader is not attached (any more).
            PictureError: more bytes than ``largest``.
        """
        ...

    def release(self, lease: int) -> None:
        """End a lease. Releasing twice does nothing."""
        ...

    def stats(self) -> dict[str, float]:
        """Numbers for ``/metrics``: occupancy, leases, readers by transport, refusals, ended leases by cause."""
        ...

    def close(self) -> None:
        """Stop handing memory out. What was read before stays readable to its readers."""
        ...
